"""Shards as Parquet files that no reader sees until a table's log names them: what Delta and Iceberg have in common.

A commit says which shards it holds, by a digest of their names and checksums in order. A run that was killed after it
finds its own commit by that and appends nothing again; one that goes on with ``--follow`` appends what came behind.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from fct.atomic_files import checksum_file
from fct.checks import shown
from fct.errors import FctError
from fct.gallery.interfaces import JOB_KEY, VECTOR_KEY, Batches, Shard
from fct.gallery.parquet_files import ParquetDestination
from fct.gallery.space_tags import SPACE_KEY
from fct.gallery.table_types import in_table
from fct.spaces import EmbeddingSpace
from fct.types import JsonDict

__all__ = ["SHARDS", "CommittedFile", "CommittedFiles", "digest", "files_of", "properties", "shards_committed"]

JOB, VECTOR, SPACE = JOB_KEY.decode(), VECTOR_KEY.decode(), SPACE_KEY.decode()
SHARDS, FILES, CONTENT = "fct.shards", "fct.files", "fct.content"


@dataclass(frozen=True, slots=True)
class CommittedFile:
    """A shard's file: its name below the table, rows, bytes and XXH64."""

    name: str
    rows: int
    bytes: int
    xxh64: str

    @classmethod
    def of(cls, extra: object) -> CommittedFile:
        """What :meth:`CommittedFiles.write` said of a shard, as it comes back from the journal."""
        if not isinstance(extra, dict) or set(extra) != {"name", "rows", "bytes", "xxh64"}:
            raise FctError(f"expected the journal's name, rows, bytes and xxh64 of a shard's file, got {shown(extra)}")
        return cls(**extra)

    @classmethod
    def made(cls, name: str, rows: int, path: Path) -> CommittedFile:
        """A file that was written to ``path`` and is to be called ``name``."""
        with open(path, "rb", buffering=0) as file:
            return cls(name, rows, path.stat().st_size, checksum_file(file))


def files_of(extra: object) -> list[CommittedFile]:
    """What a shard left: one file, or, in a partitioned table, one for each partition that it has rows of."""
    if isinstance(extra, dict) and set(extra) == {"files", "partitions"} and isinstance(extra["files"], list):
        return [CommittedFile.of(file) for file in extra["files"]]
    return [CommittedFile.of(extra)]


def digest(files: Sequence[CommittedFile], *, named: bool = True) -> str:
    """sha256 of the files' checksums, and of their names: the same for the same shards of the same run."""
    parts = [f"{f.rows}:{f.xxh64}" + (f":{f.name}" if named else "") for f in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def properties(files: Sequence[CommittedFile], schema: pa.Schema) -> dict[str, str]:
    """What a commit of these shards says of itself."""
    job = (schema.metadata or {})[JOB_KEY].decode()
    return {
        JOB: job,
        SHARDS: str(len(files)),
        FILES: digest(files),
        CONTENT: digest(files, named=False),
    }


def shards_committed(said: Mapping[str, object], files: Sequence[CommittedFile]) -> int | None:
    """How many of ``files`` a commit with these properties holds; None where it is not of this run."""
    count = str(said.get(SHARDS, ""))
    if not count.isdecimal() or int(count) > len(files):
        return None
    return int(count) if said.get(FILES) == digest(files[: int(count)]) else None


class CommittedFiles(ParquetDestination):
    """Parquet files of a table that are committed together, at the end.

    times: whether such a table holds times of day.
    """

    times: bool
    tags_itself = False  # the table's log does

    @property
    @abstractmethod
    def title(self) -> str:
        """The table, for a message."""

    @abstractmethod
    def stored(self, schema: pa.Schema) -> pa.Schema:
        """The columns as the table holds them."""

    @abstractmethod
    def commit(self, files: Sequence[CommittedFile], schema: pa.Schema, space: EmbeddingSpace) -> None:
        """Makes the files the table's, once, however often it is called. schema: as they were written."""

    def name_of(self, shard: Shard) -> str:
        """A shard's file below the table."""
        return f"{shard.name}{self.suffix}"

    def write(self, shard: Shard, batches: Batches, scratch: Path) -> tuple[Mapping[str, Path], JsonDict]:
        name, path, rows = self.name_of(shard), scratch / f"{shard.name}{self.suffix}", 0

        def counted() -> Batches:
            nonlocal rows
            for batch in self.as_stored(batches):
                rows += batch.num_rows
                yield batch

        self.write_file(path, shard, counted(), {})
        return {name: path}, asdict(CommittedFile.made(name, rows, path))

    def as_stored(self, batches: Batches) -> Batches:
        """The batches as the table holds them."""
        schema: pa.Schema | None = None
        for batch in batches:
            schema = schema or self.stored(batch.schema)
            yield in_table(batch, schema)

    def finish(self, extras: Sequence[object], schema: pa.Schema, space: EmbeddingSpace) -> None:
        self.commit([file for extra in extras for file in files_of(extra)], self.stored(schema), space)

    def describes(self, schema: pa.Schema, space: EmbeddingSpace) -> dict[str, str]:
        """The table's own properties: which model's vectors it holds, and in which column."""
        vector = (schema.metadata or {})[VECTOR_KEY].decode()
        return {VECTOR: vector, SPACE: json.dumps(space.to_dict(), sort_keys=True)}
