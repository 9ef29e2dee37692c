"""Beginning, going on and finishing: what a run believes of the journal, and what it leaves there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fct.backfilling.backfill_bar import Bar
from fct.backfilling.claim import known_key, refuse_claimed, release, take_claim
from fct.backfilling.input_digest import InputDigest
from fct.backfilling.job import Job
from fct.backfilling.journal import BEFORE_A_JOB, Journal, system_errors
from fct.backfilling.marker import Marker
from fct.backfilling.new_location import occupied
from fct.backfilling.resolve import Context
from fct.backfilling.row_mapper import RowMapper, output_schema
from fct.errors import BackfillError, FctError
from fct.gallery.file_gallery import FileDestination
from fct.gallery.interfaces import Piece, Shard, Source
from fct.gallery.space_tags import OURS, side_file_space

__all__ = ["begin", "finish", "is_whole_beside", "kept_shards", "refuse_strangers"]


# Of a job, what may change from run to run: galleries are moved, and reached by other URLs.
_LOCATIONS = ("source", "destination", "side", "url_key", "source_parts", "side_parts", "destination_parts")


def begin(context: Context, say: Callable[[str], None], *, follow: bool = False) -> Job:
    """The job in the destination when it is this one, else a new one; clears what a killed run left half made.

    follow: files that came since the job was begun are added to it, behind those that it has.
    """
    journal = context.journal
    stored = journal.job()
    if stored is None:
        return _begin_anew(context)
    if journal.apart and stored.destination != context.job.destination:
        raise BackfillError(
            f"journal: {journal.root} is the journal of {stored.destination}, not of {context.job.destination}: name "
            f"another folder; if the gallery was moved, the journal belongs in it, as {journal.destination / OURS}"
        )
    if follow:
        stored = _with_what_came(stored, context.job, journal)
    differences = stored.differences(context.job)
    files = isinstance(context.destination, FileDestination)
    if differences and files and not journal.marked() and not occupied(journal.destination):
        journal.start(context.job)  # the other failed before its first shard: there is nothing that could be mixed
        return context.job
    if differences:
        raise BackfillError(
            f"destination: {journal.destination} holds another backfill, and the two are not mixed: "
            + "; ".join(differences[:5])
        )
    _check_numbers(journal, stored)
    _check_stamps(context, stored, say)
    if not journal.sealed:
        _check_unsealed(context, stored, say)
    journal.sweep()
    moved = replace(stored, **{name: getattr(context.job, name) for name in _LOCATIONS})
    if moved != stored or not journal.sealed:  # whoever verifies looks in the right place; the cut into shards stays
        journal.start(moved)
    return replace(moved, backend=context.job.backend)


def _begin_anew(context: Context) -> Job:
    claimed = take_claim(context.journal)
    try:
        refuse_strangers(context)
    except BackfillError:
        if claimed:
            release(context.journal)
        raise
    context.journal.start(context.job)
    return context.job


def refuse_strangers(context: Context) -> None:
    """Raises BackfillError where a new job's rows, or its journal, would be strewn among what is somebody else's."""
    journal = context.journal
    refuse_claimed(journal.destination, known_key(journal))
    others = [] if context.destination.shared else occupied(journal.destination)
    if others:
        raise BackfillError(
            f"destination: expected an empty folder or a backfill to continue, {journal.destination} holds "
            f"{', '.join(others[:3])} (a backfill that was begun with --journal goes on with it alone)"
        )
    strange = [*journal.root.files(), *journal.root.folders()] if journal.apart else []
    strange = [name for name in strange if name not in BEFORE_A_JOB]
    if strange:
        raise BackfillError(
            f"journal: expected an empty folder, a new one, or the journal of this backfill, {journal.root} holds "
            f"{', '.join(strange[:3])}"
        )


def _with_what_came(stored: Job, now: Job, journal: Journal) -> Job:
    """The stored job with the files behind it that it lacks, written down; it as it is where there are none."""
    new, side = (_lacking(getattr(stored, name), getattr(now, name)) for name in ("pieces", "side_pieces"))
    longer = replace(stored, pieces=stored.pieces + new, side_pieces=stored.side_pieces + side)
    if not new or longer.differences(now):
        return stored
    if now.side_pieces and sum(p.rows for p in new) != sum(p.rows for p in side):
        raise BackfillError(
            f"side_source: expected {sum(p.rows for p in new)} new rows to match the new files of the source, got "
            f"{sum(p.rows for p in side)}"
        )
    begun = (len(stored.pieces), len(stored.side_pieces))
    longer = replace(longer, passes=(*stored.passes, begun), begun_as="")
    if stored.begun_as:
        raise BackfillError("source: a backfill that was begun by an older version cannot be followed: finish it first")
    journal.unfinish()
    journal.start(longer)
    return longer


def _lacking(have: Sequence[Piece], now: Sequence[Piece]) -> tuple[Piece, ...]:
    names = {p.name for p in have}
    return tuple(p for p in now if p.name not in names)


def _check_numbers(journal: Journal, job: Job) -> None:
    """Raises BackfillError where the journal names shards that the job does not have: its cut was changed."""
    strange = [number for number in journal.marked() if number >= len(job.shards)]
    if strange:
        raise BackfillError(
            f"destination: {journal.root / f'done/{strange[0]:08d}.json'} names shard {strange[0]}, and the job in "
            f"{journal.root / 'job.json'} has {len(job.shards)}: one of them was changed. Restore it from a copy, or "
            "start over in another destination"
        )


def _check_stamps(context: Context, stored: Job, say: Callable[[str], None]) -> None:
    """An input with another time stamp may be the same file restored: what was done from it is read again and compared.
    So it is where markers of version 0.1 do not say which rows they are of, and the row groups are others now.

    Raises BackfillError when it is not the same.
    """
    for name, what in (("pieces", "source"), ("side_pieces", "side-information")):
        old, now = getattr(stored, name), {p.name: p for p in getattr(context.job, name)}
        changed = {i for i, a in enumerate(old) if a.stamp != now[a.name].stamp}
        regrouped = {i for i, a in enumerate(old) if a.groups != now[a.name].groups}
        if changed:
            names = ", ".join(old[i].name for i in sorted(changed)[:3])
            say(f"{what}: {names} has another time stamp; comparing its rows with what was done from it")
        if changed or regrouped:
            _compare_input(context, stored, what, changed, regrouped)


def _check_unsealed(context: Context, stored: Job, say: Callable[[str], None]) -> None:
    """A job without a checksum was begun by version 0.1, whose markers do not say which rows they are of: what was done
    is read again and compared, once. Where a marker says it, the job has lost its checksum.

    Raises BackfillError where it is another job's, or its numbers were changed.
    """
    journal = context.journal
    markers = (journal.marker(number) for number in journal.marked())
    if any(marker is not None and marker.piece is not None for marker in markers):
        raise BackfillError(
            f"destination: {journal.root / 'job.json'} is not a job that can be continued: it has lost its checksum. "
            "Restore the file from a copy, or start over in another destination"
        )
    say(f"{journal.root / 'job.json'} is of version 0.1; comparing what was done with the source")
    _compare_input(context, stored, "source", set(range(len(stored.pieces))), set())


def _compare_input(context: Context, stored: Job, what: str, changed: set[int], regrouped: set[int]) -> None:
    mapper = context.mapper(stored)
    for number in context.journal.marked():
        marker, shard = context.journal.marker(number), stored.shards[number]
        if marker is None:
            continue
        again = changed | regrouped if marker.piece is None else changed
        touched = {shard.piece} if what == "source" else _side_touched(stored, shard)
        if touched & again and input_checksum(context, stored, shard, mapper, marker.digest) != marker.input:
            files = stored.pieces if what == "source" else stored.side_pieces
            names = ", ".join(files[i].name for i in sorted(touched & again)[:3])
            raise BackfillError(
                f"{what}: {names} changed since this backfill began, and old and new rows are not mixed: restore "
                f"the file, or start over in another destination"
            )


def _side_touched(job: Job, shard: Shard) -> set[int]:
    if job.side_join == "id":
        return set(range(len(job.side_pieces)))
    touched, first = set(), 0
    for i, piece in enumerate(job.side_pieces):
        if first < shard.first + shard.rows and first + piece.rows > shard.first:
            touched.add(i)
        first += piece.rows
    return touched


def input_checksum(context: Context, job: Job, shard: Shard, mapper: RowMapper, version: int) -> str:
    """XXH64 of a shard's rows as they are in the source now. version: of :class:`InputDigest`."""
    digest = InputDigest(version)
    for batch, side in context.reader(job).batches(shard, bound=version > 1):
        mapper.digest(batch, side, digest)
    return digest.hexdigest()


