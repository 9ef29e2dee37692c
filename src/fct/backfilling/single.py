"""One file to one file: the same readers, mapper and writers, without a journal."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from fct.atomic_files import refuse_existing
from fct.backfilling.job import BackfillError, cut_shards
from fct.backfilling.plan import resolve
from fct.checks import check_flag
from fct.gallery.file_gallery import FileDestination
from fct.gallery.interfaces import Batches, Shard
from fct.gallery.location import Location, location_of

__all__ = ["transform_file"]

_FORMATS = {".npy": "npy", ".fbin": "bin", ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow"}


def transform_file(
    old: Any, out: Any, transformation: Any, *, threads: int | None = None, overwrite: bool = False, **options: Any
) -> int:
    """Maps the rows of ``old`` into the one file ``out``, which appears whole or not at all. Returns the row count.

    Args:
        old: a file or a gallery; ``out``: .npy, .fbin, .parquet or .arrow. Other columns go along into .parquet and
            .arrow, and are left behind by the others.
        options: as :func:`fct.plan_backfill` has them.

    Raises:
        BackfillError: a bad row; it is named and nothing is written. FileExistsError: ``out`` is there.
    """
    check_flag(overwrite, "overwrite")
    target = refuse_existing(out, overwrite=overwrite, name="out").absolute()
    if target.suffix not in _FORMATS:
        raise ValueError(f"out: expected a name ending in {', '.join(_FORMATS)}, got {os.fspath(out)!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        found = resolve(old, folder, transformation, format=_FORMATS[target.suffix], **options)
        job = found.job
        mapper, reader = found.mapper(job, threads=threads), found.reader(job)

        def rows() -> Batches:
            for shard in cut_shards(job.pieces, job.shard_rows):
                at = shard.first
                for batch, side in reader.batches(shard):
                    mapped, rejects = mapper(batch, side, at)
                    if rejects:
                        raise BackfillError(f"old: row {rejects[0]['row']}: {rejects[0]['reason']}")
                    at += batch.num_rows
                    yield mapped

        assert isinstance(found.destination, FileDestination)
        part = Path(folder) / "part"
        found.destination.write_file(part, Shard(0, 0, 0, job.rows, 0), rows(), {})
        Location(location_of(target).fs, str(target)).publish(part)
    return job.rows
