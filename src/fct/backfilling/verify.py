"""verify_gallery: every row there once, every byte as it was written, spot checks against the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from typing_extensions import Unpack

from fct.backfilling.job import Job
from fct.backfilling.journal import Journal, rejected_rows, shard_marker
from fct.backfilling.pipeline import RowMapper
from fct.backfilling.resolve import load_transformation
from fct.errors import BackfillError, FctError
from fct.gallery import journal_location, lance_in, location_of, open_source
from fct.gallery.interfaces import rows_at
from fct.gallery.stores import Opening, opening
from fct.gallery.vectors import vector_block
from fct.options.declare import takes
from fct.options.groups import SpotCheck, VerifyOptions
from fct.options.keywords import VerifyKeywords
from fct.types import GalleryLike

__all__ = ["VerifyReport", "gallery_journal", "verify_gallery"]

# Largest error of a row against the float64 reference, over its length: a few roundings of each precision.
_LIMITS = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.15}


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify_gallery` found. ``ok`` when there are no problems.

    rows_in = rows_out + rejects. spot_checked: rows compared with the reference, 0 with ``spot_check_skipped`` saying
    why not; worst_error: the largest relative error of a row among them.
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

    @property
    def ok(self) -> bool:
        return not self.problems


def gallery_journal(path: Any, **access: Any) -> tuple[Journal, Job]:
    """The journal and the job of a backfill's destination. Raises BackfillError when it is none."""
    place = lance_in(location_of(path, **access))
    journal = Journal(journal_location(place, "lance" if place.name.endswith(".lance") else ""), place)
    job = journal.job()
    if job is None:
        raise BackfillError(f"gallery: expected the destination of a backfill, {place} has no _fct/job.json")
    return journal, job


@takes(VerifyOptions)
def verify_gallery(path: GalleryLike, **options: Unpack[VerifyKeywords]) -> VerifyReport:
    """Checks a finished backfill: nothing missing, nothing twice, nothing changed, one space, right values.

    Args:
        path: the new gallery.
        options: listed below.

    Returns:
        VerifyReport with every problem found, each in a sentence.

    Raises:
        BackfillError: not the destination of a backfill, or a job file that cannot be read.

    Example:
        >>> import fct, numpy as np, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> np.save(folder + "/old.npy", np.ones((100, 8), np.float32))
        >>> h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False)
        >>> _ = fct.backfill(folder, folder + "-new", h, old_model="random-old", progress=False)
        >>> fct.verify_gallery(folder + "-new").ok
        True
    """
    given = VerifyOptions.split(options)
    access = opening(given.access)
    journal, job = gallery_journal(path, **access)
    problems: list[str] = []
    try:
        manifest, damaged = journal.manifest(), ""
    except BackfillError as error:
        manifest, damaged = None, str(error)
    if damaged:
        problems.append(f"{damaged}; run the backfill again")
    elif manifest is None:
        problems.append("the backfill is unfinished: it has no manifest")
    elif manifest.get("fingerprint") != job.fingerprint:
        problems.append("the manifest belongs to another job")
    rows_in = rows_out = rejects = size = 0
    known: set[str] = set()
    for shard in job.shards:
        marker = journal.marker(shard.number)
        why = journal.trouble(marker, shard, job.fingerprint, content=True)
        if why is not None or marker is None:
            problems.append(f"shard {shard.number} {why}")
            continue
        rows_in, rows_out, rejects = rows_in + marker.rows_in, rows_out + marker.rows_out, rejects + marker.rejects
        size += sum(o.bytes for o in marker.outputs)
        known |= {o.name for o in marker.outputs}
        if marker.rejected is not None:
            try:
                journal.rejected_rows(marker, shard)
            except BackfillError as error:
                problems.append(f"shard {shard.number}: {error}")
    if rows_in != job.rows or rows_out + rejects != rows_in:
        problems.append(f"expected {job.rows} rows, found {rows_in} in, {rows_out} out and {rejects} rejected")
    for name in ("rows_in", "rows_out", "rejects"):
        if manifest is not None and manifest.get(name) != locals()[name]:
            problems.append(f"the manifest says {name} {manifest.get(name)}, the shards say {locals()[name]}")
    if manifest is not None and not problems:
        problems += _content(path, access, job, known, rows_out)
    checked, worst, skipped = 0, 0.0, ""
    if given.spot.spot_check and not problems:
        checked, worst, skipped, wrong = _spot_check(journal, job, given.spot, access, path)
        problems += wrong
    return VerifyReport(
        job.destination, rows_in, rows_out, rejects, len(job.shards), size, checked, worst, skipped, tuple(problems)
    )