def kept_shards(journal: Journal, job: Job, *, content: bool, bar: Bar) -> dict[int, Marker]:
    """The shards that are proven done."""
    kept = {}
    numbers = [n for n in journal.marked() if n < len(job.shards)]
    for number in bar.track(numbers, "checking what is done"):
        marker = journal.marker(number)
        shard = job.shards[number]
        why = journal.trouble(marker, shard, job.fingerprints(shard), content=content)
        if why is None and marker is not None:
            kept[number] = marker
        else:
            bar.say(f"shard {number} {why}: doing it again")
    return kept


def is_whole_beside(context: Context, job: Job) -> bool:
    """Whether what lies beside the rows of a finished gallery is what was written: h, and a folder's space."""
    destination = context.destination
    try:
        if (
            isinstance(destination, FileDestination)
            and destination.beside
            and side_file_space(destination.location) != job.new_space
        ):
            return False
        return context.journal.transformation().fingerprint == job.transformation
    except (FctError, FileNotFoundError):
        return False


def finish(context: Context, job: Job, markers: dict[int, Marker], *, follow: bool = False) -> bool:
    """Counts everything once more, commits the destination, and writes the manifest: last, and atomically.

    follow: where files came meanwhile, nothing is committed, and False is returned: they are to be mapped first.
    """
    rows_in = sum(m.rows_in for m in markers.values())
    rows_out = sum(m.rows_out for m in markers.values())
    rejects = sum(m.rejects for m in markers.values())
    if rows_in != job.rows or rows_out + rejects != rows_in or len(markers) != len(job.shards):
        raise BackfillError(
            f"backfill: expected {job.rows} rows, counted {rows_in} in, {rows_out} out and {rejects} rejected"
        )
    grown = _require_unchanged(context.source, context.job.pieces, "source", follow)
    if context.side is not None:
        grown = _require_unchanged(context.side, context.job.side_pieces, "side_source", follow) or grown
    if grown:
        return False
    context.journal.sweep()  # what a worker on a lost machine left half-written: its shards were done by others
    ordered = [markers[number] for number in range(len(markers))]
    if isinstance(context.destination, FileDestination):
        context.destination.begin(output_schema(job, context.source.schema), job.new_space)  # its side file, once more
    with system_errors("the new gallery could not be finished", context.destination.url):
        context.destination.finish([m.extra for m in ordered], output_schema(job, context.source.schema), job.new_space)
    context.journal.keep_transformation(context.h)
    context.journal.finish(
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
    return True


def _require_unchanged(source: Source, then: Sequence[Piece], what: str, follow: bool) -> bool:
    """Whether files came since this run began, which only ``follow`` admits.

    Raises:
        BackfillError: the input is not what it was.
    """
    source.refresh()
    now, before = {p.name: p for p in source.pieces()}, {p.name: p for p in then}
    changed = [name for name in sorted(now.keys() | before.keys()) if now.get(name) != before.get(name)]
    if follow and changed and not before.keys() & set(changed):
        return True
    if changed:
        how = ("is new", "is gone", "changed")[0 if changed[0] not in before else 1 if changed[0] not in now else 2]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise BackfillError(
            f"{what}: {changed[0]} {how}{more}, while the gallery was read: put it back as it was and start again, "
            + ("map it too with --follow (follow=True), or " if how == "is new" else "or ")
            + "start over in another destination"
        )
    return False
