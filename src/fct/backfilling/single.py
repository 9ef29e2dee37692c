"""One file to one file: the same readers, mapper and writers, without a journal."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from typing_extensions import Unpack

from fct.atomic_files import refuse_existing, replace_folder
from fct.backfilling.job import cut_shards
from fct.backfilling.resolve import resolve
from fct.checks import check_flag
from fct.errors import BackfillError
from fct.gallery.file_gallery import FileDestination
from fct.gallery.interfaces import Batches, Shard
from fct.gallery.location import Location, location_of
from fct.options.declare import takes
from fct.options.groups import Cut, JobOptions, TransformFileOptions
from fct.options.keywords import TransformFileKeywords
from fct.types import Format, GalleryLike, TransformationLike

__all__ = ["transform_file"]

_FORMATS: dict[str, Format] = {
    ".npy": "npy",
    ".fbin": "bin",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".vortex": "vortex",
    ".lance": "lance",
}


@takes(TransformFileOptions)
def transform_file(
    old: GalleryLike,
    out: str | os.PathLike[str],
    transformation: TransformationLike,
    *,
    overwrite: bool = False,
    **options: Unpack[TransformFileKeywords],
) -> int:
    """Maps the rows of ``old`` into the one file ``out``, which appears whole or not at all. Returns the row count.

    Args:
        old: a file or a gallery; ``out``: .npy, .fbin, .parquet, .arrow, .vortex or .lance. Other columns are
            left behind by .npy and .fbin, and go along into the others.
        overwrite: replace ``out``. options: listed below.

    Raises:
        BackfillError: a bad row; it is named and nothing is written. FileExistsError: ``out`` is there.
    """
    check_flag(overwrite, "overwrite")
    given = TransformFileOptions.split(options)
    is_folder = os.fspath(out).endswith(".lance")
    target = refuse_existing(out, overwrite=overwrite, name="out", folder=is_folder).absolute()
    if target.suffix not in _FORMATS:
        raise ValueError(f"out: expected a name ending in {', '.join(_FORMATS)}, got {os.fspath(out)!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        job_options = JobOptions(
            access=given.access,
            columns=given.columns,
            output=given.output,
            execution=given.execution,
            cut=Cut(format=_FORMATS[target.suffix]),
        )
        part = Path(folder) / f"part{target.suffix}"
        found = resolve(old, part if target.suffix == ".lance" else folder, transformation, job_options)
        job = found.job
        mapper, reader = found.mapper(job, threads=given.execution.threads), found.reader(job)

        def rows() -> Batches:
            for shard in cut_shards(job.pieces, job.shard_rows):
                at = shard.first
                for batch, side in reader.batches(shard):
                    mapped, rejects = mapper(batch, side, at)
                    if rejects:
                        raise BackfillError(f"old: row {rejects[0]['row']}: {rejects[0]['reason']}")
                    at += batch.num_rows
                    yield mapped

        whole = Shard(0, 0, 0, job.rows, 0)
        if isinstance(found.destination, FileDestination):
            found.destination.write_file(part, whole, rows(), {})
            Location(location_of(target).fs, str(target)).publish(part)
        else:  # a dataset, which is a folder
            _, extra = found.destination.write(whole, rows(), Path(folder))
            found.destination.finish([extra], mapper.schema, job.new_space)
            replace_folder(target, part)
    return job.rows
