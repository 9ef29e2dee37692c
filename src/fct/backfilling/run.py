"""backfill: every stored row mapped by h, on this machine or on a Ray cluster, stopped and started at will."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from fct.backfilling.backfill_bar import Bar, backfill_bar
from fct.backfilling.database_job import require_journal
from fct.backfilling.growth import Growth
from fct.backfilling.job import BackfillError, Job, QualityGateError, RejectLimitError
from fct.backfilling.journal import Journal, system_errors
from fct.backfilling.marker import Marker
from fct.backfilling.plan import Resolved, refuse_misfit, resolve
from fct.backfilling.quality import check_quality
from fct.backfilling.resume import begin, finish, kept_shards
from fct.backfilling.row_mapper import output_schema
from fct.checks import check_flag, check_text, check_whole
from fct.gallery.databases import DatabaseSource, is_database
from fct.gallery.interfaces import Shard, Source
from fct.gallery.urls import redacted

__all__ = ["BackfillReport", "backfill"]

_log = logging.getLogger("fct.gallery")
_UNDER_WAY = 4  # shards between submit and marker: one in each stage


@dataclass(frozen=True)
class BackfillReport:
    """What :func:`backfill` did. rows_in = rows_out + rejects, or it would have raised.

    shards_done: of them, in this run; shards_kept: proven done before. seconds, rows_per_second: of this run alone.
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


def backfill(
    source: Any,
    destination: Any,
    transformation: Any,
    *,
    max_rejects: int | None = None,
    pairs: Any = None,
    min_gap_closed: float | None = None,
    min_recall: float | None = None,
    ray: str | None = None,
    ray_cpus: int = 1,
    threads: int | None = None,
    trust_sizes: bool = False,
    expect_rows: int | None = None,
    follow: bool = False,
    progress: bool = True,
    **options: Any,
) -> BackfillReport:
    """Maps every row of ``source`` by h into ``destination``; started again, redoes only what is not proven done.

    Args:
        source, destination, transformation, pairs, min_gap_closed, min_recall, options: as
            :func:`fct.plan_backfill` has them.
        max_rejects: stop once more rows than this were rejected; None for no limit.
        ray: None to run here; "auto" for the running Ray cluster, or its address. ray_cpus: CPUs of each actor.
        threads: CPU threads of the kernel (of each actor); by default all (``ray_cpus``).
        trust_sizes: on a restart believe files that have the right size, without reading them for their checksums.
        expect_rows: how many rows the source must have, from your own table: another number is refused before anything
            is written (with ``follow``: at the end).
        follow: files that come while the gallery is read are mapped in a second pass, and so on until none is left.
        progress: show a bar on stderr.

    Returns:
        BackfillReport.

    Raises:
        QualityGateError: expected quality below the limits; nothing was written. SpaceMismatchError: wrong model or
        direction. InUseError: another process is at it. RejectLimitError: too many rejects; what is done is kept.
        BackfillError: another job's destination, changed or damaged input, a full disk; what is done is kept.

    Example:
        >>> import fct, numpy as np, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> np.save(folder + "/old.npy", np.ones((100, 8), np.float32))
        >>> h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False)
        >>> report = fct.backfill(folder, folder + "-new", h, old_model="random-old", progress=False)
        >>> report.rows_in, report.rows_out, report.rejects
        (100, 100, 0)
    """
    began = time.perf_counter()
    if max_rejects is not None:
        check_whole(max_rejects, "max_rejects", 0)
    if expect_rows is not None:
        check_whole(expect_rows, "expect_rows", 0)
    check_whole(ray_cpus, "ray_cpus", 1)
    if ray is not None:
        check_text(ray, "ray", "auto, local, a cluster's address or None")
    check_flag(trust_sizes, "trust_sizes")
    check_flag(follow, "follow")
    check_flag(progress, "progress")
    if is_database(destination):
        require_journal(redacted(destination), options.get("journal"))
    found = resolve(source, destination, transformation, **options)
    if not follow:
        require_rows(found.job.rows, expect_rows)
    quality = check_quality(found.h, pairs, min_gap_closed, min_recall)
    if quality is not None and quality.refusals:
        raise QualityGateError("; ".join(quality.refusals))
    live = isinstance(found.source, DatabaseSource)
    journal = found.journal
    if not journal.marked():  # else it was looked at when it was begun
        refuse_misfit(found, threads=threads)
    how = _How(ray, ray_cpus, threads, max_rejects, trust_sizes, follow or live)
    kept: int | None = None
    done = rows = 0
    with journal.lock(), backfill_bar(progress) as bar:
        while True:
            if isinstance(found.source, DatabaseSource):
                found.source.follow = follow
            one = _run_pass(found, how, bar)
            kept, done, rows = one.kept if kept is None else kept, done + one.done, rows + one.rows_done
            if one.finished:
                break
            if isinstance(source, Source):
                source.refresh()
            found = resolve(source, destination, transformation, **options)
        require_rows(one.job.rows, expect_rows)
    seconds = time.perf_counter() - began
    return BackfillReport(
        destination=one.job.destination,
        fingerprint=one.job.fingerprint,
        rows_in=one.job.rows,
        rows_out=sum(m.rows_out for m in one.markers.values()),
        rejects=sum(m.rejects for m in one.markers.values()),
        rejects_folder=str(journal.root / "rejects"),
        shards=len(one.job.shards),
        shards_done=done,
        shards_kept=kept,
        seconds=seconds,
        rows_per_second=rows / seconds,
        precision=one.job.precision,
        backend=one.job.backend,
        left_to_do=tuple(found.destination.after(one.job.new_space)),
    )


