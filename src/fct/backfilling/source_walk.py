"""SourceWalk: a source's rows shard by shard, by a second reader, held against what the markers say was mapped."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fct.artifact.transformation import Transformation
from fct.backfilling.compare_columns import compare_columns
from fct.backfilling.in_database import in_one_spelling, is_json
from fct.backfilling.input_digest import InputDigest
from fct.backfilling.job import Job
from fct.backfilling.journal import Journal, rejected_rows, shard_marker
from fct.backfilling.row_mapper import RowMapper
from fct.backfilling.row_multiset import RowMultiset
from fct.backfilling.row_reader import BATCH_ROWS, RowReader
from fct.backfilling.second_databases import DatabaseReader
from fct.errors import FctError
from fct.gallery.interfaces import Shard, Source
from fct.gallery.matrix_files import ROW
from fct.gallery.schemas import conform
from fct.types import Id

__all__ = ["SourceWalk"]

_SAID = 20


class SourceWalk:
    """Iterates over the rows that were not rejected, with all their columns and their number in the column ``row``
    where the source has none of that name.

    h: makes the checksums of what was mapped comparable; None: they are not compared. side: what reads the
    side-information, and it.
    seen: where set, gets every row that was read. problems, proven: what the checksums said, and of how many rows.
    """

    def __init__(
        self,
        journal: Journal,
        job: Job,
        source: Source,
        reader: RowReader,
        h: Transformation | None,
        side: tuple[RowReader, Source] | None,
    ) -> None:
        self.journal, self.job, self.source, self.reader, self.side = journal, job, source, reader, side
        self.schema = source.schema
        self._mapper = None if h is None else RowMapper(job, self.schema, h, threads=1, device="cpu")
        self.seen: RowMultiset | None = None
        self.problems: list[str] = []
        self.proven = 0
        self._lost: pa.Array | None = None

    def lose(self, reader: DatabaseReader) -> set[Id]:
        """Leaves out the rows of a database that are gone and were not rejected; returns their ids."""
        kept: set[Id] = set()
        kind = self.schema.field(self.job.id_column).type
        for shard in self.job.shards:
            ids = reader.ids(self.job.pieces[shard.piece].name).slice(shard.start, shard.rows).to_pylist()
            out = {row - shard.first for row in rejected_rows(self.journal, shard)}
            kept |= {value for i, value in enumerate(ids) if value in reader.gone and i not in out}
        self._lost = pa.array(sorted(kept, key=str), kind) if kept else None
        return kept

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        piece, rows = -1, _Rows(iter(()), "", "")
        side = self._side()
        for shard in self.job.shards:
            if shard.piece != piece:
                self._ended(rows)
                piece, name = shard.piece, self.job.pieces[shard.piece].name
                rows = _Rows(self._read(name), name, self.reader.by)
            yield from self._shard(shard, rows, side)
        self._ended(rows)

    def _read(self, name: str) -> Iterator[pa.RecordBatch]:
        return (conform(batch, self.schema) for batch in self.reader.read(name, self.schema.names))

    def _ended(self, rows: _Rows) -> None:
        if rows.more():
            self.problems.append(f"{rows.name} has more rows by {self.reader.by} than were read")

    def _shard(self, shard: Shard, rows: _Rows, side: _Rows | None) -> Iterator[pa.RecordBatch]:
        marker = shard_marker(self.journal, shard.number)
        digest = InputDigest(marker.digest) if self._mapper is not None and marker.digest > 1 else None
        gone, at = np.asarray(rejected_rows(self.journal, shard), np.int64) - shard.first, 0
        for batch in rows.take(shard.rows):
            beside = None if side is None else side.exactly(batch.num_rows)
            if self.seen is not None:
                self.seen.add(batch)
            if digest is not None and self._mapper is not None:
                self._mapper.digest(batch, beside, digest)
            keep = np.ones(batch.num_rows, bool)
            keep[gone[(gone >= at) & (gone < at + batch.num_rows)] - at] = False
            if self._lost is not None:
                ids = batch.column(self.job.id_column)
                lost = pa.compute.is_in(ids, value_set=self._lost).to_numpy(zero_copy_only=False)
                keep &= ~lost
                digest = None if lost.any() else digest
            yield self._numbered(batch, shard.first + at, keep)
            at += batch.num_rows
        if digest is not None and digest.hexdigest() == marker.input:
            self.proven += shard.rows
        elif digest is not None and len(self.problems) < _SAID:
            self._explain(shard, marker.input)

    def _numbered(self, batch: pa.RecordBatch, first: int, keep: npt.NDArray[np.bool_]) -> pa.RecordBatch:
        if ROW not in batch.schema.names:
            batch = batch.append_column(ROW, pa.array(np.arange(first, first + batch.num_rows)))
        return batch if keep.all() else batch.filter(pa.array(keep))

    def _side(self) -> _Rows | None:
        if self.side is None:
            return None
        reader, schema = self.side[0], self.side[1].schema
        names = [piece.name for piece in self.job.side_pieces if piece.rows]
        batches = (conform(b, schema) for name in names for b in reader.read(name, schema.names))
        return _Rows(batches, "the side-information", reader.by)

    # ---- where a checksum differs ----
    def _explain(self, shard: Shard, marked: str) -> None:
        """Says in what the second reader and fct's own differ; nothing where only the spelling of JSON does."""
        piece, names = self.job.pieces[shard.piece], self.schema.names
        now = {p.name: p for p in self.source.pieces()}[piece.name]
        own = list(self.source.read(now, shard.start, shard.rows, BATCH_ROWS))
        rows = _Rows(self._read(piece.name), piece.name, self.reader.by)
        for _ in rows.take(shard.start):
            continue
        texts = [field.name for field in self.schema if is_json(field)]
        found = compare_columns(
            in_one_spelling(rows.take(shard.rows), texts), in_one_spelling(iter(own), texts), names
        )  # fmt: skip
        where = f"shard {shard.number} (rows {shard.first} to {shard.first + shard.rows - 1} of the source)"
        if found.problems:
            said = found.problems[0].replace(" in the source,", f" by {self.reader.by},").replace(" here", " by fct")
            self.problems.append(f"{where}: fct reads other rows than {self.reader.by}: {said}")
            return
        digest = InputDigest()
        assert self._mapper is not None
        side = None if self.side is None else self._side()
        if side is not None:
            for _ in side.take(shard.first):
                continue
        for batch in own:
            self._mapper.digest(batch, None if side is None else side.exactly(batch.num_rows), digest)
        if digest.hexdigest() == marked:
            self.proven += shard.rows
        else:
            self.problems.append(f"{where} was made of other rows than {self.reader.by} reads in the source now")


class _Rows:
    """A stream of batches of which as many rows are taken at a time as are wanted."""

    def __init__(self, batches: Iterator[pa.RecordBatch], name: str, by: str) -> None:
        self.name, self._by = name, by
        self._batches, self._left = batches, None

    def _next(self) -> pa.RecordBatch | None:
        left, self._left = self._left, None
        return left if left is not None else next((b for b in self._batches if b.num_rows), None)

    def take(self, rows: int) -> Iterator[pa.RecordBatch]:
        """The next ``rows`` rows. Raises FctError where there are not so many."""
        while rows:
            batch = self._next()
            if batch is None:
                raise FctError(f"{self.name} ended {rows:,} rows early by {self._by}")
            if batch.num_rows > rows:
                self._left = batch.slice(rows)
                batch = batch.slice(0, rows)
            rows -= batch.num_rows
            yield batch

    def exactly(self, rows: int) -> pa.RecordBatch:
        """The next ``rows`` rows in one batch."""
        return pa.concat_batches(list(self.take(rows)))

    def more(self) -> bool:
        """Whether there are further rows."""
        self._left = self._next()
        return self._left is not None
