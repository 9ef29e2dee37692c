"""``h.arrow_mapper`` in Spark and in Ray Data against ``fct backfill``: the same Parquet files and processors.

FCT_BENCH_ENGINE_ROWS sets the rows (default 1,000,000) of 128 floats; inner 2048. Wanted: 0.8 of ``fct backfill``.
Each engine is started and warmed by two of the eight files first, one for each of its two workers. Each job writes
Parquet, ids and new vectors in the place of the old: as lists of float32, which the JVM takes apart number by number,
and as binary columns, which it passes on. The engines write as ``fct backfill`` does, without compression or
dictionaries: vectors gain nothing from either.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct

ROOT = Path(__file__).parents[1]  # `python -c` finds tests/ in the folder where it runs
N = int(os.environ.get("FCT_BENCH_ENGINE_ROWS", "1000000"))
D, FILES = 128, 8
PRECISION = "bf16"

SPARK = """
import sys, time, fct
from pyspark.sql import SparkSession
spark = (SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").config("spark.driver.memory", "4g")
         .config("spark.sql.execution.arrow.maxRecordsPerBatch", "32768")
         .config("spark.driver.extraJavaOptions", "-XX:+UseParallelGC").getOrCreate())
mapper = fct.Transformation.load(sys.argv[1]).arrow_mapper(vector="embedding", out="embedding", precision=sys.argv[4])
def run(source, out):
    items = spark.read.parquet(source)
    mapped = items.mapInArrow(mapper, items.schema)
    mapped.write.option("compression", "uncompressed").option("parquet.enable.dictionary", "false").parquet(out)
run(sys.argv[2] + "/part-[01].parquet", sys.argv[3] + "/warm")
begun = time.perf_counter()
run(sys.argv[2], sys.argv[3] + "/new")
print("seconds", time.perf_counter() - begun)
"""
RAY = """
import sys, time, fct, ray
from tests.ray_here import ray_here
mapper = fct.Transformation.load(sys.argv[1]).arrow_mapper(vector="embedding", out="embedding", precision=sys.argv[4])
def run(source, out):
    items = ray.data.read_parquet(source)
    mapped = items.map_batches(mapper, batch_format="pyarrow", batch_size=8192, zero_copy_batch=True)
    mapped.write_parquet(out, compression="none", use_dictionary=False)
with ray_here(num_cpus=2):
    run([f"{sys.argv[2]}/part-{i}.parquet" for i in (0, 1)], sys.argv[3] + "/warm")
    begun = time.perf_counter()
    run(sys.argv[2], sys.argv[3] + "/new")
    print("seconds", time.perf_counter() - begun)
"""
OURS = """
import sys, time, fct
how = dict(old_model="random-old", format="parquet", progress=False, precision=sys.argv[4])
fct.backfill(sys.argv[2] + "/part-0.parquet", sys.argv[3] + "/warm", sys.argv[1], **how)
begun = time.perf_counter()
fct.backfill(sys.argv[2], sys.argv[3] + "/new", sys.argv[1], **how)
print("seconds", time.perf_counter() - begun)
"""


@pytest.fixture(scope="module", params=["list", "binary"])
def items(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """How vectors are kept, the folder of the items, the file of h."""
    folder = tmp_path_factory.mktemp("engines")
    (folder / "items").mkdir()
    rng, rows = np.random.default_rng(0), N // FILES
    for part in range(FILES):
        values = pa.array(rng.standard_normal(rows * D, dtype=np.float32))
        starts = np.arange(0, rows * D + 1, D, dtype=np.int32)
        vectors = pa.ListArray.from_arrays(pa.array(starts), values)
        if request.param == "binary":
            vectors = pa.Array.from_buffers(pa.binary(), rows, [None, pa.py_buffer(4 * starts), values.buffers()[1]])
        table = pa.table({"id": np.arange(part * rows, (part + 1) * rows), "embedding": vectors})
        pq.write_table(table, folder / "items" / f"part-{part}.parquet", compression="none", use_dictionary=False)
    h = fct.Transformation.random(D, D, D, inner=2048, side_info=False)
    return request.param, folder / "items", h.save(folder / "h.safetensors")


def seconds(script: str, items: tuple[str, Path, Path], out: Path) -> float:
    words = [str(items[2]), str(items[1]), str(out), PRECISION]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout.split("seconds")[1])


@pytest.mark.parametrize("engine", ["spark", "ray"])
def test_engine(engine: str, items: tuple[str, Path, Path], tmp_path: Path, record: Callable[..., None]) -> None:
    if engine == "spark" and shutil.which("java") is None:
        pytest.skip("Spark needs Java, and there is none")
    times: dict[str, list[float]] = {"fct": [], engine: []}
    for turn in range(3):
        times["fct"].append(seconds(OURS, items, tmp_path / f"fct{turn}"))
        times[engine].append(seconds({"spark": SPARK, "ray": RAY}[engine], items, tmp_path / f"{engine}{turn}"))
    ours, theirs = (float(np.median(times[name])) for name in ("fct", engine))
    record(
        "engines", what=f"{engine}, {items[0]}, {N:,} x {D}, inner 2048, {PRECISION}", rows_per_s=N / theirs,
        backfill_rows_per_s=N / ours, share_of_backfill=ours / theirs, wanted=0.8,
    )  # fmt: skip
    share = f"{N / theirs:,.0f} rows/s, fct backfill {N / ours:,.0f}: {ours / theirs:.2f} (wanted: 0.80)"
    print(f"{engine}, {items[0]}: {share}")
