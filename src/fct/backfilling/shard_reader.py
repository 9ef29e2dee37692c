"""ShardReader: a shard's rows in batches that are bounded in rows and in bytes, side-information beside them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from fct.backfilling.job import Job
from fct.errors import BackfillError, FctError
from fct.gallery.column_checksum import row_sizes
from fct.gallery.interfaces import Piece, Shard, Source
from fct.gallery.location import RetryPolicy
from fct.gallery.side_ids import columns_in_common, require_same_ids
from fct.gallery.vectors import rebatch

__all__ = ["BATCH_BYTES", "ShardReader", "bounded"]

BATCH_BYTES = 64 << 20  # what a batch of vectors takes at default settings
_MOST_BYTES = 64 << 20  # and with all other columns, whatever they hold
_FIRST_ROWS, _ROWS = 32, 8192  # read at once of columns that have no fixed width: until one batch was seen, and then


class ShardReader:
    """Reads the rows of a job's shards. Batches hold ``job.batch_rows`` rows, fewer where those would be too many
    bytes; where they are cut depends on the rows alone, so that a job that goes on writes the same files."""

    def __init__(
        self,
        job: Job,
        source: Source,
        side: Source | None,
        retry_policy: RetryPolicy | None = None,
    ) -> None:
        self.job, self.source, self.side, self.retry_policy = job, source, side, retry_policy or RetryPolicy()
        self._starts = np.cumsum([0] + [p.rows for p in job.side_pieces])
        self._widest: dict[int, float] = {}  # bytes of a row, the most that a batch of each source had
        self._stated: dict[tuple[int, str], float] = {}  # and what each piece says of itself

    def batches(self, shard: Shard, *, bound: bool = True) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch | None]]:
        """(rows, their side-information or None). bound: False for batches of exactly ``job.batch_rows``, which the
        checksums of version 0.1 depend on."""
        job = self.job
        rows = self.rows(self.source, job.pieces, shard.piece, shard.start, shard.rows)
        width = self._width(self.source.schema)
        cut = bounded(rows, job.batch_rows, width) if bound else rebatch(rows, job.batch_rows)
        if self.side is None:
            yield from ((batch, None) for batch in cut)
            return
        beside = _Cutter(self._side_rows(shard.first, shard.rows))
        first = shard.first
        for batch in cut:
            side = beside.take(batch.num_rows)
            self._check_ids(batch, side, first)
            first += batch.num_rows
            yield batch, side

    def head(self, shard: Shard, rows: int, most_bytes: float) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        """The shard's first rows at once, side-information beside them, for a look at what is there: ``rows`` of them,
        fewer where those would be more than ``most_bytes``, but one batch at least."""
        held: list[pa.RecordBatch] = []
        for batch in self.rows(self.source, self.job.pieces, shard.piece, shard.start, min(rows, shard.rows)):
            held.append(batch)
            most_bytes -= batch.nbytes
            if most_bytes <= 0:
                break
        batch = _joined(held)
        side = None if self.side is None else pa.concat_batches(list(self._side_rows(shard.first, batch.num_rows)))
        if side is not None:
            self._check_ids(batch, side, shard.first)
        return batch, side

    def _check_ids(self, batch: pa.RecordBatch, side: pa.RecordBatch, first: int) -> None:
        """Raises FctError where both sides have ids and these are not the same, row by row."""
        for mine, theirs in columns_in_common(batch.schema, side.schema, self.job.id_column):
            guessed = "" if self.job.id_column else mine
            require_same_ids(batch.column(mine), side.column(theirs), first, guessed)

    def _side_rows(self, first: int, rows: int) -> Iterator[pa.RecordBatch]:
        assert self.side is not None
        while rows:
            piece = int(np.searchsorted(self._starts, first, side="right")) - 1
            start = first - int(self._starts[piece])
            take = min(rows, self.job.side_pieces[piece].rows - start)
            yield from self.rows(self.side, self.job.side_pieces, piece, start, take)
            first, rows = first + take, rows - take

    def _width(self, schema: pa.Schema) -> int | None:
        """Bytes of a row where every row has the same, vectors taken as they should be; else None."""
        vectors = {name for name in (self.job.vector, self.job.side_column, self.job.side_vector) if name}
        return fixed_width(schema, vectors, self.job.old_space.dim)

    def _at_once(self, source: Source, piece: Piece, rows: int) -> int:
        """How many rows to ask a source for at once, so that what it decodes stays small whatever a row holds."""
        width = self._width(source.schema)
        if width is not None:
            return max(1, min(rows, self.job.batch_rows, int(_MOST_BYTES // width)))
        key = (id(source), piece.name)
        if key not in self._stated:
            self._stated[key] = source.row_bytes(piece) or 1.0
        seen = self._widest.get(id(source))
        wide = max(seen or 1.0, self._stated[key])
        most = 1 << int(np.log2(max(1, min(_FIRST_ROWS if seen is None else _ROWS, _MOST_BYTES / 2 / wide))))
        return max(1, min(rows, self.job.batch_rows, most))

    def rows(
        self, source: Source, pieces: Sequence[Piece], piece: int, start: int, rows: int
    ) -> Iterator[pa.RecordBatch]:
        """The rows, going on where it broke off after an error that may pass."""
        done = 0
        batches: Iterator[pa.RecordBatch] | None = None

        def step() -> pa.RecordBatch | None:
            nonlocal batches
            batches = batches or source.read(
                pieces[piece], start + done, rows - done, self._at_once(source, pieces[piece], rows - done)
            )
            try:
                return next(batches, None)
            except BaseException:
                batches = None
                raise

        while done < rows:
            what = f"reading {source.url}"
            with plain_reading(source.url):
                batch = self.retry_policy.ask(step, what, moves=BATCH_BYTES) if source.transient else step()
            if batch is None:
                raise BackfillError(f"source: {pieces[piece].name} ended {rows - done} rows early")
            done += batch.num_rows
            yield batch
            if self._learn(source, batch):
                batches = None  # asked for anew, in batches of the size that these rows allow

    def _learn(self, source: Source, batch: pa.RecordBatch) -> bool:
        """Remembers how wide a source's rows are; True where it is to be asked for batches of another size."""
        seen, width = self._widest.get(id(source)), batch.nbytes / max(1, batch.num_rows)
        self._widest[id(source)] = max(seen or 1.0, width)
        if self._width(source.schema) is not None:
            return False
        return seen is None or (width > 2 * seen and batch.nbytes > _MOST_BYTES)


