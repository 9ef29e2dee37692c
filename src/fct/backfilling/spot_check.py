"""Vectors of a new gallery against the float64 reference: rows that are chosen by chance, or all of them. How far they
may be off is calculated from the roundings of the job's own precision, not chosen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from fct import ref
from fct.artifact.transformation import Transformation
from fct.backfilling.coding import decoded
from fct.backfilling.in_database import DatabaseResult
from fct.backfilling.job import Job
from fct.backfilling.journal import Journal, rejected_rows, shard_marker
from fct.backfilling.row_mapper import RowMapper
from fct.backfilling.true_check import TrueCheck
from fct.backfilling.true_source import TruePairs
from fct.gallery.interfaces import Shard, Source, rows_at
from fct.gallery.vectors import VectorBlock, vector_block
from fct.ops.numerics.rounding import SIGMAS, rounding_variance
from fct.progress import Report
from fct.types import Array

__all__ = ["VectorCheck", "VectorChecker"]

_SHARDS, _BLOCK_ROWS = 64, 1024
_HALF_STEP = 2.0**-24  # of float16 near zero
Rows: TypeAlias = Array


@dataclass
class VectorCheck:
    """rows: compared with h. worst: largest error of a row, relative to its length. true_rows: compared with their true
    vectors; unchecked: true rows without any to compare with. problems: each in a sentence."""

    rows: int = 0
    worst: float = 0.0
    true_rows: int = 0
    unchecked: int = 0
    problems: list[str] = field(default_factory=list)


class VectorChecker:
    """Maps rows again by the float64 reference and compares; true rows are compared with their pairs, or with what the
    journal keeps of them."""

    def __init__(
        self,
        journal: Journal,
        job: Job,
        old: Source,
        side: Source | None,
        new: Source | DatabaseResult,
        h: Transformation,
        pairs: TruePairs | None = None,
    ) -> None:
        self.journal, self.job, self.old, self.side, self.new, self.h = journal, job, old, side, new, h
        plain = replace(job, precision="fp32", backend="ref", dtype="float32")
        self.mapper = RowMapper(plain, old.schema, h, threads=None, device="cpu")
        self.pieces = new.pieces() if isinstance(new, Source) else []
        self.now = {piece.name: piece for piece in old.pieces()}
        counts = [shard_marker(journal, n).rows_out for n in range(len(job.shards))]
        self.starts = np.cumsum([0, *counts])
        self.found = VectorCheck()
        self.true = TrueCheck(journal, job, pairs) if job.true_column else None

    def check(self, shard: Shard, start: int, rows: int) -> None:
        """Rows ``[start, start + rows)`` of a shard."""
        job, number = self.job, shard.number
        piece = self.now[job.pieces[shard.piece].name]
        batch = pa.concat_batches(list(self.old.read(piece, shard.start + start, rows, rows)))
        beside = None
        if self.side is not None:
            beside = pa.concat_batches(list(rows_at(self.side, job.side_pieces, shard.first + start, rows)))
        first = shard.first + start
        _, rejects = self.mapper(batch, beside, first)
        gone = rejected_rows(self.journal, shard)
        lost = {r["row"] for r in rejects} - {r for r in gone if first <= r < first + rows}
        if lost and isinstance(self.new, Source):  # a database may lose rows, on both sides
            self.found.problems.append(f"shard {number} holds rows that cannot be mapped as the source is now")
            return
        kept = np.setdiff1d(np.arange(first, first + rows), [*gone, *lost])
        if not len(kept):
            return
        at = int(self.starts[number]) + start - sum(row < first for row in gone)
        if isinstance(self.new, Source):
            stored = pa.concat_batches(list(rows_at(self.new, self.pieces, at, len(kept))))
            column = job.vector if job.vector in stored.schema.names else "vector"
        else:
            stored = self.new.vectors(batch.column(job.id_column).take(pa.array(kept - first)))
            column = self.new.vector
        got = vector_block(stored.column(column), self.h.d_new, job.dtype).values.astype(np.float64)
        if self.true is not None:
            true = self.true.flags(stored, shard, start - sum(row < first for row in gone), kept)
            if true.any():
                self.true.compare(got[true], kept[true], batch, first, shard)
            got, kept = got[~true], kept[~true]
        if not len(kept):
            return
        old, side = self._inputs(batch, beside, kept - first)
        self._judge(got, old, side, shard, kept)

    def _inputs(self, batch: pa.RecordBatch, beside: pa.RecordBatch | None, keep: Rows) -> tuple[Rows, Rows]:
        def picked(block: VectorBlock, values: Rows) -> Rows:
            rows = np.arange(batch.num_rows) if block.rows is None else block.rows
            return np.asarray(values[np.isin(rows, keep)], np.float64)

        first, second = self.mapper._blocks(batch, beside)
        old = picked(first, decoded(self.job, first, batch)[0])
        return old, old if second is None else picked(second, second.values)

    def _judge(self, got: Rows, old: Rows, side: Rows, shard: Shard, kept: Rows) -> None:
        job, found = self.job, self.found
        want = ref.transform(old, side, self.h)
        variance = rounding_variance(old, side, self.h, job.precision, job.backend)
        if job.dtype == "float16":
            step = np.maximum(np.abs(want) * 2.0**-10, _HALF_STEP)
            variance = variance + step**2 / 12
        off = np.abs(got - want) / np.maximum(np.sqrt(variance), 1e-30)
        lengths = np.maximum(np.linalg.norm(want, axis=1), 1e-12)
        relative = np.linalg.norm(got - want, axis=1) / lengths
        found.rows, found.worst = found.rows + len(got), max(found.worst, float(relative.max()))
        if not off.max() <= SIGMAS:
            row = int(off.max(axis=1).argmax())
            found.problems.append(
                f"shard {shard.number}: row {kept[row]} of the source is {relative[row]:.2g} of its length off the "
                f"reference, {off[row].max():.3g} standard deviations of what rounding to {job.precision} explains, "
                f"expected at most {SIGMAS:g}"
            )

    def run(self, count: int, *, seed: int, deep: bool, tell: Report | None = None) -> VectorCheck:
        """Looks at ``count`` rows, or with ``deep`` at all of them. tell: of the share done."""
        job, h = self.job, self.h
        try:
            rounding_variance(np.zeros((1, h.d_old)), np.zeros((1, h.d_side)), h, job.precision, job.backend)
        except KeyError:
            return VectorCheck(problems=[f"the job's precision {job.precision!r} is none that h can be checked at"])
        self._look(count, seed, deep, tell)
        if self.true is not None:
            self.found.problems[:0] = self.true.problems[:20]  # what explains an error comes before it
            self.found.true_rows, self.found.unchecked = self.true.checked, self.true.unchecked
        return self.found

    def _look(self, count: int, seed: int, deep: bool, tell: Report | None) -> None:
        """Has rows checked: all of them, or some from shards that are drawn by chance."""
        job = self.job
        if deep or count >= job.rows:
            for shard in job.shards:
                for start in range(0, shard.rows, _BLOCK_ROWS):
                    self.check(shard, start, min(_BLOCK_ROWS, shard.rows - start))
                    if tell is not None:
                        tell((shard.first + start) / job.rows)
                    if len(self.found.problems) >= 20:
                        return
            return
        rng = np.random.default_rng(seed)
        numbers = rng.choice(len(job.shards), min(_SHARDS, count, len(job.shards)), replace=False)
        each = -(-count // len(numbers))
        for i, number in enumerate(sorted(numbers.tolist())):
            if tell is not None:
                tell(i / len(numbers))
            shard = job.shards[number]
            for start in range(0, min(each, shard.rows), _BLOCK_ROWS):
                take = min(each - start, _BLOCK_ROWS, shard.rows)
                self.check(shard, int(rng.integers(0, shard.rows - take + 1)), take)
