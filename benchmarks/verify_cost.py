"""What verify costs, and which share of it the second reading of the source is: ``python -m benchmarks.verify_cost``.

A Parquet gallery of 128 dimensions with text payload, FCT_BENCH_ROWS rows (200,000), mapped by a small h. Three calls
in turn, three rounds, medians: what the journal alone proves, the source as well, and the vectors as well.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import fct

N, D = int(os.environ.get("FCT_BENCH_ROWS", "200000")), 128
ROUNDS = 3


def gallery(where: Path) -> Path:
    where.mkdir()
    rows = np.random.default_rng(0).standard_normal((N, D), dtype=np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), D)
    text = pa.array([f"a title of item {i}" for i in range(N)])
    pq.write_table(pa.table({"id": np.arange(N), "title": text, "embedding": vectors}), where / "a.parquet")
    return where


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, new = gallery(Path(folder) / "old"), Path(folder) / "new"
        h = fct.Transformation.random(D, D, D, inner=256, side_info=False)
        began = time.perf_counter()
        fct.backfill(source, new, h, old_model="random-old", progress=False)
        mapped = time.perf_counter() - began
        calls = {
            "the journal alone": {},
            "and the source, read again": {"source": source, "spot_check": 0},
            "and 1,024 vectors": {"source": source},
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, options in calls.items():
                began = time.perf_counter()
                assert fct.verify_gallery(new, progress=False, **options).ok  # type: ignore[arg-type]
                seconds[name].append(time.perf_counter() - began)
        whole = statistics.median(seconds["and 1,024 vectors"])
        print(f"{N:,} rows: backfill {mapped:.2f} s")
        for name, found in seconds.items():
            print(
                f"verify, {name}: {statistics.median(found):.2f} s, {statistics.median(found) / whole:.0%} of the whole"
            )


if __name__ == "__main__":
    main()
