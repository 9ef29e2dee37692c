"""A look at some rows, spread over a gallery: whether it is the right one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from fct.backfilling.job import Job
from fct.backfilling.resolve import Context
from fct.errors import BackfillError
from fct.gallery.vectors import vector_dim
from fct.types import JsonDict

__all__ = ["Reject", "misfit", "refuse_misfit", "sampled"]

Reject: TypeAlias = JsonDict  # id, row and reason of a row that h cannot map, as in rejects/
_ROWS, _BYTES = 4096, 128 << 20


def sampled(context: Context, rows: int) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch | None]]:
    """About ``rows`` rows with their side-information, in up to 8 runs from shards spread evenly over the gallery;
    fewer where those take more than 128 MB."""
    shards = context.job.shards
    chosen = [shards[i] for i in sorted({int(x) for x in np.linspace(0, len(shards) - 1, min(8, len(shards)))})]
    each = max(1, rows // len(chosen))
    # One batch a run: no more is decoded than is looked at.
    reader = context.reader(replace(context.job, batch_rows=each))
    for shard in chosen:
        yield reader.head(shard, each, _BYTES / len(chosen))


def misfit(job: Job, first: pa.RecordBatch, rejects: list[Reject]) -> str:
    """Why this is the wrong gallery, when every row of the sample was rejected. first: the sample's first rows."""
    d = vector_dim(first.column(job.vector), job.binary_dtype)
    if d is not None and d != job.old_space.dim:
        return f"source: expected vectors of {job.old_space}, got {d}-d vectors"
    return f"source: every row of the sample would be rejected: {rejects[0]['reason']}"


def refuse_misfit(context: Context, *, threads: int | None = None) -> None:
    """Raises BackfillError where no row of the sample that :func:`plan_backfill` takes can be mapped.

    One row that can is enough, so that of most galleries only the first run is read.
    """
    mapper = context.mapper(context.job, threads=threads)
    first: pa.RecordBatch | None = None
    rejects: list[Reject] = []
    for batch, side in sampled(context, _ROWS):
        _, bad = mapper(batch, side, 0)
        if len(bad) < batch.num_rows:
            return
        first = batch if first is None else first
        rejects += bad
    assert first is not None  # resolve() refuses a gallery without rows
    raise BackfillError(misfit(context.job, first, rejects))
