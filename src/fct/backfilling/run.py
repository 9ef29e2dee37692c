"""backfill: every stored row mapped by h, on this machine or on a Ray cluster, stopped and started at will."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import dataclass, replace

from typing_extensions import Unpack

from fct.backfilling.backfill_bar import Bar, backfill_bar
from fct.backfilling.choosing import choose_rows
from fct.backfilling.claim import release, take_claim
from fct.backfilling.database_job import require_journal
from fct.backfilling.growth import Growth
from fct.backfilling.job import Job
from fct.backfilling.journal import Journal, system_errors
from fct.backfilling.judged_gate import Gates, GateVerdict
from fct.backfilling.marker import Marker
from fct.backfilling.new_ids import refuse_ids
from fct.backfilling.resolve import Context, load_transformation, require_rows, resolve
from fct.backfilling.resume import begin, finish, is_whole_beside, kept_shards, refuse_strangers
from fct.backfilling.row_choice import kept_choice
from fct.backfilling.row_mapper import output_schema
from fct.backfilling.sample import refuse_misfit
from fct.backfilling.side_join import JoinedSide, bound_side
from fct.errors import BackfillError, RejectLimitError
from fct.gallery.databases import DatabaseSource, is_database
from fct.gallery.interfaces import Destination, Shard, Source
from fct.gallery.urls import redacted
from fct.options.declare import takes
from fct.options.groups import BackfillOptions
from fct.options.keywords import BackfillKeywords
from fct.terminal import plain_log
from fct.types import GalleryLike, TransformationLike

__all__ = ["BackfillReport", "backfill"]

_log = plain_log("fct.gallery")
_UNDER_WAY = 4  # shards between submit and marker: one in each stage


@dataclass(frozen=True)
class BackfillReport:
    """What :func:`backfill` did. rows_in = rows_out + rejects, or it would have raised.

    shards_done: of them, in this run; shards_kept: proven done before. seconds, rows_per_second: of this run alone.
    reembedded: rows with true vectors. chosen: rows that were to have them; fewer have where a function gave none, or
    their old vector was rejected. unknown_ids: of the pairs, what the gallery has not, the first three named; counted
    when rows are chosen, so only in the run that chose them.
    judged: what the gate's own queries said, None without.
    rejects_folder: where the rejected rows' ids and reasons are. left_to_do: of a database, what was made and what its
    owner runs now: an index, an alias.
    """

    destination: str
    fingerprint: str
    rows_in: int
    rows_out: int
    rejects: int
    rejects_folder: str
    shards: int
    shards_done: int
    shards_kept: int
    seconds: float
    rows_per_second: float
    precision: str
    backend: str
    left_to_do: tuple[str, ...] = ()
    reembedded: int = 0
    chosen: int = 0
    unknown: int = 0
    unknown_ids: tuple[str, ...] = ()
    judged: GateVerdict | None = None


@takes(BackfillOptions)
def backfill(
    source: GalleryLike,
    destination: GalleryLike | Destination,
    transformation: TransformationLike,
    **options: Unpack[BackfillKeywords],
) -> BackfillReport:
    """Maps every row of ``source`` by h into ``destination``; started again, redoes only what is not proven done.

    Args:
        source, destination, transformation: as :func:`fct.plan_backfill` has them.
        options: listed below; pairs as :func:`fct.plan_backfill` has them.

    Returns:
        BackfillReport.

    Raises:
        QualityGateError: expected quality below the limits; nothing was written. SpaceMismatchError: wrong model or
        direction. InUseError: another process is at it. RejectLimitError: too many rejects; what is done is kept.
        BackfillError: another job's destination, changed or damaged input, a full disk; what is done is kept.

    Examples:
        >>> import fct, numpy as np, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> np.save(folder + "/old.npy", np.ones((100, 8), np.float32))
        >>> h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False)
        >>> report = fct.backfill(folder, folder + "-new", h, old_model="random-old", progress=False)
        >>> report.rows_in, report.rows_out, report.rejects
        (100, 100, 0)
    """
    began = time.perf_counter()
    given = BackfillOptions.split(options)
    how, threads = given.running, given.execution.threads
    h = load_transformation(transformation)
    gates = Gates.of(given, h)
    if is_database(destination):
        require_journal(redacted(str(destination)), given.database.journal)
    context = resolve(source, destination, h, given)
    if how.ray is not None:
        from fct.backfilling.ray_run import check_ray

        check_ray(context, how.ray_cpus)
    if not how.follow:
        require_rows(context.job.rows, how.expect_rows)
    judged = gates.require(context, threads)
    journal = context.journal
    if journal.job() is None:
        refuse_strangers(context)  # before a lock is left there
    joined = isinstance(context.side, JoinedSide)  # kept in the journal, which has to be held
    if not joined and not journal.marked():  # else it was looked at when it was begun
        refuse_misfit(context, threads=threads)

    def again() -> Context:
        if isinstance(source, Source):
            source.refresh()
        return resolve(source, destination, h, given)

    with journal.lock(), backfill_bar(how.progress) as bar:
        _keep_join(context, how.progress)
        if joined and not journal.marked():
            refuse_misfit(context, threads=threads)
        context, done = _run_passes(context, given, bar, again)
        if joined and journal.root.is_local:
            shutil.rmtree(journal.inside("side").local, ignore_errors=True)
        require_rows(done.job.rows, how.expect_rows)
    return _report(context, done, judged, time.perf_counter() - began)


def _report(context: Context, done: _Pass, judged: GateVerdict | None, seconds: float) -> BackfillReport:
    job, markers = done.job, done.markers.values()
    return BackfillReport(
        destination=job.destination,
        fingerprint=job.fingerprint,
        rows_in=job.rows,
        rows_out=sum(m.rows_out for m in markers),
        rejects=sum(m.rejects for m in markers),
        rejects_folder=str(context.journal.root / "rejects"),
        shards=len(job.shards),
        shards_done=done.done,
        shards_kept=done.kept,
        seconds=seconds,
        rows_per_second=done.rows_done / seconds,
        precision=job.precision,
        backend=job.backend,
        left_to_do=tuple(context.destination.after(job.new_space)),
        reembedded=sum(m.true_rows for m in markers),
        chosen=kept_choice(context.journal, job).count() if context.reembedding else 0,
        unknown=context.reembedding.unknown if context.reembedding else 0,
        unknown_ids=context.reembedding.unknown_ids if context.reembedding else (),
        judged=judged,
    )


def _keep_join(context: Context, progress: bool) -> None:
    """A join by id is made once for all runs of a job: it lies in the journal, where that is on this machine."""
    if isinstance(context.side, JoinedSide):
        context.side.progress = progress
        if context.journal.root.is_local:
            context.side.location = context.journal.inside("side").local


@dataclass(frozen=True)
class _Pass:
    """What one pass over the source did. finished: no files came meanwhile that are to follow.

    kept: shards that were done before. done, rows_done: shards of this run, and their rows.
    """

    job: Job
    markers: dict[int, Marker]
    kept: int
    done: int
    rows_done: int
    finished: bool

    def after(self, earlier: _Pass | None) -> _Pass:
        """Both as one."""
        if earlier is None:
            return self
        done, rows = earlier.done + self.done, earlier.rows_done + self.rows_done
        return replace(self, kept=earlier.kept, done=done, rows_done=rows)


def _run_passes(
    context: Context, given: BackfillOptions, bar: Bar, again: Callable[[], Context]
) -> tuple[Context, _Pass]:
    """Passes until the source has nothing left that is to be mapped: (the last one's stores, what all of them did).

    again: opens the stores once more, for what came meanwhile.
    """
    how, live = given.running, isinstance(context.source, DatabaseSource)
    every: _Pass | None = None
    while True:
        if isinstance(context.source, DatabaseSource):
            context.source.follow = how.follow
        every = _run_pass(context, given, bar, follow=how.follow or live).after(every)
        if every.finished:
            return context, every
        context = again()
        _keep_join(context, how.progress)


def _run_pass(context: Context, given: BackfillOptions, bar: Bar, *, follow: bool) -> _Pass:
    journal, how = context.journal, given.running
    context.source.settle()
    job = begin(context, bar.say, follow=follow)
    markers = kept_shards(journal, job, content=not how.trust_sizes, bar=bar)
    if context.reembedding is not None:
        choose_rows(context, job, bar)
    kept, todo = len(markers), [shard for shard in job.shards if shard.number not in markers]
    rejects = sum(m.rejects for m in markers.values())
    _check_rejects(rejects, how.max_rejects, journal)
    bar.start(job.rows, sum(m.rows_in for m in markers.values()))
    if todo:
        take_claim(journal)
        if isinstance(side := bound_side(context.side, job, context.retry_policy), JoinedSide):
            side.joined()  # once, before Ray's workers look for it
        refuse_ids(context.source, context.destination, job)
        growth = Growth(context.source, follow)
        with system_errors("the new gallery could not be begun", context.destination.url):
            context.destination.begin(output_schema(job, context.source.schema), job.new_space)
        with closing(_run(context, job, todo, given, bar)) as done:
            for marker in done:
                markers[marker.shard] = marker
                rejects += marker.rejects
                _check_rejects(rejects, how.max_rejects, journal)
                growth.look()
    try:
        finished = journal.manifest()
    except BackfillError as error:  # the shards are what counts, and they are proven
        bar.say(f"{error}: writing it again")
        finished = None
    if not todo and finished is not None and not is_whole_beside(context, job):
        bar.say("h or the space beside the rows is not what was written: writing both again")
        finished = None
    whole = True
    if todo or finished is None or finished.get("fingerprint") != job.fingerprint:
        take_claim(journal)
        whole = finish(context, job, markers, follow=follow)
    if whole:
        release(journal)
    return _Pass(job, markers, kept, len(todo), sum(shard.rows for shard in todo), whole)


def _run(
    context: Context, job: Job, todo: list[Shard], given: BackfillOptions, bar: Bar
) -> Generator[Marker, None, None]:
    how, threads = given.running, given.execution.threads
    if how.ray is None:
        return _run_here(context, job, todo, threads=threads, bar=bar)
    from fct.backfilling.ray_run import run_on_ray

    return run_on_ray(context, job, todo, address=how.ray, cpus=how.ray_cpus, threads=threads, bar=bar)


def _check_rejects(rejects: int, limit: int | None, journal: Journal) -> None:
    if limit is not None and rejects > limit:
        raise RejectLimitError(
            f"max_rejects: expected at most {limit} rejected rows, got {rejects}; see {journal.root / 'rejects'}"
        )


def _run_here(
    context: Context, job: Job, todo: list[Shard], *, threads: int | None, bar: Bar
) -> Generator[Marker, None, None]:
    pipeline = context.pipeline(job, threads=threads, on_rows=bar.advance)
    under_way: set[Future[Marker]] = set()
    left = list(reversed(todo))
    try:
        while left or under_way:
            while left and len(under_way) < _UNDER_WAY:
                under_way.add(pipeline.submit(left.pop()))
            finished, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    except (KeyboardInterrupt, GeneratorExit):
        count = sum(not future.done() for future in under_way)
        if count:
            _log.warning(
                "finishing %d %s, press Ctrl-C again to leave them", count, "shard" if count == 1 else "shards"
            )
        raise
    finally:
        try:
            pipeline.close()  # what is under way is finished and marked
        except KeyboardInterrupt:
            pipeline.leave()
            raise
