"""Partial backfill: some rows get the new model's own vectors, the others are mapped by h, and a column says which."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fct.artifact.transformation import Transformation
from fct.backfilling.job import ORDERS, Job
from fct.backfilling.journal import Journal
from fct.backfilling.row_choice import RowChoice
from fct.backfilling.true_source import (
    AccessCounts,
    Id,
    Reembed,
    TruePairs,
    ask_for_vectors,
    load_true_pairs,
    row_ids,
)
from fct.backfilling.true_vectors import TrueVectors
from fct.errors import BackfillError
from fct.gallery.interfaces import Piece, Shard
from fct.gallery.stores import Opening
from fct.gallery.vectors import vector_array, vector_block
from fct.mixed_gallery import MixedCorrection, correction_of, mixed_transformation
from fct.mixed_warning import warn_uncorrected
from fct.options.groups import PartialRows

__all__ = ["Reembedding", "TrueRows", "mixed_correction", "partial_job", "reembedding_of", "writes_mixed"]

Floats = npt.NDArray[np.float32]


@dataclass
class Reembedding:
    """Where true vectors come from, and the rule by which rows are chosen.

    pairs, ask: one of the two. unknown, unknown_ids: ids of the pairs that the gallery has not, counted as rows are
    chosen, and the first of them.
    """

    pairs: TruePairs | None
    ask: Reembed | None
    budget: float
    order: str
    seed: int
    ids_a_call: int
    payload: bool
    counts: AccessCounts | None
    column: str
    unknown: int = field(default=0, compare=False)
    unknown_ids: tuple[str, ...] = field(default=(), compare=False)

    @property
    def rule(self) -> str:
        """What decides which rows are chosen, as the job keeps it."""
        source = "pairs" if self.pairs is not None else "function"
        return f"{self.order}, budget {self.budget:g}, seed {self.seed}, from a {source}"


def mixed_correction(given: PartialRows, h: Transformation, mixed: bool) -> MixedCorrection | None:
    """The correction that rows are written with which stand among true ones, as they do in a partial backfill; None:
    as h makes them.

    Raises:
        ValueError: ``mixed``, and the artifact holds none, or none that h can write.

    Warns:
        FctWarning: rows are re-embedded, and the artifact holds no correction, or none that h can write.
    """
    if mixed:
        mixed_transformation(h)  # refuses what it can not write, before anything is opened
        return correction_of(h)
    if given.reembed is None or h.new_space.mapped_length != 1.0:
        return None
    try:
        how = correction_of(h)
    except ValueError:
        how = None
    if how is not None and how.kind == "length":
        return how
    warn_uncorrected(h, "reembed")
    return None


def writes_mixed(how: MixedCorrection | None, h: Transformation, rows: int, stored: Job | None) -> Transformation:
    """h as it writes the gallery's ``rows``; a job that goes on keeps its length, whatever was added since."""
    if how is None:
        return h
    if stored is not None and stored.new_space.mapped_length != 1.0 and h.new_space.mapped_length == 1.0:
        how = MixedCorrection("length", stored.new_space.mapped_length)
    return mixed_transformation(h, how, rows=max(1, rows))


def reembedding_of(
    given: PartialRows, h: Transformation, schema: pa.Schema, vector: str, id_column: str, access: Opening
) -> Reembedding | None:
    """The options of a partial backfill, opened and checked against the gallery; None for a whole one."""
    if given.reembed is None:
        for name, idle in (("budget", None), ("order", "random"), ("access_log", None), ("reembed_payload", False)):
            if getattr(given, name) != idle:
                raise ValueError(f"{name}: expected reembed beside it: where the true vectors come from")
        return None
    pairs = ask = None
    if callable(given.reembed):
        ask = given.reembed
        if given.budget is None:
            raise ValueError("budget: expected the share of rows to ask the function for, from 0 to 1, got None")
    else:
        kind = schema.field(id_column).type if id_column else None
        pairs = load_true_pairs(given.reembed, h.new_space, kind, access)
    if given.true_column in schema.names:
        raise ValueError(
            f"true_column: expected a name that the gallery has not, it has a column {given.true_column!r}: choose "
            "another"
        )
    return Reembedding(
        pairs=pairs,
        ask=ask,
        budget=1.0 if given.budget is None else given.budget,
        order=_order(given, h, schema, vector),
        seed=given.reembed_seed,
        ids_a_call=given.reembed_ids,
        payload=given.reembed_payload,
        counts=None if given.access_log is None else AccessCounts.load(given.access_log, access),
        column=given.true_column,
    )


