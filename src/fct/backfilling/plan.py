"""plan_backfill: what a backfill would do, how long it takes, what it costs and what it would refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from typing_extensions import Unpack

from fct.backfilling.coding import taken_as_they_are
from fct.backfilling.job import Job
from fct.backfilling.judged_gate import Gates, GateVerdict
from fct.backfilling.new_location import occupied
from fct.backfilling.pace import Pace, measure_h, measure_reading, measure_writing
from fct.backfilling.quality import Quality, ScoreShift, Writing, score_shift
from fct.backfilling.reembed_plan import ReembedPlan, planned_reembedding, with_a_budget
from fct.backfilling.resolve import Context, load_transformation, reads_float64, require_rows, resolve
from fct.backfilling.row_mapper import RowMapper
from fct.backfilling.sample import Reject, misfit, sampled
from fct.backfilling.side_join import JoinedSide
from fct.errors import FctError
from fct.gallery.databases import DatabaseDestination
from fct.gallery.interfaces import Destination
from fct.gallery.urls import redacted
from fct.ops.processors import threads_of
from fct.options.declare import takes
from fct.options.groups import PlanOptions, Prediction
from fct.options.keywords import PlanKeywords
from fct.types import GalleryLike, TransformationLike

__all__ = ["BackfillPlan", "plan_backfill"]


@dataclass(frozen=True)
class BackfillPlan:
    """What :func:`plan_backfill` found out.

    rows, bytes_in, bytes_out: of the whole gallery. free_bytes: None where the destination cannot say.
    rows_per_second: of the whole backfill on this machine, from h (at ``precision`` on ``backend``), reading and
    writing, each measured for a moment: they overlap, so the slowest binds (``binds``), and on a CPU they share it.
    h_rows_per_second, read_rows_per_second, write_rows_per_second: of each alone. Reading is that of the source as it
    lies now (page cache included, and the network where it lies behind one); writing goes to a temporary folder of this
    machine, None where the destination is not files. Nothing is written to the destination, so the upload to a remote
    one cannot be measured: upload_rows_per_second comes from the stated ``upload_mb_per_s``, and without one
    ``upload_left_out`` is True: the prediction is of everything but the upload.
    seconds: predicted for ``workers`` machines like this one. cost_per_billion_rows: at ``price_per_hour`` for each.
    nonfinite_share: rows of the sample that would go to rejects/.
    refusals: every reason why the backfill would be refused; empty when it would run.
    notes: what is read otherwise than it is stored, and which version of a table.
    quality: expected retrieval quality on the pairs, None without. judged: what queries of your own say, likewise.
    scores: how old and new scores compare. reembedding: of a partial backfill, what its true vectors take; a ``budget``
    without ``reembed`` prices one.
    """

    source: str
    destination: str
    rows: int
    shards: int
    bytes_in: int
    bytes_out: int
    free_bytes: int | None
    precision: str
    backend: str
    rows_per_second: float
    workers: int
    seconds: float
    price_per_hour: float | None
    cost_per_billion_rows: float | None
    sample_rows: int
    nonfinite_share: float
    reject_reasons: Mapping[str, int]
    refusals: tuple[str, ...]
    gate_refusals: tuple[str, ...] = ()
    quality: Quality | None = None
    scores: ScoreShift | None = None
    job: Job | None = field(default=None, repr=False, compare=False)
    h_rows_per_second: float = 0.0
    read_rows_per_second: float = 0.0
    write_rows_per_second: float | None = None
    binds: str = "h"
    upload_mb_per_s: float | None = None
    upload_rows_per_second: float | None = None
    upload_left_out: bool = False
    notes: tuple[str, ...] = ()
    judged: GateVerdict | None = None
    reembedding: ReembedPlan | None = None


@takes(PlanOptions)
def plan_backfill(
    source: GalleryLike,
    destination: GalleryLike | Destination,
    transformation: TransformationLike,
    **options: Unpack[PlanKeywords],
) -> BackfillPlan:
    """Reads metadata and a sample, measures h, reading and writing, and says what a backfill would do. The destination
    is not touched.

    Args:
        source: the old gallery: a folder, a glob or a file of Parquet, Arrow IPC, .npy, .fbin/.u8bin/.i8bin; a
            ``.lance`` dataset; any of them at an fsspec URL; or your own :class:`fct.gallery.Source`.
        destination: where the new gallery goes: a folder, a ``.lance`` path, or a :class:`fct.gallery.Destination`.
        transformation: h, or the path of its .safetensors file.
        options: listed below. pairs may be a mapping too, with "old", "side" (where h needs it), "new" and, for
            ``min_gap_closed``, "labels": (n, d) arrays, row i of each the same item; they are mapped as the job will
            map the gallery: at its precision and dtype, on its backend and device.

    Returns:
        BackfillPlan; ``refusals`` holds every reason why the backfill would not run.

    Raises:
        ValueError, TypeError: a bad argument. FileNotFoundError: no gallery there. FctError: unreadable input.

    Examples:
        >>> import fct, numpy as np, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> np.save(folder + "/old.npy", np.ones((100, 8), np.float32))
        >>> h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False)
        >>> fct.plan_backfill(folder, folder + "-new", h, old_model="random-old", measure_seconds=0.01).rows
        100
    """
    given = with_a_budget(PlanOptions.split(options))
    h = load_transformation(transformation)
    gates = Gates.of(given, h)
    try:
        context = resolve(source, destination, h, given)
    except FctError as error:
        quality = gates.quality(Writing.asked_for(given))
        gate = quality.refusals if quality is not None else ()
        return _refused(redacted(str(source)), redacted(str(destination)), (str(error),), gate, quality)
    writing = Writing.of_job(context.job, context.device, given.execution.threads)
    quality = gates.quality(writing)
    room = _Room.of(context)
    mapper = context.mapper(context.job, threads=given.execution.threads)
    seen = _look(context, mapper, given.prediction.sample_rows)
    if isinstance(context.side, JoinedSide):
        context.side.progress = True
    judged, trouble = _judged(gates, context, writing)
    missed = [why for each in (quality, judged) if each is not None for why in each.refusals]
    others = [*trouble, *_counted(context.job, given.prediction.expect_rows), *room.refusals(context), *seen.refusals]
    verdict = _Verdict(quality, judged, tuple(missed), tuple(dict.fromkeys([*missed, *others])))
    pace = _pace(context, mapper, None if verdict.refusals else seen.mapped, given, room.needed)
    return _planned(context, given.prediction, seen, verdict, room, pace)


@dataclass(frozen=True)
class _Verdict:
    """What gates, stores and sample say. missed: limits of the gates. refusals: those and all others."""

    quality: Quality | None
    judged: GateVerdict | None
    missed: tuple[str, ...]
    refusals: tuple[str, ...]


def _planned(
    context: Context, predicted: Prediction, seen: _Seen, verdict: _Verdict, room: _Room, pace: Pace
) -> BackfillPlan:
    job = context.job
    rate, binds = pace.together()
    partial = planned_reembedding(context, predicted, pace.read)
    return BackfillPlan(
        source=job.source,
        destination=job.destination,
        rows=job.rows,
        shards=len(job.shards),
        bytes_in=sum(p.bytes for p in (*job.pieces, *job.side_pieces)),
        bytes_out=room.needed,
        free_bytes=room.free,
        precision=job.precision,
        backend=job.backend,
        rows_per_second=rate,
        workers=predicted.workers,
        seconds=job.rows / (rate * predicted.workers) + _more_seconds(partial),
        price_per_hour=predicted.price_per_hour,
        cost_per_billion_rows=_cost(rate, predicted),
        sample_rows=seen.rows,
        nonfinite_share=len(seen.rejects) / seen.rows if seen.rows else 0.0,
        reject_reasons=seen.reasons(),
        refusals=verdict.refusals,
        gate_refusals=verdict.missed,
        quality=verdict.quality,
        scores=None if verdict.refusals else seen.score_shift(),
        job=job,
        h_rows_per_second=pace.h_rate,
        read_rows_per_second=1 / pace.read if pace.read else 0.0,
        write_rows_per_second=1 / pace.write if pace.write else None,
        binds=binds,
        upload_mb_per_s=predicted.upload_mb_per_s,
        upload_rows_per_second=1 / pace.upload if pace.upload else None,
        upload_left_out=predicted.upload_mb_per_s is None and not context.journal.destination.is_local,
        notes=_notes(context),
        judged=verdict.judged,
        reembedding=partial,
    )


def _judged(gates: Gates, context: Context, writing: Writing) -> tuple[GateVerdict | None, list[str]]:
    """(what the queries said, what keeps them from saying anything)."""
    try:
        return gates.judged(context, writing), []
    except (FctError, ValueError) as error:
        return None, [str(error)]


def _more_seconds(partial: ReembedPlan | None) -> float:
    """Of choosing rows and of asking for their vectors, as far as a rate was stated."""
    return 0.0 if partial is None else partial.choosing_seconds + (partial.seconds or 0.0)


def _counted(job: Job, expected: int | None) -> list[str]:
    try:
        require_rows(job.rows, expected)
    except FctError as error:
        return [str(error)]
    return []


def _notes(context: Context) -> tuple[str, ...]:
    """What is read otherwise than it is stored, of the gallery and of its side-information."""
    sides = [context.source, *([context.side] if context.side else [])]
    rounded = "source: float64 rows are rounded to float32"
    wide = reads_float64(
        context.source, context.job.vector, context.job.side_column, context.side, context.job.side_vector
    )
    notes = [note for source in sides for note in source.notes]
    if taken_as_they_are(context.job, context.source.schema):
        notes.append(
            "source: 8-bit codes are taken as they are; if a scale and an offset bring them back, give --scale and "
            "--offset, or --code-ranges (docs/galleries.md)"
        )
    return tuple(dict.fromkeys([*([rounded] if wide else []), *notes]))


@dataclass(frozen=True)
class _Room:
    """Bytes that the new vectors need, and that the destination has free: None where it cannot say."""

    needed: int
    free: int | None

    @classmethod
    def of(cls, context: Context) -> _Room:
        needed = context.job.rows * context.h.d_new * np.dtype(context.job.dtype).itemsize
        database = isinstance(context.destination, DatabaseDestination)
        return cls(needed, None if database else context.journal.destination.free_bytes())

    def refusals(self, context: Context) -> list[str]:
        """What in the destination would keep the backfill from starting."""
        job, journal, refusals = context.job, context.journal, []
        stored = journal.job()
        if stored is not None:
            refusals += [f"destination: holds another backfill: {d}" for d in stored.differences(job)]
        elif not context.destination.shared and occupied(journal.destination):
            refusals.append(f"destination: {job.destination} already holds other files")
        if self.free is not None and self.free < self.needed:
            refusals.append(f"destination: {self.needed} bytes are needed, {self.free} are free")
        return refusals


@dataclass
class _Seen:
    """The sample: its batches, what h made of them, the rows that would be rejected, and what is wrong with it all."""

    mapper: RowMapper
    batches: list[tuple[pa.RecordBatch, pa.RecordBatch | None]]
    mapped: list[pa.RecordBatch]
    rejects: list[Reject]
    refusals: list[str]

    @property
    def rows(self) -> int:
        return sum(batch.num_rows for batch, _ in self.batches)

    def reasons(self) -> dict[str, int]:
        """Why rows were rejected -> how many of the sample."""
        counts: dict[str, int] = {}
        for reject in self.rejects:
            counts[reject["reason"]] = counts.get(reject["reason"], 0) + 1
        return counts

    def score_shift(self) -> ScoreShift | None:
        return score_shift(self.mapper, self.batches) if self.batches else None


def _look(context: Context, mapper: RowMapper, rows: int) -> _Seen:
    seen = _Seen(mapper, [], [], [], [])
    try:
        seen.batches = list(sampled(context, rows))
        for batch, side in seen.batches:
            mapped, rejects = mapper(batch, side, 0)
            seen.mapped.append(mapped)
            seen.rejects += rejects
    except (FctError, ValueError, OSError) as error:
        seen.refusals.append(str(error))
    if seen.rows and len(seen.rejects) == seen.rows:
        seen.refusals.append(misfit(context.job, seen.batches[0][0], seen.rejects))
    return seen


def _pace(
    context: Context, mapper: RowMapper, mapped: list[pa.RecordBatch] | None, given: PlanOptions, bytes_out: int
) -> Pace:
    """mapped: None where the backfill is refused: then h alone is measured."""
    seconds, upload = given.prediction.measure_seconds, given.prediction.upload_mb_per_s
    on_cpu = context.device == "cpu"
    pace = Pace(measure_h(mapper, seconds), on_cpu=on_cpu, threads=threads_of(given.execution.threads))
    if mapped is not None:
        measure_reading(pace, context, mapper, seconds / 2)
        measure_writing(pace, context, mapped)
    if upload is not None:
        pace.upload = (pace.row_bytes or bytes_out / context.job.rows) / (upload * 1e6)
    return pace


def _cost(rate: float, predicted: Prediction) -> float | None:
    """Of a billion rows, in the currency of ``price_per_hour``."""
    return None if predicted.price_per_hour is None else 1e9 / rate / 3600 * predicted.price_per_hour


def _refused(
    source: str, destination: str, why: tuple[str, ...], gate: tuple[str, ...], quality: Quality | None
) -> BackfillPlan:
    return BackfillPlan(
        source, destination, 0, 0, 0, 0, None, "", "", 0.0, 1, 0.0, None, None, 0, 0.0, {}, (*gate, *why), gate, quality
    )  # fmt: skip
