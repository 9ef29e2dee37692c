"""verify_gallery: every row there once, every byte as it was written, and the source's rows, counted and compared by
another way than they were read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from typing_extensions import Unpack

from fct.artifact.transformation import Transformation
from fct.backfilling.against_source import AgainstSource, compare_with_source
from fct.backfilling.database_job import database_journal
from fct.backfilling.in_database import DatabaseResult
from fct.backfilling.job import Job
from fct.backfilling.journal import Journal
from fct.backfilling.marker import Marker
from fct.backfilling.new_gallery import changed_since, journal_of, open_gallery
from fct.backfilling.resolve import load_transformation
from fct.backfilling.side_join import join_by_id
from fct.backfilling.spot_check import VectorCheck, VectorChecker
from fct.backfilling.true_source import load_true_pairs
from fct.errors import BackfillError, FctError, MissingExtraError
from fct.gallery import open_source
from fct.gallery.databases import DatabaseSource, is_database
from fct.gallery.databases.address import Address
from fct.gallery.interfaces import Source
from fct.gallery.stores import Opening, opening
from fct.gallery.tables import pinned
from fct.options.declare import takes
from fct.options.groups import SpotCheck, VerifyOptions
from fct.options.keywords import VerifyKeywords
from fct.progress import LongCall
from fct.types import Access, GalleryLike, JsonDict

if TYPE_CHECKING:
    import os


__all__ = ["VerifyReport", "gallery_journal", "verify_gallery"]

_SAID = 20  # problems of one kind that are listed
_ALL = "not proven: that the gallery holds all rows of its source, with their ids, payload and vectors"


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify_gallery` found. ``ok``: there are no problems; ``proven``: and nothing was left out.

    rows_in = rows_out + rejects. spot_checked: rows compared with the reference, 0 with ``spot_check_skipped`` saying
    why not; worst_error: the largest relative error of a row among them. true_rows: re-embedded rows compared with
    their pairs or, without, with the vectors that the journal keeps. source_rows: the source's rows by another reader's
    count, None where there is none; read_alike: rows that this reader reads as they were when they were mapped, vectors
    and all, by the journal's checksums; compared: rows whose ids and payload were compared with the source's;
    checksums: XXH64 of each column of these, whatever the cut into files. unproven: what could not be checked, and why.
    """

    destination: str
    rows_in: int
    rows_out: int
    rejects: int
    shards: int
    bytes: int
    spot_checked: int
    worst_error: float
    spot_check_skipped: str
    problems: tuple[str, ...]
    source_rows: int | None = None
    compared: int = 0
    checksums: Mapping[str, str] = field(default_factory=dict)
    unproven: tuple[str, ...] = ()
    true_rows: int = 0
    read_alike: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def proven(self) -> bool:
        return self.ok and not self.unproven


def gallery_journal(
    path: str | os.PathLike[str], *, journal: str | os.PathLike[str] | None = None, **access: Unpack[Access]
) -> tuple[Journal, Job]:
    """The journal and the job of a backfill's destination. journal: its folder, where the destination is a database
    or a table whose job had one.

    Raises:
        BackfillError: it is none, or the journal is another's.
    """
    found, place = journal_of(path, journal, access)
    job = found.job()
    if job is None:
        raise BackfillError(f"gallery: expected the destination of a backfill, {found.root} has no job.json of {place}")
    same = _same_table(str(path), job.destination) if is_database(path) else not found.apart or job.destination == place
    if not same:
        raise BackfillError(f"journal: expected the journal of {place}, {found.root} is of {job.destination}")
    return found, job


def _same_table(one: str, other: str) -> bool:
    """Whether two URLs mean the same vectors of one table."""
    a, b = (Address.parse(url, "gallery") if is_database(url) else None for url in (one, other))
    return a is not None and b is not None and (a.location(), a.vector) == (b.location(), b.vector)


