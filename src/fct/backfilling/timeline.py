"""The course of a backfill, from its journal alone: when each shard was made, what was rejected, and what is left."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from typing_extensions import Unpack

from fct.backfilling.database_job import database_journal
from fct.backfilling.job import Job
from fct.backfilling.journal import Journal
from fct.backfilling.marker import Marker
from fct.backfilling.new_gallery import journal_of
from fct.errors import BackfillError, StoreError
from fct.gallery import location_of
from fct.gallery.databases import is_database
from fct.gallery.interfaces import Shard
from fct.types import Access

__all__ = ["DoneShard", "FileLeft", "Pause", "Timeline", "backfill_timeline"]

_LONG_PAUSE = 0.05  # of the whole time, in which no shard was under way: what is shorter is nobody's news
_MOST_REASONS = 1_000
_OTHER_REASONS = "other reasons"


@dataclass(frozen=True, slots=True)
class DoneShard:
    """A shard as its marker has it.

    began, ended: seconds since 1970; None in markers of before there were times. seconds: it took its worker, from the
    end of the worker's shard before it where that was later than its own beginning: a worker reads one shard while it
    writes another, so that these seconds add up and those between ``began`` and ``ended`` do not. worker: tells one run
    of one worker from every other; "" where ``began`` is None.
    """

    number: int
    file: str
    rows: int
    rows_out: int
    rejects: int
    true_rows: int
    backend: str
    began: float | None
    ended: float | None
    seconds: float | None
    worker: str


@dataclass(frozen=True, slots=True)
class Pause:
    """A time in which no shard was under way. restarted: no worker of before went on after it."""

    began: float
    ended: float
    restarted: bool


@dataclass(frozen=True, slots=True)
class FileLeft:
    """A file of the source of which rows are left to do."""

    name: str
    rows: int
    shards: int


@dataclass(frozen=True)
class Timeline:
    """What the journal says. Nothing is proven by it: that is ``verify``.

    destination: as the job names it. finished: the manifest is written. shards: done, in the order in which they ended.
    pauses: in order of time: all restarts, and what took longer than a twentieth of the whole. reasons: how many rows
    were rejected for which reason, the commonest first. left: the files that have rows left. troubles: what could not
    be read or believed, in sentences.
    """

    job: Job
    finished: bool
    shards: tuple[DoneShard, ...]
    pauses: tuple[Pause, ...]
    reasons: dict[str, int]
    left: tuple[FileLeft, ...]
    troubles: tuple[str, ...]

    @property
    def rows_done(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def rejects(self) -> int:
        return sum(shard.rejects for shard in self.shards)

    @property
    def true_rows(self) -> int:
        return sum(shard.true_rows for shard in self.shards)

    @property
    def timed(self) -> list[DoneShard]:
        """The shards that say when they were made."""
        return [shard for shard in self.shards if shard.ended is not None]

    @property
    def span(self) -> tuple[float, float] | None:
        """When the first shard that says so began, and the last one ended."""
        timed = self.timed
        return (min(s.began or 0.0 for s in timed), max(s.ended or 0.0 for s in timed)) if timed else None

    @property
    def rate(self) -> float | None:
        """Rows a second while a shard was under way, of the shards that say when; None where none does."""
        busy = sum(end - start for start, end, _ in _busy(self.timed))
        return sum(s.rows for s in self.timed) / busy if busy > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """About, at the rate so far."""
        rate = self.rate
        return None if not rate else (self.job.rows - self.rows_done) / rate


def backfill_timeline(
    location: str | os.PathLike[str], *, name: str = "backfill", **access: Unpack[Access]
) -> Timeline:
    """The course of the backfill whose new gallery, or whose journal, lies at ``location``.

    Args:
        location: a folder or a URL of either. name: the argument or option that this is, for messages.
        access: ``filesystem``, ``storage_options``, ``retry_policy`` of :func:`fct.gallery.open_source`.

    Raises:
        BackfillError: neither is there, or a job that cannot be read.

    Examples:
        >>> import fct, numpy as np, tempfile
        >>> from fct.backfilling.timeline import backfill_timeline
        >>> folder = tempfile.mkdtemp()
        >>> np.save(folder + "/old.npy", np.ones((100, 8), np.float32))
        >>> h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False)
        >>> _ = fct.backfill(folder, folder + "-new", h, old_model="random-old", progress=False)
        >>> found = backfill_timeline(folder + "-new")
        >>> found.finished, found.rows_done, found.left
        (True, 100, ())
    """
    journal, job = _opened(location, name, access)
    troubles: list[str] = []
    markers = dict(_believed(journal, job, troubles))
    reasons: Counter[str] = Counter()
    for number, marker in markers.items():
        if marker.rejects:
            _count(reasons, journal, marker, job.shards[number], troubles)
    shards = _done(job, markers)
    return Timeline(
        job=job,
        finished=_finished(journal, job, troubles),
        shards=shards,
        pauses=tuple(_pauses(shards)),
        reasons=dict(reasons.most_common()),
        left=tuple(_left(job, markers)),
        troubles=tuple(troubles),
    )


def _opened(location: str | os.PathLike[str], name: str, access: Access) -> tuple[Journal, Job]:
    if is_database(location):
        raise BackfillError(
            f"{name}: a database has no place for its journal: expected the folder of the job's --journal"
        )
    place = location_of(location, name=name, **access)
    if (place / "job.json").exists():
        journal = database_journal(place.local) if place.is_local else Journal(place, place / "outputs")
    else:
        journal, _ = journal_of(location, None, access)
    job = journal.job()
    if job is None:
        raise BackfillError(
            f"{name}: expected a backfill's new gallery (with its journal in {journal.root.name}/) or the folder of "
            f"its --journal, found no job.json in {location}"
        )
    return journal, job


def _believed(journal: Journal, job: Job, troubles: list[str]) -> Iterator[tuple[int, Marker]]:
    """The markers that may be of the job's shards; of the others it is said how many there are."""
    doubted = 0
    for number in journal.marked():
        marker = journal.marker(number)
        shard = job.shards[number] if number < len(job.shards) else None
        if marker is None or shard is None or marker.contradiction(shard, job.fingerprints(shard)):
            doubted += 1
        else:
            yield number, marker
    if doubted:
        troubles.append(
            f"{doubted:,} {'marker is' if doubted == 1 else 'markers are'} damaged or of another job: the next run "
            f"does {'its shard' if doubted == 1 else 'their shards'} again"
        )


