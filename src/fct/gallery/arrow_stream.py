"""Arrow streams from Python as a gallery: a pyarrow dataset or table, or a function that makes the stream anew.

A backfill reads its rows more than once: to plan, to map, to go on after a kill, to verify. Each reading must give the
same rows in the same order, which no stream promises. So the first reading takes a checksum of every block of rows, and
no later reading hands on a block that differs.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Generator

import pyarrow as pa
import pyarrow.dataset as ds

from fct.atomic_files import new_checksum
from fct.errors import FctError
from fct.gallery.arrow_guard import validated
from fct.gallery.column_checksum import ColumnChecksum
from fct.gallery.interfaces import Batches, Piece, Source
from fct.gallery.schemas import conform, readable
from fct.gallery.space_tags import space_of_schema
from fct.spaces import EmbeddingSpace
from fct.types import JsonDict

__all__ = ["ArrowStreamSource", "arrow_stream"]

_BLOCK_ROWS = 4096  # of one checksum, and the most rows that a reading holds
_IDLE = 4  # readings kept for the next shard


def arrow_stream(location: object, name: str = "source") -> ArrowStreamSource | None:
    """The gallery that an object of Python stands for, or None where it is no Arrow stream.

    location: a ``pyarrow.dataset.Dataset``, a ``pyarrow.Table``, or a function without arguments that returns a
        ``pyarrow.RecordBatchReader`` or anything with ``__arrow_c_stream__``, a new one each time.

    Raises:
        FctError: a stream that can be read once only.
    """
    if isinstance(location, ds.Dataset):
        return ArrowStreamSource(lambda: location.scanner().to_reader(), type(location).__name__, name)
    if isinstance(location, pa.Table):
        return ArrowStreamSource(location.to_reader, type(location).__name__, name)
    if hasattr(location, "__arrow_c_stream__"):
        raise FctError(
            f"{name}: a {type(location).__name__} may be read once only, and a backfill reads its rows again; pass a "
            "function that makes a new one, such as lambda: connection.cursor().sql(query)"
        )
    if callable(location) and not isinstance(location, type):
        return ArrowStreamSource(location, getattr(location, "__qualname__", type(location).__name__), name)
    return None


class ArrowStreamSource(Source):
    """One piece, named after the checksum of its rows. A shard in the middle is reached by reading from the start.

    make: called for each reading. label: names the stream in messages. argument: as which it was given.
    """

    kind = "stream"

    def __init__(self, make: Callable[[], object], label: str, argument: str = "source") -> None:
        self._make, self._label, self._argument = make, label, argument
        self._lock = threading.Lock()
        self._schema: pa.Schema | None = None
        self._piece: Piece | None = None
        self._sums: list[str] = []
        self._idle: list[_Reading] = []
        self._again = False  # whether it was read before

    def __getstate__(self) -> JsonDict:
        return {**self.__dict__, "_lock": None, "_idle": []}

    def __setstate__(self, state: JsonDict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def url(self) -> str:
        return f"arrow-stream:{self._label}"

    @property
    def schema(self) -> pa.Schema:
        if self._schema is None:
            reader = self.open()
            self._schema = readable(reader.schema)
            reader.close()
        return self._schema

    @property
    def space(self) -> EmbeddingSpace | None:
        return space_of_schema(self.schema, self.url)

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            f"{self._argument}: an Arrow stream, read once to plan; each later reading is held against its checksums",
        )

    def refresh(self) -> None:
        self._piece, self._again = None, True
        self._close_idle()

    def _close_idle(self) -> bool:
        """Whether there were readings that nobody goes on with; they are closed."""
        idle, self._idle = self._idle, []
        for reading in idle:
            reading.close()
        return bool(idle)

    def open(self) -> pa.RecordBatchReader:
        """A new reader of the stream."""
        try:
            return self._open()
        except Exception as error:
            if self._close_idle() and not isinstance(
                error, FctError
            ):  # a connection that has one result open at a time
                return self.open()
            if isinstance(error, (FctError, pa.ArrowException)):
                raise
            raise FctError(
                f"{self._argument}: {self.url} cannot be read: {error}; a backfill has several readings open at "
                "a time: give each a connection of its own, such as lambda: connection.cursor().sql(query)"
            ) from error

    def _open(self) -> pa.RecordBatchReader:
        made = self._make()
        if isinstance(made, pa.RecordBatchReader):
            return made
        if not hasattr(made, "__arrow_c_stream__"):
            raise FctError(
                f"{self._argument}: expected {self._label} to return a pyarrow.RecordBatchReader or an object with "
                f"__arrow_c_stream__, got {type(made).__name__}"
            )
        return pa.RecordBatchReader.from_stream(made)

    def blocks(self) -> Generator[pa.RecordBatch, None, None]:
        """The rows of a new reading in blocks of one size, the last one shorter."""
        reader = self.open()
        try:
            if not readable(reader.schema).equals(self.schema):
                raise FctError(f"{self._argument}: {self.url} has other columns at another reading")
            held: list[pa.RecordBatch] = []
            count = 0
            for batch in reader:
                batch = conform(validated(batch, self.url), self.schema)
                while batch.num_rows:
                    held.append(batch.slice(0, _BLOCK_ROWS - count))
                    batch = batch.slice(held[-1].num_rows)
                    count += held[-1].num_rows
                    if count == _BLOCK_ROWS:
                        yield pa.concat_batches(held)
                        held, count = [], 0
            if held:
                yield pa.concat_batches(held)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise FctError(f"{self._argument}: {self.url} cannot be read: {error}") from error
        finally:
            reader.close()

    def pieces(self) -> list[Piece]:
        if self._piece is None:
            sums, rows, size = [], 0, 0
            for block in self.blocks():
                sums.append(checksum(block))
                rows += block.num_rows
            whole = hashlib.sha256("".join([str(self.schema), *sums]).encode()).hexdigest()[:32]
            self._sums, self._piece = sums, Piece(f"rows-{whole}", rows, size, whole)
            if rows and not self._again:  # what can be read once only is found now, and not by the first shard
                self._idle.append(_Reading(self))
                self._idle[-1].advance()
        return [self._piece]

    def same(self, number: int, block: pa.RecordBatch | None) -> bool:
        """Whether a block, or the end of the stream, is what the first reading had there."""
        if block is None or number >= len(self._sums):
            return block is None and number == len(self._sums)
        return checksum(block) == self._sums[number]

    def differs(self, number: int) -> FctError:
        return FctError(
            f"{self._argument}: {self.url} has other rows at another reading, from row {number * _BLOCK_ROWS} on; a "
            "backfill needs the same rows in the same order: make a new stream at each call, sort it (ORDER BY id), or "
            "write it to Parquet first"
        )

    def read(self, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches:
        if self.pieces()[0].name != piece.name:
            raise FctError(f"{self._argument}: {self.url} no longer has the {piece.rows} rows that were planned")
        reading, end = self._take(start), start + rows
        while start < end:
            block, first = reading.at(start)
            part = block.slice(start - first, min(end, first + block.num_rows) - start)
            for i in range(0, part.num_rows, batch_rows):
                yield part.slice(i, batch_rows)
            start += part.num_rows
        with self._lock:
            self._idle = [*self._idle, reading][-_IDLE:]

    def _take(self, start: int) -> _Reading:
        """The idle reading that is nearest before a row, or a new one."""
        with self._lock:
            behind = [r for r in self._idle if r.first <= start]
            if behind:
                nearest = max(behind, key=lambda r: r.first)
                self._idle = [r for r in self._idle if r is not nearest]
                return nearest
        return _Reading(self)


class _Reading:
    """One reading of the stream and the block it stands at, which is held against the first reading's checksum."""

    def __init__(self, source: ArrowStreamSource) -> None:
        self._source, self._blocks = source, source.blocks()
        self._number, self._block = -1, None

    @property
    def first(self) -> int:
        """The number of the block's first row."""
        return max(0, self._number) * _BLOCK_ROWS

    def advance(self) -> pa.RecordBatch:
        """The next block. At the last one the stream has to end."""
        source, self._number = self._source, self._number + 1
        self._block = next(self._blocks, None)
        if self._block is None or not source.same(self._number, self._block):
            raise source.differs(self._number)
        if self._number + 1 == len(source._sums) and not source.same(self._number + 1, next(self._blocks, None)):
            raise source.differs(self._number + 1)
        return self._block

    def close(self) -> None:
        self._blocks.close()

    def at(self, row: int) -> tuple[pa.RecordBatch, int]:
        """(the block that holds a row, the number of its first row)."""
        block = self._block
        while block is None or row >= self.first + block.num_rows:
            block = self.advance()
        return block, self.first


def checksum(block: pa.RecordBatch) -> str:
    """Of a block's values, however Arrow spells them."""
    found = []
    for column in block.columns:
        total = ColumnChecksum(new_checksum)
        total.update(column)
        found.append(total.hexdigest())
    return "".join(found)
