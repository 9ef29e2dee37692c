"""backfill: every stored row mapped by h, on this machine or on a Ray cluster, stopped and started at will."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fct.backfilling.job import BackfillError, Job, Journal, Marker, QualityGateError, RejectLimitError
from fct.backfilling.pipeline import RowMapper, output_schema
from fct.backfilling.plan import Resolved, occupied, refuse_misfit, resolve
from fct.backfilling.quality import check_quality
from fct.checks import check_flag, check_text, check_whole
from fct.gallery.file_gallery import FileDestination
from fct.gallery.interfaces import Piece, Shard, Source
from fct.terminal import PlainConsole

__all__ = ["BackfillReport", "backfill"]

_UNDER_WAY = 4  # shards between submit and marker: one in each stage


@dataclass(frozen=True)
class BackfillReport:
    """What :func:`backfill` did. rows_in = rows_out + rejects, or it would have raised.

    shards_done: of them, in this run; shards_kept: proven done before. seconds, rows_per_second: of this run alone.
    rejects_folder: where the rejected rows' ids and reasons are.
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
    check_whole(ray_cpus, "ray_cpus", 1)
    if ray is not None:
        check_text(ray, "ray", "auto, local, a cluster's address or None")
    check_flag(trust_sizes, "trust_sizes")
    check_flag(progress, "progress")
    found = resolve(source, destination, transformation, **options)
    quality = check_quality(found.h, pairs, min_gap_closed, min_recall)
    if quality is not None and quality.refusals:
        raise QualityGateError("; ".join(quality.refusals))
    journal = found.journal
    if not journal.marked():  # else it was looked at when it was begun
        refuse_misfit(found, threads=threads)
    with journal.lock(), _bar(progress) as bar:
        job = _begin(found, bar.say)
        kept = _kept(journal, job, content=not trust_sizes, bar=bar)
        todo = [shard for shard in job.shards if shard.number not in kept]
        rejects = sum(m.rejects for m in kept.values())
        _check_rejects(rejects, max_rejects, journal)
        markers = dict(kept)
        bar.start(job.rows, sum(m.rows_in for m in kept.values()))
        if todo:
            found.destination.begin(output_schema(job, found.source.schema), job.new_space)
            if ray is not None:
                from fct.backfilling.ray_run import run_on_ray

                done: Iterable[Marker] = run_on_ray(
                    found, job, todo, address=ray, cpus=ray_cpus, threads=threads, bar=bar
                )
            else:
                done = _run_here(found, job, todo, threads=threads, bar=bar)
            for marker in done:
                markers[marker.shard] = marker
                rejects += marker.rejects
                _check_rejects(rejects, max_rejects, journal)
        try:
            finished = journal.manifest()
        except BackfillError as error:  # the shards are what counts, and they are proven
            bar.say(f"{error}: writing it again")
            finished = None
        if todo or finished is None or finished.get("fingerprint") != job.fingerprint:
            _finish(found, job, markers)
    seconds = time.perf_counter() - began
    rows = sum(shard.rows for shard in todo)
    return BackfillReport(
        destination=job.destination,
        fingerprint=job.fingerprint,
        rows_in=job.rows,
        rows_out=sum(m.rows_out for m in markers.values()),
        rejects=rejects,
        rejects_folder=str(journal.root / "rejects"),
        shards=len(job.shards),
        shards_done=len(todo),
        shards_kept=len(kept),
        seconds=seconds,
        rows_per_second=rows / seconds,
        precision=job.precision,
        backend=job.backend,
    )