def _content(path: GalleryLike, access: Opening, job: Job, known: set[str], rows: int) -> list[str]:
    """The gallery as any reader sees it: its space, its rows, no file that no shard made."""
    try:
        gallery = open_source(path, **access)
        problems = []
        if gallery.space != job.new_space:
            problems.append(f"expected vectors of {job.new_space}, the gallery says {gallery.space}")
        pieces = gallery.pieces()
    except FctError as error:
        return [str(error)]
    if job.format != "lance":
        problems += [f"{p.name} was made by no shard" for p in pieces if p.name not in known]
    if sum(p.rows for p in pieces) != rows:
        problems.append(f"expected {rows} rows, the files hold {sum(p.rows for p in pieces)}")
    return problems


def _spot_check(
    journal: Journal, job: Job, spot: SpotCheck, access: Opening, path: GalleryLike
) -> tuple[int, float, str, list[str]]:
    """(rows compared, worst relative error, why nothing was compared, problems)."""
    try:
        old = open_source(spot.source if spot.source is not None else job.source, **access)
        beside = spot.side_source if spot.side_source is not None else job.side
        side = open_source(beside, **access, name="side_source") if job.side else None
        h = load_transformation(spot.transformation) if spot.transformation is not None else journal.transformation()
    except (FctError, OSError) as error:
        return 0, 0.0, str(error), []
    if h.fingerprint != job.transformation:
        return 0, 0.0, "", ["the transformation is not the one that this gallery was made with"]
    rng = np.random.default_rng(spot.seed)
    numbers = sorted({int(x) for x in rng.integers(0, len(job.shards), min(16, spot.spot_check))})
    each = -(-spot.spot_check // len(numbers))
    new = open_source(path, **access)
    pieces = new.pieces()
    column = job.vector if job.vector in new.schema.names else "vector"
    mapper = RowMapper(replace(job, precision="fp32", backend="ref"), old.schema, h, threads=None, device="cpu")
    out_starts = np.cumsum([0] + [shard_marker(journal, n).rows_out for n in range(len(job.shards))])
    checked, worst, problems = 0, 0.0, []
    for number in numbers:
        shard = job.shards[number]
        take = min(each, shard.rows)
        start = int(rng.integers(0, shard.rows - take + 1))
        batch = pa.concat_batches(list(old.read(job.pieces[shard.piece], shard.start + start, take, take)))
        other = pa.concat_batches(list(rows_at(side, job.side_pieces, shard.first + start, take))) if side else None
        gone = rejected_rows(journal, job.shards[number])
        mapped, rejects = mapper(batch, other, shard.first + start)
        inside = {row for row in gone if shard.first + start <= row < shard.first + start + take}
        if {r["row"] for r in rejects} != inside:
            problems.append(f"shard {number} rejected other rows than the source holds now")
            continue
        if not mapped.num_rows:
            continue
        first = int(out_starts[number]) + start - sum(row < shard.first + start for row in gone)
        stored = pa.concat_batches(list(rows_at(new, pieces, first, mapped.num_rows)))
        want = vector_block(mapped.column(job.vector), h.d_new, job.dtype).values.astype(np.float64)
        got = vector_block(stored.column(column), h.d_new, job.dtype).values.astype(np.float64)
        wrong = np.linalg.norm(got - want, axis=1) / np.maximum(np.linalg.norm(want, axis=1), 1e-12)
        checked, worst = checked + len(wrong), max(worst, float(wrong.max()))
        limit = _LIMITS[job.precision] + (1e-3 if job.dtype == "float16" else 0.0)
        if wrong.max() > limit:
            row = shard.first + start + int(wrong.argmax())
            problems.append(
                f"shard {number}: a row near row {row} of the source is {wrong.max():.2g} off the reference, "
                f"expected at most {limit:g} at {job.precision}"
            )
        names = [n for n in (job.id_column,) if n and n in stored.schema.names]
        if any(not _same(stored.column(n), mapped.column(n)) for n in names):
            problems.append(f"shard {number} holds other ids than the source")
    return checked, worst, "", problems


def _same(a: pa.Array, b: pa.Array) -> bool:
    """Whether two columns hold the same: an id that is NaN is itself, and a dictionary may be another."""
    if pa.types.is_dictionary(a.type):
        a, b = (x.dictionary_decode() for x in (a, b))
    if pa.types.is_floating(a.type):
        return np.array_equal(a.to_numpy(zero_copy_only=False), b.to_numpy(zero_copy_only=False), equal_nan=True)
    return bool(a.equals(b))