@takes(VerifyOptions)
def verify_gallery(path: str | os.PathLike[str], **options: Unpack[VerifyKeywords]) -> VerifyReport:
    """Checks a finished backfill: nothing missing, nothing twice, nothing changed, one space, right values.

    The journal alone proves that what was written is still there. That it is the source's, all of it, is proven
    against the source, which is opened only where the caller names it: a gallery is somebody's input, and what its
    journal names could be anything.

    Args:
        path: the new gallery.
        options: listed below.

    Returns:
        VerifyReport with every problem found, each in a sentence, and with what was not proven.

    Raises:
        BackfillError: not the destination of a backfill, or a job file that cannot be read.

    Examples:
        >>> import fct, numpy as np, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> np.save(folder + "/old.npy", np.ones((100, 8), np.float32))
        >>> h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False)
        >>> _ = fct.backfill(folder, folder + "-new", h, old_model="random-old", progress=False)
        >>> report = fct.verify_gallery(folder + "-new", source=folder)
        >>> report.proven, report.source_rows
        (True, 100)
    """
    given = VerifyOptions.split(options)
    access, spot = opening(given.access), given.spot
    journal, job = gallery_journal(path, journal=spot.journal, **access)
    count = _Journalled(journal, job)
    count.check_all(path, access)
    if spot.expect_rows is not None and job.rows != spot.expect_rows:
        count.problems.append(f"expected {spot.expect_rows:,} rows by your own count, the source had {job.rows:,}")
    if spot.side_join not in ("auto", job.side_join):
        count.problems.append(
            f"side_join: expected {spot.side_join}, the side-information was joined by {job.side_join}"
        )
    against, vectors, skipped = AgainstSource(), VectorCheck(), ""
    if not count.problems:
        against, vectors, skipped = _Outside(journal, job, path, access, spot).check()
    return VerifyReport(
        destination=job.destination if is_database(path) else str(journal.destination),
        rows_in=count.rows_in,
        rows_out=count.rows_out,
        rejects=count.rejects,
        shards=len(job.shards),
        bytes=count.size,
        spot_checked=vectors.rows,
        worst_error=vectors.worst,
        spot_check_skipped=skipped,
        problems=(*count.problems, *against.problems, *vectors.problems),
        source_rows=against.rows,
        compared=against.compared,
        checksums=against.checksums,
        unproven=(*against.unproven, *_unchecked(vectors)),
        true_rows=vectors.true_rows,
        read_alike=against.mapped,
    )


def _unchecked(vectors: VectorCheck) -> list[str]:
    if not vectors.unchecked:
        return []
    return [
        f"not proven: the vectors of {vectors.unchecked:,} re-embedded rows among those looked at: name their pairs "
        "with --reembed (reembed=)"
    ]


class _Journalled:
    """What the gallery says of itself: its markers, its files, its manifest."""

    def __init__(self, journal: Journal, job: Job) -> None:
        self.journal, self.job = journal, job
        self.problems: list[str] = []
        self.rows_in = self.rows_out = self.rejects = self.size = 0
        self.rows: dict[str, int] = {}  # by data file

    def check_all(self, path: str | os.PathLike[str], access: Opening) -> None:
        manifest = self._manifest()
        self._shards()
        job = self.job
        if self.rows_in != job.rows or self.rows_out + self.rejects != self.rows_in:
            self.problems.append(
                f"expected {job.rows} rows, found {self.rows_in} in, {self.rows_out} out and {self.rejects} rejected"
            )
        for name in ("rows_in", "rows_out", "rejects"):
            if manifest is not None and manifest.get(name) != getattr(self, name):
                said = manifest.get(name)
                self.problems.append(f"the manifest says {name} {said}, the shards say {getattr(self, name)}")
        if manifest is not None and not self.problems:
            self.problems += self._content(path, access)

    def _manifest(self) -> JsonDict | None:
        try:
            manifest = self.journal.manifest()
        except BackfillError as error:
            self.problems.append(f"{error}; run the backfill again")
            return None
        if manifest is None:
            self.problems.append("the backfill is unfinished: it has no manifest")
        elif manifest.get("fingerprint") != self.job.fingerprint:
            self.problems.append("the manifest belongs to another job")
        return manifest

    def _shards(self) -> None:
        marked = set(self.journal.marked())
        strange = sorted(number for number in marked if number >= len(self.job.shards))
        if strange:
            self.problems.append(f"the journal has a marker of shard {strange[0]}, the job has {len(self.job.shards)}")
        missing = 0
        for shard in self.job.shards:
            marker = self.journal.marker(shard.number) if shard.number in marked else None
            why = self.journal.trouble(marker, shard, self.job.fingerprints(shard), content=True)
            if why is None and marker is not None:
                self._add(marker)
                try:
                    self.journal.rejected_rows(marker, shard)
                except BackfillError as error:
                    self.problems.append(f"shard {shard.number}: {error}")
                continue
            missing += 1
            if missing <= _SAID:
                self.problems.append(f"shard {shard.number} {why}")
        if missing > _SAID:
            self.problems.append(f"and {missing - _SAID:,} more shards like these")

    def _add(self, marker: Marker) -> None:
        self.rows_in, self.rows_out = self.rows_in + marker.rows_in, self.rows_out + marker.rows_out
        self.rejects, self.size = self.rejects + marker.rejects, self.size + sum(o.bytes for o in marker.outputs)
        for output in marker.outputs:
            if output.name in self.rows:
                self.problems.append(f"{output.name} is named by two shards")
            self.rows[output.name] = marker.rows_out

    def _content(self, path: str | os.PathLike[str], access: Opening) -> list[str]:
        """The gallery as any reader sees it: its space, its rows, no file that no shard made."""
        job = self.job
        if is_database(path):
            return []  # it has no files; its rows are counted when they are compared
        try:
            gallery = open_gallery(path, self.journal, job, access)
            problems = []
            if gallery.space != job.new_space:
                problems.append(f"expected vectors of {job.new_space}, the gallery says {gallery.space}")
            pieces = gallery.pieces()
        except FctError as error:
            return [str(error)]
        if job.format != "lance":
            problems += [f"{p.name} was made by no shard" for p in pieces if p.name not in self.rows]
            problems += [
                f"{p.name} holds {p.rows} rows, its shard wrote {self.rows[p.name]}"
                for p in pieces
                if self.rows.get(p.name, p.rows) != p.rows
            ]
        if sum(p.rows for p in pieces) != self.rows_out:
            problems.append(f"expected {self.rows_out} rows, the files hold {sum(p.rows for p in pieces)}")
        return problems


