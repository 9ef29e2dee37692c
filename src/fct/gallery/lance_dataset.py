"""Lance datasets, which are LanceDB's tables: fragments are the pieces, and a backfill commits one new version."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa

from fct.checks import shown
from fct.errors import FctError
from fct.extras import need
from fct.gallery.arrow_guard import validated
from fct.gallery.interfaces import JOB_KEY, Batches, Destination, Output, Piece, Shard, Source
from fct.gallery.location import location_of
from fct.gallery.space_tags import side_file_space, space_of_schema
from fct.gallery.urls import redacted
from fct.spaces import EmbeddingSpace
from fct.types import JsonDict, StorageOptions

__all__ = ["LanceDestination", "LanceSource"]


def _lance() -> ModuleType:
    return need("lance", "lance")


# fsspec's names for S3 and what Lance calls the same; Lance knows all others by their own names only.
_NAMES = {
    "key": "aws_access_key_id",
    "secret": "aws_secret_access_key",
    "token": "aws_session_token",
    "endpoint_url": "aws_endpoint",
    "region_name": "aws_region",
    "anon": "aws_skip_signature",
}
_FSSPEC_ONLY = ("skip_instance_cache", "use_listings_cache", "client_kwargs", "config_kwargs")


def lance_options(options: StorageOptions) -> dict[str, str] | None:
    """fsspec's storage options as Lance takes them: strings alone, under its own names."""
    further = options.get("client_kwargs")
    given = {**options, **(dict(further) if isinstance(further, Mapping) else {})}
    flat = {k: v for k, v in given.items() if k not in _FSSPEC_ONLY}
    found = {_NAMES.get(k, k): str(v).lower() if isinstance(v, bool) else str(v) for k, v in flat.items()}
    if found.get("aws_endpoint", "").startswith("http://"):
        found.setdefault("allow_http", "true")
    return found or None


class LanceSource(Source):
    """One version of a dataset: later writes to it are not seen.

    url: a path or URL ending in ``.lance`` (a LanceDB table is ``<database>/<table>.lance``). version: by default the
    newest when this is made.
    """

    kind = "lance"

    def __init__(self, url: str, storage_options: StorageOptions | None = None, version: int | None = None) -> None:
        self._url, self._options = url, dict(storage_options or {})
        self.transient = "://" in url  # type: ignore[misc]
        self.version = int(version or self._dataset(None).version)

    def _dataset(self, version: int | None) -> Any:
        lance = _lance()
        with self._named_errors():
            try:
                return lance.dataset(self._url, version=version, storage_options=lance_options(self._options))
            except ValueError as error:
                raise FileNotFoundError(f"source: expected a Lance dataset at {self.url}: {error}") from error

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Whatever Lance says of a dataset comes out as an FctError that names it, panics too. A store's own errors
        may pass when it is asked again."""
        try:
            yield
        except (FctError, FileNotFoundError, GeneratorExit):
            raise
        except BaseException as error:
            panic = type(error).__name__ == "PanicException"  # of Rust: no Exception
            passing = isinstance(error, OSError) and (self.transient or error.errno is not None)
            if passing or not (panic or isinstance(error, Exception)):
                raise
            raise FctError(f"source: the Lance dataset {self.url} is damaged: {error}") from error

    @property
    def url(self) -> str:
        return redacted(self._url)

    @property
    def schema(self) -> pa.Schema:
        with self._named_errors():
            return self._dataset(self.version).schema

    @property
    def space(self) -> EmbeddingSpace | None:
        return space_of_schema(self.schema, self._url) or side_file_space(
            location_of(self._url, storage_options=self._options)
        )

    def pieces(self) -> list[Piece]:
        # The version is not in the stamp: fragments never change, deletions are what changes what they hold.
        with self._named_errors():
            return [
                Piece(f"fragment-{f.fragment_id}", f.count_rows(), f.num_deletions, str(f.metadata.physical_rows))
                for f in self._dataset(self.version).get_fragments()
            ]

    def read(self, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches:
        with self._named_errors():
            fragment = self._dataset(self.version).get_fragment(int(piece.name.rpartition("-")[2]))
            batches = iter(fragment.to_batches(offset=start, limit=rows, batch_size=batch_rows))
        while True:
            with self._named_errors():
                batch = next(batches, None)
                if batch is None:
                    return
                validated(batch, self.url)
            yield batch


class LanceDestination(Destination):
    """Shards become fragments that no reader sees; the last step commits them all as one new version.

    An existing dataset keeps its versions: rolling back is ``dataset.checkout_version`` or ``restore``.
    """

    kind = "lance"
    shared = True

    def __init__(self, url: str, storage_options: StorageOptions | None = None) -> None:
        self._url, self._options = url, dict(storage_options or {})

    @property
    def url(self) -> str:
        return redacted(self._url)

    def write(self, shard: Shard, batches: Batches, scratch: Path) -> tuple[Mapping[str, Path], object]:
        first = next(batches)

        def stream() -> Batches:
            yield first
            yield from batches

        if first.num_rows == 0:
            for _ in batches:
                pass
            return {}, []
        fragments = _lance().fragment.write_fragments(
            pa.RecordBatchReader.from_batches(first.schema, stream()),
            self._url,
            schema=first.schema,
            mode="overwrite",  # of the dataset's schema: the old version's fragments stay
            storage_options=lance_options(self._options),
        )
        return {}, [fragment.to_json() for fragment in fragments]

    def outputs(self, extra: object) -> list[Output]:
        """The data files behind a shard's fragments."""
        root = location_of(self._url, storage_options=self._options)
        files = [f"data/{file['path']}" for fragment in _fragments(extra) for file in fragment["files"]]
        return [Output(name, (root / name).version().bytes, (root / name).checksum()) for name in files]

    def finish(self, extras: Sequence[object], schema: pa.Schema, space: EmbeddingSpace) -> None:
        lance = _lance()
        with contextlib.suppress(ValueError, FileNotFoundError):  # no dataset yet
            there = lance.dataset(self._url, storage_options=lance_options(self._options)).schema.metadata or {}
            if there.get(JOB_KEY) == (schema.metadata or {})[JOB_KEY]:
                return  # committed just before a crash
        fragments = [lance.FragmentMetadata.from_json(json.dumps(f)) for extra in extras for f in _fragments(extra)]
        lance.LanceDataset.commit(
            self._url, lance.LanceOperation.Overwrite(schema, fragments), storage_options=lance_options(self._options)
        )


def _fragments(extra: object) -> list[JsonDict]:
    """What :meth:`LanceDestination.write` said of a shard, as it comes back from the journal."""
    if not isinstance(extra, list) or not all(isinstance(fragment, dict) for fragment in extra):
        raise FctError(f"expected the journal's list of a shard's Lance fragments, got {shown(extra)}")
    return extra
