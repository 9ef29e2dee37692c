"""How fast a backfill would be here: h, reading and writing, each measured for a moment."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from fct.atomic_files import checksum_file
from fct.backfilling.input_digest import InputDigest
from fct.backfilling.pipeline import BATCH_BYTES, RowMapper
from fct.backfilling.resolve import Context
from fct.gallery import Location
from fct.gallery.file_gallery import FileDestination
from fct.gallery.interfaces import Shard

__all__ = ["Pace", "measure_h", "measure_reading", "measure_writing"]

_WRITE_BYTES = 512 << 20  # at most, to measure writing


@dataclass
class Pace:
    """What a row costs: seconds on the clock of each stage, and processor seconds of reading and writing.

    row_bytes: of a written row with all its columns, once writing was measured.
    """

    h_rate: float
    on_cpu: bool
    threads: int
    read: float = 0.0
    write: float = 0.0
    upload: float = 0.0
    cpu: float = 0.0
    row_bytes: float = 0.0

    def together(self) -> tuple[float, str]:
        """(rows per second, which stage binds). Stages overlap; what runs on the processors adds up there."""
        stages = {"h": 1 / self.h_rate, "reading": self.read, "writing": self.write, "uploading": self.upload}
        if self.on_cpu:
            stages["h"] += self.cpu / self.threads
        binds = max(stages, key=lambda name: stages[name])
        return 1 / stages[binds], binds


def measure_reading(pace: Pace, context: Context, mapper: RowMapper, seconds: float) -> None:
    """Rows as the backfill reads them, with the checksum of what was read."""
    reader, rows = context.reader(context.job), 0
    wall, cpu = time.perf_counter(), time.process_time()
    for shard in context.job.shards:
        for batch, side in reader.batches(shard):
            mapper.digest(batch, side, InputDigest())
            rows += batch.num_rows
            if time.perf_counter() - wall > seconds:
                break
        if time.perf_counter() - wall > seconds:
            break
    pace.read, pace.cpu = (time.perf_counter() - wall) / rows, pace.cpu + (time.process_time() - cpu) / rows


def measure_writing(pace: Pace, context: Context, mapped: list[pa.RecordBatch]) -> None:
    """The mapped sample, again and again to a shard's size, as the backfill encodes, checks and publishes it."""
    rows = sum(batch.num_rows for batch in mapped)
    if not isinstance(context.destination, FileDestination) or not rows:
        return
    job = context.job
    once = pa.Table.from_batches(mapped)
    again = min(job.batch_rows // rows, BATCH_BYTES // max(1, once.nbytes))  # whatever a row's payload is
    full = pa.concat_tables([once] * max(1, again)).combine_chunks().to_batches()[0]
    times = max(1, min(job.shard_rows, job.rows) // full.num_rows)
    times = min(times, max(1, _WRITE_BYTES // max(1, full.nbytes)))
    with tempfile.TemporaryDirectory(prefix="fct-plan-") as folder:
        part = Path(folder) / "part"
        wall, cpu = time.perf_counter(), time.process_time()
        files = {part.name: part}
        context.destination.write_file(part, Shard(0, 0, 0, times * full.num_rows, 0), iter([full] * times), files)
        size = sum(file.stat().st_size for file in files.values())
        with open(part, "rb", buffering=0) as file:
            checksum_file(file)
        Location(LocalFileSystem(), str(part.with_name("whole"))).publish(part)
        done = times * full.num_rows
        pace.row_bytes = size / done
        pace.write, pace.cpu = (time.perf_counter() - wall) / done, pace.cpu + (time.process_time() - cpu) / done


def measure_h(mapper: RowMapper, seconds: float) -> float:
    """Rows per second of h alone, on random rows of the default batch, for about ``seconds``."""
    h, rng = mapper.h, np.random.default_rng(0)
    n = min(mapper.job.batch_rows, 4096)
    old = rng.standard_normal((n, h.d_old), dtype=np.float32)
    side = rng.standard_normal((n, h.d_side), dtype=np.float32) if h.uses_side_info else None
    out = np.empty((n, h.d_new), mapper.job.dtype)
    mapper._map(old, side, out)  # packs h, warms up
    done, start = 0, time.perf_counter()
    while done == 0 or time.perf_counter() - start < seconds:
        mapper._map(old, side, out)
        done += n
    return done / (time.perf_counter() - start)