def _begin(found: Resolved, say: Callable[[str], None]) -> Job:
    """The job in the destination when it is this one, else a new one; clears what a killed run left half made."""
    journal = found.journal
    stored = journal.job()
    if stored is None:
        others = occupied(journal.destination) if found.job.format != "lance" else []
        if others:
            raise BackfillError(
                f"destination: expected an empty folder or a backfill to continue, {journal.destination} holds "
                f"{', '.join(others[:3])}"
            )
        journal.start(found.job)
        return found.job
    differences = stored.differences(found.job)
    files = isinstance(found.destination, FileDestination)
    if differences and files and not journal.marked() and not occupied(journal.destination):
        journal.start(found.job)  # the other failed before its first shard: there is nothing that could be mixed
        return found.job
    if differences:
        raise BackfillError(
            f"destination: {journal.destination} holds another backfill, and the two are not mixed: "
            + "; ".join(differences[:5])
        )
    _check_stamps(found, stored, say)
    if journal.root.is_local:
        shutil.rmtree(journal.root.local / "parts", ignore_errors=True)
        folders = [journal.root.local, journal.root.local / "done"]
        if journal.destination.local.is_dir():
            folders.append(journal.destination.local)
        for part in (p for folder in folders for p in folder.glob(".*.part")):
            part.unlink(missing_ok=True)  # half-written beside: what fct.atomic_files renames when whole
    where = {name: getattr(found.job, name) for name in ("source", "destination", "side")}
    moved = replace(stored, **where)
    if moved != stored:  # so that whoever verifies looks in the right place; the cut into shards stays
        journal.start(moved)
    return replace(moved, backend=found.job.backend)


def _check_stamps(found: Resolved, stored: Job, say: Callable[[str], None]) -> None:
    """An input with another time stamp may be the same file restored: what was done from it is read again and compared.

    Raises BackfillError when it is not the same.
    """
    for old, new, what in (
        (stored.pieces, found.job.pieces, "source"),
        (stored.side_pieces, found.job.side_pieces, "side-information"),
    ):
        changed = {i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a.stamp != b.stamp}
        if not changed:
            continue
        names = ", ".join(old[i].name for i in sorted(changed)[:3])
        say(f"{what}: {names} has another time stamp; comparing its rows with what was done from it")
        mapper = found.mapper(stored)
        for number in found.journal.marked():
            marker = found.journal.marker(number)
            if marker is None or number >= len(stored.shards):
                continue
            shard = stored.shards[number]
            touched = {shard.piece} if what == "source" else _side_touched(stored, shard)
            if touched & changed and input_checksum(found, stored, shard, mapper) != marker.input:
                raise BackfillError(
                    f"{what}: {names} changed since this backfill began, and old and new rows are not mixed: restore "
                    f"the file, or start over in another destination"
                )


def _side_touched(job: Job, shard: Shard) -> set[int]:
    touched, first = set(), 0
    for i, piece in enumerate(job.side_pieces):
        if first < shard.first + shard.rows and first + piece.rows > shard.first:
            touched.add(i)
        first += piece.rows
    return touched


def input_checksum(found: Resolved, job: Job, shard: Shard, mapper: RowMapper) -> str:
    """XXH64 of a shard's rows as they are in the source now."""
    from fct import _C

    digest = _C.Xxh64()
    for batch, side in found.reader(job).batches(shard):
        mapper.digest(batch, side, digest)
    return f"{digest.digest():016x}"


def _kept(journal: Journal, job: Job, *, content: bool, bar: Bar) -> dict[int, Marker]:
    """The shards that are proven done."""
    kept = {}
    numbers = [n for n in journal.marked() if n < len(job.shards)]
    for number in bar.track(numbers, "checking what is done"):
        marker = journal.marker(number)
        why = journal.trouble(marker, job.shards[number], job.fingerprint, content=content)
        if why is None and marker is not None:
            kept[number] = marker
        else:
            bar.say(f"shard {number} {why}: doing it again")
    return kept


def _check_rejects(rejects: int, limit: int | None, journal: Journal) -> None:
    if limit is not None and rejects > limit:
        raise RejectLimitError(
            f"max_rejects: expected at most {limit} rejected rows, got {rejects}; see {journal.root / 'rejects'}"
        )


