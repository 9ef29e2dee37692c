"""The job: what is mapped to what, cut into shards once and kept; its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from fct.backfilling.checked_json import (
    SEAL,
    Check,
    SchemaError,
    anything,
    flag,
    listed,
    number,
    one_of,
    parse,
    record,
    sealed,
    text,
    unsealed,
    whole,
)
from fct.errors import BackfillError
from fct.gallery.interfaces import Piece, Shard
from fct.gallery.url_identity import differing_parts
from fct.gallery.urls import redacted
from fct.gallery.vectors import VECTOR_FORMATS
from fct.spaces import METRICS, EmbeddingSpace

__all__ = [
    "ORDERS",
    "Job",
    "cut_shards",
    "since",
]

JOB_VERSION = 1
ORDERS = ("random", "access", "variance")  # of rows to re-embed, where it is no column's
JOB_BYTES = 128 << 20  # of job.json: a million files
_SHARDS, _ROWS = 2_000_000, 1 << 60
_PAIR = listed(whole(0, _ROWS), 2)
_NAME, _URL, _WORD = text(65536), text(65536), text(200)
_PARTS = listed(listed(text(64), 2), 32)


def cut_shards(pieces: Sequence[Piece], shard_rows: int) -> list[Shard]:
    """Every row of every piece in exactly one shard of about ``shard_rows``, cut at row groups where there are any.

    A piece's last shard is as short as it comes; a row group larger than two shards is cut inside.
    """
    shards: list[Shard] = []
    first = 0
    for place, piece in enumerate(pieces):
        cuts, done, last = [0], 0, 0
        for rows in piece.groups or (piece.rows,):
            if done + rows - last > shard_rows and done > last:
                cuts.append(done)
                last = done
            while rows > 2 * shard_rows:
                done, rows = done + shard_rows, rows - shard_rows
                cuts.append(done)
                last = done
            if rows > shard_rows:
                cuts.append(done + (rows + 1) // 2)
                last = cuts[-1]
            done += rows
        for a, b in zip(cuts, [*cuts[1:], piece.rows], strict=True):
            if b > a:
                shards.append(Shard(len(shards), place, a, b - a, first + a))
        first += piece.rows
    return shards


def since(default: object, words: str, *, meaning: bool = False, check: Check | None = None) -> Any:
    """A field of :class:`Job` that came after version 0.1, so that backfills begun without it go on.

    A job that has the default there has the fingerprint and the job.json of one that never heard of the field.

    Args:
        default: what a job means that lacks it. words: names it in a message.
        meaning: whether it changes what the output means: then the fingerprint holds it where it is not the default.
        check: of what job.json says there; by default for any value of the default's type.
    """
    kinds: dict[type, Check] = {bool: flag, int: whole(0, _ROWS), str: _NAME, float: number(-1e300, 1e300)}
    metadata = {"words": words, "meaning": meaning, "check": check or kinds.get(type(default), anything)}
    return field(default=default, kw_only=True, metadata=metadata)


@dataclass(frozen=True)
class Job:
    """Everything that decides the output's bytes, and the cut into shards. Kept as ``_fct/job.json``.

    source, side: URLs, for people. pieces, side_pieces: what they held when the job was planned.
    vector, side_column: columns; side_column "" where side-information comes from ``side`` or there is none.
    id_column: the column named in rejects/, or "" for row numbers.
    passes: (pieces, side_pieces) there were when an earlier pass was begun; what came later stands behind them.
    saved_dataset: whether ``datasets.load_from_disk`` opens the result, as it did the source.
    side_join: whether rows of ``side`` belong to the source's by "position" or by "id".
    begun_as: the fingerprint of a job that was begun when names still held the secrets of URLs; else "".
    url_key: the key of the fingerprints in source_parts, side_parts and destination_parts, which tell without a secret
    which part of a URL is another one (:mod:`fct.gallery.url_identity`); () for paths and in older jobs.
    reembed, true_column: of a partial backfill, the rule by which rows get true vectors, and the column that says which
    have; else "".

    Fields that came later are made by :func:`since`; ``tests/backfilling/test_resuming_0_1.py`` holds jobs of then.
    """

    source: str
    destination: str
    format: str
    pieces: tuple[Piece, ...]
    vector: str
    id_column: str
    side: str
    side_pieces: tuple[Piece, ...]
    side_vector: str
    side_column: str
    keep_side: bool
    transformation: str
    old_space: EmbeddingSpace
    new_space: EmbeddingSpace
    precision: str
    backend: str
    dtype: str
    vector_format: str
    binary_dtype: str
    scale: float
    shard_rows: int
    batch_rows: int
    passes: tuple[tuple[int, int], ...] = since((), "the passes", check=listed(_PAIR, 1 << 20))
    saved_dataset: bool = since(False, "a saved dataset")
    side_join: str = since("position", "how side-information is joined", meaning=True, check=one_of(("position", "id")))
    begun_as: str = since("", "the fingerprint it was begun with")
    offset: float = since(0.0, "offset", meaning=True)
    scales: tuple[float, ...] = since((), "scale", meaning=True, check=listed(number(0.0, 1e300), 1 << 24))
    offsets: tuple[float, ...] = since((), "offset", meaning=True, check=listed(number(-1e300, 1e300), 1 << 24))
    scale_column: str = since("", "column of the scale", meaning=True)
    offset_column: str = since("", "column of the offset", meaning=True)
    reembed: str = since("", "the rule by which rows are re-embedded", meaning=True)
    true_column: str = since("", "the column that says which rows are re-embedded", meaning=True)
    url_key: str = since("", "the key of the URLs' fingerprints", check=text(64, "([0-9a-f]{64})?"))
    source_parts: tuple[tuple[str, str], ...] = since((), "source", check=_PARTS)
    side_parts: tuple[tuple[str, str], ...] = since((), "side-information", check=_PARTS)
    destination_parts: tuple[tuple[str, str], ...] = since((), "destination", check=_PARTS)

    @property
    def ordered_by(self) -> str:
        """The source's column by which rows were chosen to be re-embedded; "" where it was none."""
        order = self.reembed.rpartition(", budget ")[0]
        return "" if order in ORDERS else order

    @property
    def rows(self) -> int:
        return sum(p.rows for p in self.pieces)

    @cached_property
    def shards(self) -> list[Shard]:
        self.require_sound()
        return cut_shards(self.pieces, self.shard_rows)

    def require_sound(self) -> None:
        """Raises BackfillError where the numbers cannot be: row groups that are not the piece's rows, shards without
        rows or too many of them."""
        if self.shard_rows < 1 or self.batch_rows < 1:
            raise BackfillError(
                f"shard_rows, batch_rows: expected at least 1, got {self.shard_rows}, {self.batch_rows}"
            )
        for piece in self.pieces:
            if piece.groups and sum(piece.groups) != piece.rows:
                raise BackfillError(
                    f"source: {piece.name} has {piece.rows} rows, its row groups hold {sum(piece.groups)}"
                )
        if any(len(counts) != 2 or counts[0] > len(self.pieces) for counts in self.passes):
            raise BackfillError("source: the job has more files in an earlier pass than now")
        shards = sum(-(-piece.rows // self.shard_rows) + len(piece.groups) for piece in self.pieces)
        if shards > _SHARDS or self.rows > _ROWS:
            raise BackfillError(
                f"shard_rows: expected at most {_SHARDS:,} shards, {self.rows:,} rows would be {shards:,} of "
                f"{self.shard_rows}: choose more rows a shard"
            )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of h's weights and of what changes the meaning of the output.

        Not in it: shard and batch size, threads, device, backend (each computes the same function at the same
        precision), and where source and destination lie.
        """
        if self.begun_as:
            return self.begun_as
        meaning = {
            "pieces": [(p.name, p.rows, p.bytes) for p in self.pieces],
            "side_pieces": [(p.name, p.rows, p.bytes) for p in self.side_pieces],
        } | {
            name: getattr(self, name)
            for name in (
                *("format", "vector", "id_column", "side_vector", "side_column", "keep_side", "transformation"),
                *("precision", "dtype", "vector_format", "binary_dtype", "scale"),
                *(f.name for f in self._later() if f.metadata["meaning"] and getattr(self, f.name) != f.default),
            )
        }
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def fingerprints(self, shard: Shard) -> tuple[str, ...]:
        """The fingerprints that a marker of this shard may have: this job's, and of the passes that had its piece."""
        return (*(found for pieces, found in self._earlier if shard.piece < pieces), self.fingerprint)

    @cached_property
    def _earlier(self) -> list[tuple[int, str]]:
        return [
            (n, replace(self, pieces=self.pieces[:n], side_pieces=self.side_pieces[:m], passes=()).fingerprint)
            for n, m in self.passes
        ]

    @classmethod
    def _later(cls) -> list[Field[Any]]:
        return [f for f in fields(cls) if "meaning" in f.metadata]

    def differences(self, other: Job) -> list[str]:
        """What keeps ``other`` from being the same job, in words."""
        found = self._moved(other)
        names = {
            "transformation": "h (another transformation)",
            "precision": "precision",
            "format": "format",
            "vector": "vector column",
            "id_column": "id column",
            "side_column": "side-information column",
            "side_vector": "side-information column",
            "keep_side": "keep_side_info",
            "dtype": "dtype",
            "vector_format": "vector_format",
            "binary_dtype": "binary_dtype",
            "scale": "scale",
            "old_space": "old space",
            "new_space": "new space",
        } | {f.name: f.metadata["words"] for f in self._later() if f.metadata["meaning"]}
        for name, words in names.items():
            if getattr(self, name) != getattr(other, name):
                was, now = (f"{getattr(job, name)!r:.120}" for job in (self, other))
                found.append(f"{words}: {was}, now {now}")
        for name, words in (("pieces", "source"), ("side_pieces", "side-information")):
            mine = {p.name: (p.rows, p.bytes) for p in getattr(self, name)}
            theirs = {p.name: (p.rows, p.bytes) for p in getattr(other, name)}
            for piece in sorted(mine.keys() | theirs.keys()):
                if mine.get(piece) != theirs.get(piece):
                    found.append(
                        f"{words} {piece!r}: (rows, bytes) {mine.get(piece, 'none')}, now {theirs.get(piece, 'none')}"
                    )
        return found

    def _moved(self, other: Job) -> list[str]:
        """Which URLs are of another place, and by which kind of part; under two keys nothing can be told."""
        found = []
        for name in ("source_parts", "side_parts", "destination_parts") if self.url_key == other.url_key else ():
            kinds = differing_parts(getattr(self, name), getattr(other, name))
            if kinds:
                what = next(f.metadata["words"] for f in self._later() if f.name == name)
                found.append(
                    f"{what}: a URL with another {' and '.join(kinds)} than it was begun with (only a renewed "
                    "signature or another password means the same place)"
                )
        return found

    def to_json(self) -> bytes:
        values = asdict(self) | {"old_space": self.old_space.to_dict(), "new_space": self.new_space.to_dict()}
        for unused in (f.name for f in self._later() if getattr(self, f.name) == f.default):
            del values[unused]
        body = sealed({"job": JOB_VERSION, "fingerprint": self.fingerprint, **values})
        if len(body) > JOB_BYTES:
            raise BackfillError(
                f"source: {len(self.pieces):,} files are more than one job can name ({JOB_BYTES >> 20} MB of names and "
                "row groups): join files, or map the folders one by one"
            )
        return body

    @staticmethod
    def has_checksum(data: bytes) -> bool:
        """Whether a job that was read carries one: those of version 0.1 do not."""
        body = parse(data, JOB_BYTES)
        return isinstance(body, dict) and SEAL in body

    @classmethod
    def from_json(cls, data: bytes, context: str) -> Job:
        """The job as it was kept. Raises BackfillError, naming the file, for all that could not have been written."""
        try:
            body = unsealed(parse(data, JOB_BYTES))
            if body.pop("job", None) != JOB_VERSION:
                raise SchemaError("another version of fct wrote it")
            fingerprint = text(64, "[0-9a-f]{64}")(body.pop("fingerprint", None), "fingerprint")
            later = {f.name: f.metadata["check"] for f in cls._later()}
            job = record(cls, tuple(later), **_OF_0_1, **later)(body, "")
            job.require_sound()
            if not cls.has_checksum(data) and (more := [name for name in later if name in body]):
                raise SchemaError(f"it has lost its checksum: version 0.1 wrote none, and no {more[0]} either")
            if job.fingerprint != fingerprint:
                raise SchemaError("its fingerprint does not match its content")
        except (SchemaError, BackfillError, MemoryError, RecursionError) as error:
            raise BackfillError(
                f"destination: {context} is not a job that can be continued: {error}. Restore the file from a copy, or "
                "start over in another destination"
            ) from error
        return job._without_secrets()

    def _without_secrets(self) -> Job:
        """This job as it would be begun today: names and URLs of older ones may hold passwords and signatures."""

        def cleaned(pieces: tuple[Piece, ...], url: str) -> tuple[Piece, ...]:
            return tuple(replace(p, name=redacted(p.name)) for p in pieces) if "://" in url else pieces

        clean = replace(
            self,
            pieces=cleaned(self.pieces, self.source),
            side_pieces=cleaned(self.side_pieces, self.side),
            source=redacted(self.source),
            destination=redacted(self.destination),
            side=redacted(self.side),
        )
        if clean.fingerprint == self.fingerprint:
            return clean
        return replace(clean, begun_as=self.fingerprint)


_PIECE = record(
    Piece,
    ("groups",),
    name=text(4096),
    rows=whole(0, _ROWS),
    bytes=whole(-1, 1 << 63),
    stamp=text(4096),
    groups=listed(whole(0, _ROWS), 1 << 24),
)
_SPACE = record(
    EmbeddingSpace,
    ("metric", "normalised", "mapped_length"),
    model_id=text(4096),
    dim=whole(1, 1 << 24),
    metric=one_of(METRICS),
    normalised=flag,
    mapped_length=number(1e-6, 1e6),
)
_OF_0_1: dict[str, Check] = {
    "source": _URL,
    "destination": _URL,
    "format": _WORD,
    "pieces": listed(_PIECE, 1 << 22),
    "vector": _NAME,
    "id_column": _NAME,
    "side": _URL,
    "side_pieces": listed(_PIECE, 1 << 22),
    "side_vector": _NAME,
    "side_column": _NAME,
    "keep_side": flag,
    "transformation": text(200),
    "old_space": _SPACE,
    "new_space": _SPACE,
    "precision": _WORD,
    "backend": _WORD,
    "dtype": one_of(("float32", "float16")),
    "vector_format": one_of(VECTOR_FORMATS),
    "binary_dtype": one_of(("float32", "float16")),
    "scale": number(0.0, 1e300),
    "shard_rows": whole(1, _ROWS),
    "batch_rows": whole(1, 1 << 40),
}
