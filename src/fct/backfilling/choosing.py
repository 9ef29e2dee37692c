"""Choosing the rows that get true vectors: every order is a score for each row, the highest first, and rows of one
score go by lot.

What came behind the rows that a choice covers (a gallery that is followed) is chosen from on its own, with the same
share. A choice holds 17 bytes a row in memory while it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fct.backfilling.backfill_bar import Bar, backfill_bar
from fct.backfilling.job import Job
from fct.backfilling.resolve import Context
from fct.backfilling.row_choice import FOLDER, RowChoice, keep_choice, kept_choice
from fct.backfilling.row_mapper import RowMapper
from fct.backfilling.true_source import TruePairs, row_ids
from fct.errors import BackfillError
from fct.gallery.interfaces import Shard
from fct.gallery.vectors import vector_block

__all__ = ["choose_rows", "expected_choice"]

Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float64]


def choose_rows(context: Context, job: Job, bar: Bar) -> RowChoice:
    """The job's choice: as it is kept, or made now for the rows that none covers, and kept.

    Raises:
        BackfillError: shards are done and the choice that they were made with is gone. ValueError: an order that the
        gallery cannot be brought into.
    """
    kept = kept_choice(context.journal, job)
    if kept.covered == job.rows:
        return kept
    shards = [shard for shard in job.shards if shard.first >= kept.covered]
    done = set(context.journal.marked())
    if any(shard.number in done for shard in shards):
        raise BackfillError(
            f"destination: {context.journal.root / FOLDER} lacks the choice of rows that shards were made with: "
            "restore it from a copy, or start over in another destination"
        )
    chosen = _Chooser(context, job, bar).choose(shards, job.rows - kept.covered)
    return keep_choice(context.journal, job, kept, chosen)


def expected_choice(context: Context) -> Mask:
    """(rows,) which rows of the gallery a partial backfill will choose, or has chosen; nothing is written."""
    job, kept = context.job, kept_choice(context.journal, context.job)
    if kept.covered == job.rows:
        return kept.mask(0, job.rows)
    with backfill_bar(False) as bar:
        shards = [shard for shard in job.shards if shard.first >= kept.covered]
        behind = _Chooser(context, job, bar).choose(shards, job.rows - kept.covered)
    return np.concatenate([kept.mask(0, kept.covered), behind])


class _Chooser:
    def __init__(self, context: Context, job: Job, bar: Bar) -> None:
        assert context.reembedding is not None
        self.found, self.job, self.bar, self.how = context, job, bar, context.reembedding

    def choose(self, shards: list[Shard], rows: int) -> Mask:
        """(rows,) of the rows of ``shards``, which are consecutive."""
        how, first = self.how, shards[0].first
        most = round(how.budget * rows)
        chosen = np.zeros(rows, bool)
        if most == 0:
            return chosen
        if how.pairs is None and most == rows:
            return ~chosen
        reads = how.pairs is not None or how.order != "random"
        scores, able = np.zeros(rows), np.ones(rows, bool)
        score = self._score() if reads else None
        seen: set[int] = set()
        for number in self.bar.track([shard.number for shard in shards], "choosing rows to re-embed"):
            shard = self.job.shards[number]
            at = shard.first - first
            if score is None:
                continue
            for batch, side in self.found.reader(self.job).batches(shard):
                here = slice(at, at + batch.num_rows)
                scores[here] = score(batch, side, first + at)
                if how.pairs is not None:
                    places = how.pairs.places(row_ids(batch, self.job.id_column, first + at))
                    able[here] = places >= 0
                    seen.update(places[places >= 0].tolist())
                at += batch.num_rows
        if how.pairs is not None:
            self._tell_unknown(how.pairs, seen)
        lot = np.random.default_rng([how.seed, first]).random(rows)
        chosen[_highest(scores, lot, able, most)] = True
        return chosen

    def _tell_unknown(self, pairs: TruePairs, seen: set[int]) -> None:
        unknown = pairs.unknown(seen)
        self.how.unknown = len(unknown)
        self.how.unknown_ids = tuple(pairs.named(unknown[:3]))

    def _score(self) -> Callable[[pa.RecordBatch, pa.RecordBatch | None, int], Scores]:
        how, job = self.how, self.job
        if how.order == "random":
            return lambda batch, side, first: np.zeros(batch.num_rows)
        if how.order == "access":
            counts = how.counts
            assert counts is not None
            return lambda batch, side, first: counts.of(row_ids(batch, job.id_column, first))
        if how.order == "variance":
            return self._variance()
        return lambda batch, side, first: _numbers(batch.column(how.order))

    def _variance(self) -> Callable[[pa.RecordBatch, pa.RecordBatch | None, int], Scores]:
        """1 - |h|^2 before h's output is brought to unit length: what a mean of unit vectors lacks in length is their
        variance."""
        h = self.found.h
        raw = h.with_(normalise=False, length=1.0)
        job = replace(self.job, dtype="float32", vector_format="fixed_size_list", true_column="", reembed="")
        mapper = RowMapper(job, self.found.source.schema, raw, threads=None, device=self.found.device)

        def score(batch: pa.RecordBatch, side: pa.RecordBatch | None, first: int) -> Scores:
            mapped, rejects = mapper(batch, side, first)
            out, good = np.full(batch.num_rows, -np.inf), np.ones(batch.num_rows, bool)
            good[[reject["row"] - first for reject in rejects]] = False
            values = vector_block(mapped.column(job.vector), h.d_new, "float32").values.astype(np.float64)
            out[good] = 1 - (values**2).sum(axis=1)
            return out

        return score


def _numbers(column: pa.Array) -> Scores:
    """A column as scores; rows without a number come last."""
    values: Scores = np.asarray(pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False), np.float64)
    return np.where(np.isnan(values), -np.inf, values)


def _highest(scores: Scores, lot: Scores, able: Mask, most: int) -> npt.NDArray[np.int64]:
    """Numbers of the ``most`` able rows of the highest score, by lot among those of one score."""
    rows = np.flatnonzero(able)
    if len(rows) <= most:
        return rows
    values = scores[rows]
    least = np.partition(values, len(rows) - most)[len(rows) - most]
    above, ties = rows[values > least], rows[values == least]
    drawn = ties[np.argsort(lot[ties], kind="stable")[: most - len(above)]]
    return np.concatenate([above, drawn])
