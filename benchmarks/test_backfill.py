"""Backfill against the kernel alone, a plain copy through pyarrow, and the naive loop; one run, same rows.

FCT_BENCH_ROWS sets the gallery's size (default 100,000; the issue's case is 10,000,000).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.gallery import open_source, vector_array, vector_block

N = int(os.environ.get("FCT_BENCH_ROWS", "100000"))
D = 128
BATCH = 16384


def make(folder: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """(source, options): old and side-information, written in blocks."""
    rng = np.random.default_rng(0)
    old, side = folder / "old", folder / "side"
    old.mkdir()
    if kind == "npy":
        side.mkdir()
        for place in (old, side):
            rows = np.lib.format.open_memmap(place / "a.npy", "w+", np.float32, (N, D))
            for i in range(0, N, BATCH):
                rows[i : i + BATCH] = rng.standard_normal(rows[i : i + BATCH].shape, dtype=np.float32)
            rows.flush()
        return old, {"side_source": side}
    writer = None
    for i in range(0, N, BATCH):
        n = min(BATCH, N - i)
        columns = {
            "id": np.arange(i, i + n),
            "old": vector_array(rng.standard_normal((n, D), dtype=np.float32), "binary"),
            "side": vector_array(rng.standard_normal((n, D), dtype=np.float32), "binary"),
        }
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(old / "a.parquet", table.schema, compression="none", use_dictionary=False)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return old, {"vector_column": "old"}


def kernel_rate(h: fct.Transformation, precision: str) -> float:
    """Rows per second of transform_batch alone on one batch, over at least two seconds."""
    rng = np.random.default_rng(1)
    old, side = (rng.standard_normal((BATCH, D), dtype=np.float32) for _ in range(2))
    out = np.empty((BATCH, h.d_new), np.float32)
    fct.transform_batch(old, side, h, out=out, precision=precision)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < 2:
        fct.transform_batch(old, side, h, out=out, precision=precision)
        done += BATCH
    return done / (time.perf_counter() - start)


@pytest.mark.parametrize("inner", [128, 2048])
@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_backfill(benchmark: Any, tmp_path: Path, kind: str, inner: int) -> None:
    h = fct.Transformation.random(D, D, D, inner=inner)
    precision = os.environ.get("FCT_BENCH_PRECISION", "bf16")
    source, options = make(tmp_path, kind)
    open_source(source).pieces()
    alone = kernel_rate(h, precision)

    def run() -> fct.BackfillReport:
        return fct.backfill(
            source, tmp_path / "new", h, old_model="random-old", precision=precision, progress=False, **options
        )

    report = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info |= {
        "rows": N, "precision": precision, "rows_per_second": report.rows_per_second, "kernel_rows_per_second": alone,
        "share_of_kernel": report.rows_per_second / alone,
    }  # fmt: skip
    assert report.rows_out == N


def test_copy_through_pyarrow(benchmark: Any, tmp_path: Path) -> None:
    source, _ = make(tmp_path, "parquet")

    def copy() -> None:
        with (
            pq.ParquetFile(source / "a.parquet") as file,
            pq.ParquetWriter(
                tmp_path / "copy.parquet", file.schema_arrow, compression="none", use_dictionary=False
            ) as out,
        ):
            for batch in file.iter_batches(BATCH):
                out.write_batch(batch)
        with open(tmp_path / "copy.parquet", "rb") as written:
            os.fsync(written.fileno())

    benchmark.pedantic(copy, rounds=1)
    benchmark.extra_info |= {"rows": N}


def test_naive_loop(benchmark: Any, tmp_path: Path) -> None:
    """What users write today: batch, torch eager, write."""
    import torch

    h = fct.Transformation.random(D, D, D, inner=2048)
    source, _ = make(tmp_path, "parquet")

    def loop() -> None:
        with pq.ParquetFile(source / "a.parquet") as file, torch.inference_mode():
            blocks = []
            for batch in file.iter_batches(BATCH):
                old, side = (vector_block(batch.column(c), D).values for c in ("old", "side"))
                blocks.append(fct.transform_batch(old, side, h, precision="fp32", backend="torch"))
            pq.write_table(pa.table({"new": vector_array(np.concatenate(blocks))}), tmp_path / "naive.parquet")

    benchmark.pedantic(loop, rounds=1)
    benchmark.extra_info |= {"rows": N}