def require_rows(rows: int, expected: int | None) -> None:
    """Raises BackfillError unless the source has the number of rows that its owner's table has."""
    if expected is not None and rows != expected:
        raise BackfillError(
            f"expect_rows: expected {expected:,} rows, the source has {rows:,}: its writer may have stopped early, or "
            "run twice"
        )


@dataclass(frozen=True)
class _How:
    """How a pass runs; see :func:`backfill`."""

    ray: str | None
    ray_cpus: int
    threads: int | None
    max_rejects: int | None
    trust_sizes: bool
    follow: bool


@dataclass(frozen=True)
class _Pass:
    """What one pass over the source did. finished: no files came meanwhile that are to follow."""

    job: Job
    markers: dict[int, Marker]
    kept: int
    done: int
    rows_done: int
    finished: bool


def _run_pass(found: Resolved, how: _How, bar: Bar) -> _Pass:
    journal = found.journal
    found.source.settle()
    job = begin(found, bar.say, follow=how.follow)
    markers = kept_shards(journal, job, content=not how.trust_sizes, bar=bar)
    kept, todo = len(markers), [shard for shard in job.shards if shard.number not in markers]
    rejects = sum(m.rejects for m in markers.values())
    _check_rejects(rejects, how.max_rejects, journal)
    bar.start(job.rows, sum(m.rows_in for m in markers.values()))
    if todo:
        growth = Growth(found.source, how.follow)
        with system_errors("the new gallery could not be begun", found.destination.url):
            found.destination.begin(output_schema(job, found.source.schema), job.new_space)
        with closing(_run(found, job, todo, how, bar)) as done:
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
    whole = True
    if todo or finished is None or finished.get("fingerprint") != job.fingerprint:
        whole = finish(found, job, markers, follow=how.follow)
    return _Pass(job, markers, kept, len(todo), sum(shard.rows for shard in todo), whole)


def _run(found: Resolved, job: Job, todo: list[Shard], how: _How, bar: Bar) -> Generator[Marker, None, None]:
    if how.ray is None:
        return _run_here(found, job, todo, threads=how.threads, bar=bar)
    from fct.backfilling.ray_run import run_on_ray

    return run_on_ray(found, job, todo, address=how.ray, cpus=how.ray_cpus, threads=how.threads, bar=bar)


def _check_rejects(rejects: int, limit: int | None, journal: Journal) -> None:
    if limit is not None and rejects > limit:
        raise RejectLimitError(
            f"max_rejects: expected at most {limit} rejected rows, got {rejects}; see {journal.root / 'rejects'}"
        )


def _run_here(
    found: Resolved, job: Job, todo: list[Shard], *, threads: int | None, bar: Bar
) -> Generator[Marker, None, None]:
    pipeline = found.pipeline(job, threads=threads, on_rows=bar.advance)
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
