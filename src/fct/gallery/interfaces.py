"""The reader and the writer that a store implements; everything else in a backfill is built on these two.

Rows travel as Arrow record batches. A :class:`Source` is a list of immutable pieces (files, fragments, ranges of ids)
that can be read from any row on; a :class:`Destination` takes the batches of one shard at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from fct.spaces import EmbeddingSpace

__all__ = [
    "JOB_KEY",
    "TRUE_KEY",
    "VECTOR_KEY",
    "Batches",
    "Destination",
    "Output",
    "Piece",
    "Shard",
    "Source",
    "rows_at",
    "rows_at_once",
]

Batches = Iterator[pa.RecordBatch]
JOB_KEY = b"fct.job"  # schema metadata: the fingerprint of the backfill that wrote it
_BATCH_BYTES = 32 << 20
TRUE_KEY = b"fct.true"  # field metadata: the column says which rows are the new model's own
VECTOR_KEY = b"fct.vector"  # schema metadata: the name of the column that holds the vectors


@dataclass(frozen=True, slots=True)
class Piece:
    """An immutable run of rows: a file, a fragment.

    name: unique in its source. rows: how many. bytes, stamp: what tells this content from another without reading it
    (size; mtime in ns, etag or version). groups: rows of each block that is best read whole (row groups), or ().
    """

    name: str
    rows: int
    bytes: int
    stamp: str
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of a backfill: rows ``[start, start + rows)`` of one piece.

    number: its place in the job. piece: the piece's place in the source. first: number of its first row in the whole
    gallery.
    """

    number: int
    piece: int
    start: int
    rows: int
    first: int

    @property
    def name(self) -> str:
        return f"part-{self.number:08d}"


class Source(ABC):
    """Where stored rows come from. Implementations are picklable, so that Ray workers can open them too."""

    kind: ClassVar[str]
    transient: ClassVar[bool] = False  # whether :meth:`read` may fail for a while and is worth another try from outside

    @property
    @abstractmethod
    def url(self) -> str:
        """Names the store, for messages and for the manifest."""

    @property
    @abstractmethod
    def schema(self) -> pa.Schema:
        """Columns of every batch that :meth:`read` yields."""

    @property
    def space(self) -> EmbeddingSpace | None:
        """Which model's vectors these are, where the store says so."""
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever reads a plan should know: what is read otherwise than it is stored."""
        return ()

    def row_bytes(self, piece: Piece) -> float | None:
        """About how many bytes a row of the piece takes in memory, where its files say so before they are read."""
        return None

    def refresh(self) -> None:  # noqa: B027 (a dataset of one version has nothing to do)
        """Looks again at which pieces there are, for the next :meth:`pieces`."""

    def settle(self) -> None:  # noqa: B027 (files say themselves what is in them)
        """Called when a run begins, its journal held: what the pieces are is written down now."""

    @abstractmethod
    def pieces(self) -> Sequence[Piece]:
        """Every piece, in the gallery's order, as it is now."""

    @abstractmethod
    def read(self, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches:
        """Rows ``[start, start + rows)`` of ``piece``, in order, in batches of at most ``batch_rows``."""


@dataclass(frozen=True, slots=True)
class Output:
    """A file that a shard left: its name in the destination, size and XXH64."""

    name: str
    bytes: int
    xxh64: str


class Destination(ABC):
    """Where mapped rows go. Picklable."""

    kind: ClassVar[str]
    columns: ClassVar[bool] = True  # whether columns beside the vector have a place in the file itself
    shared: ClassVar[bool] = False  # whether rows of others may stand there: it appends, or makes a new version

    @property
    @abstractmethod
    def url(self) -> str: ...

    def begin(self, schema: pa.Schema, space: EmbeddingSpace) -> None:  # noqa: B027 (most have nothing to do)
        """Called once, before the first shard of a run: say what cannot be stored, make what must exist."""

    @abstractmethod
    def write(self, shard: Shard, batches: Batches, scratch: Path) -> tuple[Mapping[str, Path], object]:
        """Stores one shard; writing the same shard twice must leave the same as writing it once.

        Args:
            shard: which rows of the source these are (fewer where some were rejected).
            batches: its rows; the schema is :meth:`begin`'s, whose metadata names the vector column (VECTOR_KEY).
            scratch: a local folder for files in the making.

        Returns:
            Finished local files to be published under these names (none for a store with a protocol of its own), and
            anything JSON can hold that :meth:`finish` needs.
        """

    def after(self, space: EmbeddingSpace) -> list[str]:
        """What is left to the owner when all is done, a line each: an index to build, an alias to switch."""
        return []

    def finish(self, extras: Sequence[object], schema: pa.Schema, space: EmbeddingSpace) -> None:  # noqa: B027
        """Called once, when every shard is done, with what :meth:`write` returned for each, in order.

        May be called again after a crash, and must then leave the same.
        """


def rows_at_once(source: Source, piece: Piece, most: int) -> int:
    """How many rows of a piece to ask for at a time: ``most``, fewer where they are known to take over 32 MB."""
    return max(1, min(most, int(_BATCH_BYTES / (source.row_bytes(piece) or 1.0))))


def rows_at(source: Source, pieces: Sequence[Piece], first: int, rows: int) -> Batches:
    """Rows ``[first, first + rows)`` counted through all pieces."""
    for piece in pieces:
        if rows and first < piece.rows:
            take = min(rows, piece.rows - first)
            yield from source.read(piece, first, take, take)
            first, rows = 0, rows - take
        else:
            first -= piece.rows
