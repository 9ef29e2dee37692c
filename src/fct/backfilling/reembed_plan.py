"""What re-embedding a part of the rows would take: rows, calls, time and money, without asking for a vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from fct.backfilling.resolve import Context
from fct.backfilling.row_choice import kept_choice
from fct.errors import BackfillError
from fct.options.groups import JobOptions, Prediction

__all__ = ["ReembedPlan", "planned_reembedding", "with_a_budget"]

Options = TypeVar("Options", bound=JobOptions)


@dataclass(frozen=True)
class ReembedPlan:
    """True vectors of a partial backfill.

    rows: that get one: exactly where the choice is made already (``chosen``), else as the budget says; of pairs at
    most, since only the backfill looks which of their ids the gallery has. kept: of them, vectors that the journal has
    from an earlier run or a cascade: nobody asks for them again. calls: of the function, about, for what is left; 0
    for pairs. seconds, cost: of the vectors that are asked for, at the stated rate and price; None where none was
    stated. choosing_seconds: of the pass over the gallery that a choice needs which is not by lot alone.
    """

    rows: int
    chosen: bool
    kept: int
    calls: int
    seconds: float | None
    cost: float | None
    choosing_seconds: float

    @property
    def asked(self) -> int:
        """Vectors that the function is asked for."""
        return max(0, self.rows - self.kept) if self.calls or not self.rows else 0


def with_a_budget(given: Options) -> Options:
    """The options of a plan that has a budget and no function yet: priced as if there were one, which nobody calls."""
    if given.partial.budget is None or given.partial.reembed is not None:
        return given
    return replace(given, partial=replace(given.partial, reembed=_nobody))


def _nobody(ids: Sequence[object]) -> None:
    raise BackfillError(f"reembed: expected a function, a plan has none to ask for {len(ids)} vectors")


def planned_reembedding(context: Context, told: Prediction, read_seconds_a_row: float) -> ReembedPlan | None:
    """None for a whole backfill, which states neither a price nor a rate.

    Raises:
        ValueError: a price or a rate of true vectors without a part of the rows that gets some.
    """
    how, job = context.reembedding, context.job
    if how is None:
        for name in ("price_per_million_embeddings", "embeddings_per_s"):
            if getattr(told, name) is not None:
                raise ValueError(f"{name}: expected a budget (or reembed) beside it: which rows get true vectors")
        return None
    choice = kept_choice(context.journal, job)
    chosen = choice.covered == job.rows
    rows = choice.count() if chosen else round(how.budget * job.rows)
    if how.pairs is not None:
        rows = rows if chosen else min(rows, len(how.pairs))
        return ReembedPlan(rows, chosen, 0, 0, None, None, 0.0 if chosen else job.rows * read_seconds_a_row)
    kept = min(rows, context.true_vectors().count(job.pieces))
    left = rows - kept
    calls = _calls(context, left / job.rows)
    reads = not chosen and how.order != "random" and rows > 0
    price, rate = told.price_per_million_embeddings, told.embeddings_per_s
    return ReembedPlan(
        rows,
        chosen,
        kept,
        calls,
        None if rate is None else left / rate,
        None if price is None else left / 1e6 * price,
        job.rows * read_seconds_a_row if reads else 0.0,
    )


def _calls(context: Context, share: float) -> int:
    """Of the function: no call reaches from one batch of a shard into the next."""
    assert context.reembedding is not None
    job, each = context.job, context.reembedding.ids_a_call
    sizes: dict[int, int] = {}
    for shard in job.shards:
        whole, rest = divmod(shard.rows, job.batch_rows)
        for rows, count in ((job.batch_rows, whole), (rest, 1 if rest else 0)):
            sizes[rows] = sizes.get(rows, 0) + count
    return int(
        np.sum([count * math.ceil(round(share * rows, 6) / each) for rows, count in sizes.items()], dtype=np.int64)
    )