def _count(reasons: Counter[str], journal: Journal, marker: Marker, shard: Shard, troubles: list[str]) -> None:
    try:
        for _, reason in journal.rejects(marker, shard):
            known = reason in reasons or len(reasons) < _MOST_REASONS
            reasons[reason if known else _OTHER_REASONS] += 1
    except FileNotFoundError:
        troubles.append(f"shard {shard.number}: the lines of its {marker.rejects:,} rejected rows are missing")
    except (BackfillError, StoreError) as error:
        troubles.append(f"shard {shard.number}: {error}")


def _finished(journal: Journal, job: Job, troubles: list[str]) -> bool:
    try:
        manifest = journal.manifest()
    except BackfillError as error:
        troubles.append(str(error))
        return False
    return manifest is not None and manifest.get("fingerprint") == job.fingerprint


def _done(job: Job, markers: dict[int, Marker]) -> tuple[DoneShard, ...]:
    """In the order in which they ended; those that do not say when come first."""

    def ended(item: tuple[int, Marker]) -> tuple[float, int]:
        return (item[1].times.ended if item[1].times else 0.0), item[0]

    before: dict[str, float] = {}  # by worker: when its shard before ended
    found = []
    for number, marker in sorted(markers.items(), key=ended):
        times, shard = marker.times, job.shards[number]
        if times is not None and times.ended < times.began:
            times = None  # the worker's clock was set back meanwhile
        seconds = None
        if times is not None:
            seconds = times.ended - max(times.began, before.get(times.worker, times.began))
            before[times.worker] = times.ended
        found.append(
            DoneShard(
                number, job.pieces[shard.piece].name, marker.rows_in, marker.rows_out, marker.rejects, marker.true_rows,
                marker.backend, *((times.began, times.ended, seconds, times.worker) if times else (None,) * 3 + ("",)),
            )
        )  # fmt: skip
    return tuple(found)


def _busy(shards: Sequence[DoneShard]) -> list[tuple[float, float, set[str]]]:
    """(from, to, workers): the stretches of time in which a shard was under way, in order."""
    found: list[tuple[float, float, set[str]]] = []
    for shard in sorted(shards, key=lambda s: s.began or 0.0):
        if shard.began is None or shard.ended is None:
            continue
        if found and shard.began <= found[-1][1]:
            start, end, workers = found[-1]
            found[-1] = start, max(end, shard.ended), workers | {shard.worker}
        else:
            found.append((shard.began, shard.ended, {shard.worker}))
    return found


def _pauses(shards: Sequence[DoneShard]) -> Iterator[Pause]:
    busy = _busy(shards)
    whole = busy[-1][1] - busy[0][0] if busy else 0.0
    last = {worker: place for place, (_, _, workers) in enumerate(busy) for worker in workers}
    reach = 0  # the last stretch in which a worker of those before is at work
    for place, (one, two) in enumerate(pairwise(busy)):
        reach = max([reach, *(last[worker] for worker in one[2])])
        restarted = reach <= place
        if restarted or two[0] - one[1] > _LONG_PAUSE * whole:
            yield Pause(one[1], two[0], restarted)


def _left(job: Job, markers: dict[int, Marker]) -> Iterator[FileLeft]:
    rows: Counter[int] = Counter()
    shards: Counter[int] = Counter()
    for shard in job.shards:
        if shard.number not in markers:
            rows[shard.piece] += shard.rows
            shards[shard.piece] += 1
    for piece in sorted(rows):
        yield FileLeft(job.pieces[piece].name, rows[piece], shards[piece])