@contextmanager
def plain_reading(url: str) -> Iterator[None]:
    """Turns a system's error into a sentence: what could not be done, where, and what now."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FctError) or error.errno is None:
            raise
        raise BackfillError(
            f"source: reading {url} failed: {error}; what is done is kept, start again once this is put right"
        ) from error


def fixed_width(schema: pa.Schema, vectors: Collection[str], dim: int) -> int | None:
    """Bytes of a row of the schema where all have the same, else None. vectors: columns of about ``dim`` floats."""
    widths = [4 * dim if f.name in vectors and _of_any_length(f.type) else _width_of(f.type) for f in schema]
    return None if None in widths else max(1, sum(w for w in widths if w is not None))


def _of_any_length(kind: pa.DataType) -> bool:
    return _width_of(kind) is None


def _width_of(kind: pa.DataType) -> int | None:
    if pa.types.is_fixed_size_list(kind):
        inner = _width_of(kind.value_type)
        return None if inner is None else inner * int(kind.list_size)
    if pa.types.is_dictionary(kind):
        return _width_of(kind.index_type)
    if pa.types.is_struct(kind):
        inner_widths = [_width_of(kind.field(i).type) for i in range(kind.num_fields)]
        return None if None in inner_widths else sum(w for w in inner_widths if w is not None)
    if pa.types.is_fixed_size_binary(kind):
        return int(kind.byte_width)
    if pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return 1
    return int(kind.bit_width) // 8 if pa.types.is_primitive(kind) or pa.types.is_decimal(kind) else None


def bounded(batches: Iterator[pa.RecordBatch], rows: int, width: int | None) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of ``rows``, fewer where those would be more than 64 MB, but one at least.

    width: bytes of a row where all are alike, else None, and each row is measured: the cuts depend on the rows alone.
    """
    if width is not None:
        yield from rebatch(batches, max(1, min(rows, _MOST_BYTES // width)))
        return
    held: list[pa.RecordBatch] = []
    count = size = 0
    for batch in batches:
        ends, start = np.concatenate([[0], np.cumsum(row_sizes(batch))]), 0
        while start < batch.num_rows:
            fit = int(np.searchsorted(ends, ends[start] + _MOST_BYTES - size, side="right")) - 1 - start
            take = min(rows - count, fit) if count else max(1, min(rows, fit))
            if take:
                held.append(batch.slice(start, take))
                start, count, size = start + take, count + take, size + int(ends[start + take] - ends[start])
            if count == rows or start < batch.num_rows:
                yield _joined(held)
                held, count, size = [], 0, 0
    if held:
        yield _joined(held)


def _joined(held: list[pa.RecordBatch]) -> pa.RecordBatch:
    return held[0] if len(held) == 1 else pa.concat_batches(held)


class _Cutter:
    """Takes as many rows at a time as it is asked for, however they are cut."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self._left: pa.RecordBatch | None = None

    def take(self, rows: int) -> pa.RecordBatch:
        held: list[pa.RecordBatch] = []
        while rows:
            batch = self._left if self._left is not None else next(self._batches)
            self._left = batch.slice(rows) if batch.num_rows > rows else None
            held.append(batch.slice(0, rows))
            rows -= held[-1].num_rows
        return _joined(held)