def _run_here(found: Resolved, job: Job, todo: list[Shard], *, threads: int | None, bar: Bar) -> Iterator[Marker]:
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
    finally:
        pipeline.close()  # what is under way is finished and marked


def _finish(found: Resolved, job: Job, markers: dict[int, Marker]) -> None:
    """Counts everything once more, commits the destination, and writes the manifest: last, and atomically."""
    rows_in = sum(m.rows_in for m in markers.values())
    rows_out = sum(m.rows_out for m in markers.values())
    rejects = sum(m.rejects for m in markers.values())
    if rows_in != job.rows or rows_out + rejects != rows_in or len(markers) != len(job.shards):
        raise BackfillError(
            f"backfill: expected {job.rows} rows, counted {rows_in} in, {rows_out} out and {rejects} rejected"
        )
    _require_unchanged(found.source, found.job.pieces, "source")
    if found.side is not None:
        _require_unchanged(found.side, found.job.side_pieces, "side_source")
    ordered = [markers[number] for number in range(len(markers))]
    found.destination.finish([m.extra for m in ordered], output_schema(job, found.source.schema), job.new_space)
    # h lies with the gallery, so that it can be checked on its own.
    with tempfile.TemporaryDirectory() as folder:
        data = found.h.save(Path(folder) / "h.safetensors").read_bytes()
    (found.journal.root / "transformation.safetensors").write_bytes(data)
    found.journal.finish(
        {
            "format": job.format,
            "fingerprint": job.fingerprint,
            "source": job.source,
            "rows_in": rows_in,
            "rows_out": rows_out,
            "rejects": rejects,
            "shards": len(ordered),
            "old_space": job.old_space.to_dict(),
            "new_space": job.new_space.to_dict(),
            "transformation": job.transformation,
            "precision": job.precision,
        }
    )


def _require_unchanged(source: Source, then: Sequence[Piece], what: str) -> None:
    """Raises BackfillError where the input is not what it was when this run began, files that came since included."""
    source.refresh()
    now, before = {p.name: p for p in source.pieces()}, {p.name: p for p in then}
    changed = [name for name in sorted(now.keys() | before.keys()) if now.get(name) != before.get(name)]
    if changed:
        how = ("is new", "is gone", "changed")[0 if changed[0] not in before else 1 if changed[0] not in now else 2]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise BackfillError(
            f"{what}: {changed[0]} {how}{more}, while the gallery was read: put it back as it was and start again, or "
            "start over in another destination"
        )


class Bar:
    """Progress on stderr, or silence; messages go above it."""

    def __init__(self, progress: Any) -> None:
        self._progress, self._task = progress, None

    def start(self, rows: int, done: int) -> None:
        if self._progress is not None:
            self._task = self._progress.add_task("rows", total=rows, completed=done)

    def advance(self, rows: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, rows)

    def say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, highlight=False)

    def track(self, items: list[int], what: str) -> Iterable[int]:
        if self._progress is None or not items:
            return items
        tracked: Iterable[int] = self._progress.track(items, description=what)
        return tracked


class _Above(logging.Handler):
    """Shows what the galleries log above the bar."""

    def __init__(self, bar: Bar) -> None:
        super().__init__()
        self.bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        self.bar.say(record.getMessage())


@contextmanager
def _bar(show: bool) -> Iterator[Bar]:
    if not show:
        yield Bar(None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    class Rate(TextColumn):
        def __init__(self) -> None:
            super().__init__("")

        def render(self, task: Any) -> Any:
            from rich.text import Text

            return Text(f"{task.speed or 0:,.0f} /s")

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        console=PlainConsole(stderr=True),
    ) as progress:
        bar = Bar(progress)
        above, log = _Above(bar), logging.getLogger("fct.gallery")
        log.addHandler(above)
        try:
            yield bar
        finally:
            log.removeHandler(above)