class _Outside:
    """What is proven from outside the gallery: against the source, and by h."""

    def __init__(
        self, journal: Journal, job: Job, path: str | os.PathLike[str], access: Opening, spot: SpotCheck
    ) -> None:
        self.journal, self.job, self.path, self.access, self.spot = journal, job, path, access, spot

    def check(self) -> tuple[AgainstSource, VectorCheck, str]:
        """(what the source said, what h said, why h was not asked)."""
        found, spot = AgainstSource(), self.spot
        old, why = self._open(spot.source, self.job.source, "source")
        if old is None:
            found.unproven.append(f"{_ALL}: {why}")
            return found, VectorCheck(), why
        side, no_side = self._open(spot.side_source, self.job.side, "side_source") if self.job.side else (None, "")
        h, no_h = self._transformation()
        try:
            if side is not None and self.job.side_join == "id":
                joined = join_by_id(old, side, self.job.id_column, self.job.side_vector)
                joined.progress = spot.progress
                side = joined.of(self.job, self.access["retry_policy"])
            new, lists = self._opened(old)
            known = None if no_side else h
            found = compare_with_source(self.journal, self.job, old, new, side=side, h=known, lists=lists)
            found.unproven += changed_since(new)
        except MissingExtraError as error:
            found = AgainstSource(unproven=[f"{_ALL}: {error}"])
            return found, VectorCheck(), str(error)
        except (FctError, OSError, ValueError, pa.ArrowException) as error:
            found.problems.append(f"{old.url} could not be compared: {error}")
        if found.problems:
            return found, VectorCheck(), "other problems come first"
        if not (spot.spot_check or spot.deep) or no_side:
            found.unproven.append(f"not proven: the vectors' values{f': {no_side}' if no_side else ' (no spot check)'}")
            return found, VectorCheck(), no_side
        if h is None:
            return found, VectorCheck(problems=[no_h]), no_h
        return (found, *self._vectors(old, side, new, h))

    def _opened(self, old: Source) -> tuple[Source | DatabaseResult, Path | None]:
        """(the new gallery, the folder of the old one's lists of ids), both databases made to read what the job did."""
        job, lists = self.job, None
        if isinstance(old, DatabaseSource):
            root = self.journal.root if self.spot.journal is None else database_journal(self.spot.journal).root
            named = (job.vector, job.side_column, job.scale_column, job.offset_column, job.ordered_by)
            old.needed = tuple(filter(None, named))
            if root.is_local:
                old.live_in(root.local)
                lists = root.local / "ids"
        if is_database(self.path):
            return DatabaseResult(str(self.path), job, old, self.access["retry_policy"]), lists
        return open_gallery(self.path, self.journal, job, self.access), lists

    def _transformation(self) -> tuple[Transformation | None, str]:
        """(the job's h, or None, and why not)."""
        given = self.spot.transformation
        try:
            h = self.journal.transformation() if given is None else load_transformation(given)
        except (FctError, OSError) as error:
            return None, f"h cannot be read: {error}; name it with transformation (-t)"
        if h.fingerprint != self.job.transformation:
            return None, "the transformation is not the one that this gallery was made with"
        return h, ""

    def _vectors(
        self, old: Source, side: Source | None, new: Source | DatabaseResult, h: Transformation
    ) -> tuple[VectorCheck, str]:
        spot = self.spot
        try:
            pairs = None
            if spot.reembed is not None:
                kind = old.schema.field(self.job.id_column).type if self.job.id_column else None
                pairs = load_true_pairs(spot.reembed, self.job.new_space, kind, self.access)
            checker = VectorChecker(self.journal, self.job, old, side, new, h, pairs)
            with LongCall(spot.progress) as call:
                tell = call.stage("mapping rows again")
                return checker.run(spot.spot_check, seed=spot.seed, deep=spot.deep, tell=tell), ""
        except (FctError, OSError, ValueError) as error:
            return VectorCheck(problems=[f"the rows could not be mapped again: {error}"]), str(error)

    def _open(self, given: GalleryLike | None, named: str, what: str) -> tuple[Source | None, str]:
        """(the source, or None, and why it was not opened). What the journal names needs to be confirmed."""
        if given is None and not self.spot.trust_journal:
            option = what.replace("_", "-")
            return None, (
                f"the {option} was not opened, since only the gallery's journal names it ({named}): name it with "
                f"--{option} ({what}=), or confirm it with --trust-journal (trust_journal=True)"
            )
        try:
            found = open_source(named if given is None else given, **self.access, name=what)
            again = pinned(given, found, named)
            return (found if again is None else open_source(again, **self.access, name=what)), ""
        except (FctError, OSError, ValueError) as error:
            return None, str(error)