def _order(given: PartialRows, h: Transformation, schema: pa.Schema, vector: str) -> str:
    order = given.order
    if (order == "access") != (given.access_log is not None):
        raise ValueError(
            "access_log: expected a table of ids and counts with order='access', and with no other, got "
            + ("none" if given.access_log is None else f"one with order={order!r}")
        )
    if order == "variance" and not (h.normalise or h.new_space.normalised):
        raise ValueError(
            f"order: 'variance' is 1 - |h|^2, which tells of unit-length embeddings alone, not of {h.new_space}"
        )
    if order in ORDERS:
        return order
    if order not in schema.names or order == vector:
        there = ", ".join(n for n in schema.names if n != vector)
        raise ValueError(f"order: expected {', '.join(ORDERS)} or a column of the gallery ({there}), got {order!r}")
    kind = schema.field(order).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"order: expected a column of numbers, the highest first, {order!r} is {kind}")
    return order


class TrueRows:
    """Puts true vectors in the place of mapped ones, in batches as they come from h."""

    def __init__(self, how: Reembedding, choice: RowChoice, journal: Journal, job: Job) -> None:
        self.how, self.choice, self.job = how, choice, job
        self.kept = TrueVectors(journal, job.new_space)
        self._failed: BackfillError | None = None

    def __call__(
        self, mapped: pa.RecordBatch, batch: pa.RecordBatch, rejected: list[int], shard: Shard, at: int
    ) -> tuple[pa.RecordBatch, int]:
        """(``mapped`` with the true vectors of its chosen rows, how many).

        Args:
            batch: what was mapped. rejected: numbers in the gallery of rows that are not in ``mapped``.
            at: the batch's first row, counted from the shard's.
        """
        job, first = self.job, shard.first + at
        kept = np.ones(batch.num_rows, bool)
        kept[np.asarray(rejected, np.int64) - first] = False
        rows = np.flatnonzero(self.choice.mask(first, batch.num_rows) & kept)
        if not len(rows):
            return mapped, 0
        vectors, there = self._vectors(batch, rows, shard, at)
        rows, vectors = rows[there], vectors[there]
        if not len(rows):
            return mapped, 0
        with np.errstate(over="ignore"):
            stored = vectors.astype(job.dtype)
        if not np.isfinite(stored).all():
            raise BackfillError(f"reembed: expected vectors that {job.dtype} can hold, got some beyond it")
        places = np.cumsum(kept)[rows] - 1
        out = np.array(vector_block(mapped.column(job.vector), job.new_space.dim, job.dtype).values)
        out[places] = stored
        flags = np.zeros(mapped.num_rows, bool)
        flags[places] = True
        columns = {job.vector: vector_array(out, job.vector_format), job.true_column: pa.array(flags)}
        arrays = [columns.get(name, mapped.column(name)) for name in mapped.schema.names]
        return pa.RecordBatch.from_arrays(arrays, schema=mapped.schema), len(rows)

    def done(self, shard: Shard) -> None:
        """Called when a shard's rows have all come: what was kept in many files is one file from now on."""
        self.kept.merge(self.job.pieces[shard.piece], shard.start, shard.rows)

    def _vectors(
        self, batch: pa.RecordBatch, rows: npt.NDArray[np.int64], shard: Shard, at: int
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """(vectors of these rows of the batch, which of them there are)."""
        how, job = self.how, self.job
        taken = batch.take(pa.array(rows))
        ids = row_ids(taken, job.id_column, 0) if job.id_column else (rows + shard.first + at).tolist()
        if how.pairs is not None:
            places = how.pairs.places(ids)
            return np.asarray(how.pairs.vectors[np.maximum(places, 0)]), places >= 0
        piece = job.pieces[shard.piece]
        numbers = rows + shard.start + at  # in the piece
        have, known = self.kept.load(piece, shard.start + at, batch.num_rows)
        vectors = np.zeros((len(rows), job.new_space.dim), np.float32)
        there = np.isin(numbers, have)
        vectors[there] = known[np.searchsorted(have, numbers[there])]
        left = np.flatnonzero(~there)
        for i in range(0, len(left), how.ids_a_call):
            some = left[i : i + how.ids_a_call]
            found, good = self._ask([ids[j] for j in some], taken.take(pa.array(some)), piece, numbers[some])
            vectors[some], there[some] = found, good
        return vectors, there

    def _ask(
        self, ids: list[Id], rows: pa.RecordBatch, piece: Piece, numbers: npt.NDArray[np.int64]
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Asks the function; what it gives is kept before anything else happens, since it may have cost money."""
        assert self.how.ask is not None
        if self._failed is not None:  # what is not right once is not paid for again in the shards under way
            raise self._failed
        try:
            vectors, good, why = ask_for_vectors(
                self.how.ask, ids, rows if self.how.payload else None, self.job.new_space
            )
            self.kept.save(piece, numbers[good], vectors[good])
            if why:
                raise BackfillError(f"{why}; {int(good.sum())} other vectors of this call are kept")
        except BackfillError as error:
            self._failed = error
            raise
        return vectors, good


def partial_job(job: Job, how: Reembedding | None) -> Job:
    """The job, with the rule of a partial backfill."""
    return job if how is None else replace(job, reembed=how.rule, true_column=how.column)
