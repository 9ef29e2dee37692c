"""Backfill against the kernel alone, a copy through pyarrow, what users write today, isotrieve, and itself on Ray.

FCT_BENCH_ROWS sets the gallery's size (default 200,000; the full case is 10,000,000: 16 GB of disk at its peak, since
each gallery is made once, used by its tests and removed). Rows are 128 + 128 -> 128 float32. The table is
``backfill``; above WHOLE rows its name says how many.

Up to WHOLE rows a gallery is one file, back-filled three times. A larger one is ten files, each back-filled as a job of
its own, since a machine drifts in the minutes that all of it takes: the kernel alone is measured before and after every
part, and a part is compared with its own neighbours. Each part pays for its start and its end, a run over all rows only
once.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.artifact.transformation import Transformation
from fct.fit.precision_choice import calibrate
from fct.gallery import open_source, vector_array
from fct.gallery.matrix_files import npy_header
from tests.ray_here import ray_here

N = int(os.environ.get("FCT_BENCH_ROWS", "200000"))
WHOLE = 2_000_000
TABLE = "backfill" if N <= WHOLE else f"backfill, {N:,} rows"
PARTS = 10 if N > WHOLE else 1
D = 128
BLOCK = 65536
BATCH = 16384
# "binary": Parquet's fixed-length byte arrays; "list": FixedSizeList, which Parquet stores as LIST with levels.
KINDS = ("npy", "parquet, binary", "parquet, list")


@dataclass
class Gallery:
    kind: str
    source: Path
    side: Path | None
    folder: Path
    parts: int
    copied: dict[str, float] = field(default_factory=dict)  # the copy's rows/s and CPU seconds a row, once measured

    @property
    def suffix(self) -> str:
        return ".npy" if self.kind == "npy" else ".parquet"

    def names(self) -> list[str]:
        return [f"{part}{self.suffix}" for part in range(self.parts)]

    def job(self, name: str = "") -> tuple[Path, dict[str, Any]]:
        """(source, options) of a backfill of everything, or of one file."""
        if self.side is not None:
            return self.source / name, {"side_source": self.side / name}
        return self.source / name, {"vector_column": "old"}


def blocks(n: int, start: int = 0) -> Iterator[tuple[int, Any, Any]]:
    """(first row, old, side) of n rows: the same random rows again and again, told apart by their first element."""
    rng = np.random.default_rng(0)
    old, side = rng.standard_normal((2, BLOCK, D), dtype=np.float32)
    for first in range(start, start + n, BLOCK):
        rows = min(BLOCK, start + n - first)
        old[:, 0] = np.arange(first, first + BLOCK) % 1009 / 1009
        yield first, old[:rows], side[:rows]


def make(folder: Path, kind: str, n: int, parts: int = 1) -> Gallery:
    gallery = Gallery(kind, folder / "old", folder / "side" if kind == "npy" else None, folder, parts)
    gallery.source.mkdir(parents=True)
    if gallery.side is not None:
        gallery.side.mkdir()
    for part, name in enumerate(gallery.names()):
        start = n * part // parts
        rows = n * (part + 1) // parts - start
        if gallery.side is not None:
            with open(gallery.source / name, "wb") as a, open(gallery.side / name, "wb") as b:
                for file in (a, b):
                    file.write(npy_header((rows, D), np.dtype(np.float32)))
                for _, old, side in blocks(rows, start):
                    a.write(old.data.cast("B"))
                    b.write(side.data.cast("B"))
        else:
            write_parquet(
                gallery.source / name, "binary" if kind.endswith("binary") else "fixed_size_list", rows, start
            )
    return gallery


def write_parquet(path: Path, form: str, n: int, start: int) -> None:
    writer = None
    for first, old, side in blocks(n, start):
        columns = {
            "id": np.arange(first, first + len(old)),
            "old": vector_array(old, form),
            "side": vector_array(side, form),
        }
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(
            path, table.schema, compression="none", use_dictionary=False, write_page_checksum=True
        )
        writer.write_table(table)
    assert writer is not None
    writer.close()


@pytest.fixture(scope="session", params=KINDS)
def gallery(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gallery]:
    folder = tmp_path_factory.mktemp("gallery")
    yield make(folder, request.param, N, PARTS)
    shutil.rmtree(folder)


def transformation(inner: int) -> Transformation:
    h = Transformation.random(D, D, D, inner=inner)
    return calibrate(h, *np.random.default_rng(3).standard_normal((2, 1024, D), dtype=np.float32))


def kernel_rates(h: Transformation, precision: str, windows: int = 3) -> list[float]:
    """Rows per second of transform_batch alone on one batch that stays in cache, in windows of a second."""
    old, side = np.random.default_rng(1).standard_normal((2, BATCH, D), dtype=np.float32)
    out = np.empty((BATCH, h.d_new), np.float32)
    rates = []
    fct.transform_batch(old, side, h, out=out, precision=precision)
    for _ in range(windows):
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < 1:
            fct.transform_batch(old, side, h, out=out, precision=precision)
            done += BATCH
        rates.append(done / (time.perf_counter() - start))
    return rates


def copy(gallery: Gallery) -> None:
    """What a backfill reads and writes, without a transformation: ids, old and side-information in, ids and one vector
    column out, the same encodings, page checksums verified and written, fsync at the end."""
    target = gallery.folder / "copy"
    target.mkdir()
    for name in gallery.names():
        if gallery.side is not None:
            with (
                pa.OSFile(str(gallery.source / name)) as old,
                pa.OSFile(str(gallery.side / name)) as side,
                pa.OSFile(str(target / name), "wb") as out,
            ):
                while rows := old.read_buffer(BATCH * D * 4):
                    side.read_buffer(BATCH * D * 4)
                    out.write(rows)
            continue
        with pq.ParquetFile(gallery.source / name, page_checksum_verification=True) as file:
            schema = file.schema_arrow.remove(file.schema_arrow.get_field_index("side"))
            with pq.ParquetWriter(
                target / name,
                schema,
                compression={"id": "snappy", "old": "none"},
                use_dictionary=["id"],
                write_statistics=["id"],
                write_page_checksum=True,
            ) as writer:
                for batch in file.iter_batches(BATCH):
                    writer.write_batch(batch.select(["id", "old"]))
    for path in target.iterdir():
        with open(path, "rb+") as written:
            os.fsync(written.fileno())
    shutil.rmtree(target)


@pytest.mark.parametrize(("inner", "precision"), [(2048, "bf16"), (2048, "int8"), (128, "bf16")])
def test_backfill(
    gallery: Gallery, inner: int, precision: str, threads: int, record: Callable[..., None], benchmark: Any
) -> None:
    h, new = transformation(inner), gallery.folder / "new"
    common: dict[str, Any] = {"old_model": "random-old", "precision": precision, "progress": False, "threads": threads}
    alone: list[list[float]] = []  # the kernel's windows before the first part, between the parts, after the last
    reports: list[fct.BackfillReport] = []

    def setup() -> tuple[tuple[Path, dict[str, Any]], dict[str, Any]]:
        shutil.rmtree(new, ignore_errors=True)
        if gallery.parts > 1 or not alone:
            alone.append(kernel_rates(h, precision))
        return gallery.job(gallery.names()[len(reports)] if gallery.parts > 1 else ""), {}

    def run(source: Path, options: dict[str, Any]) -> None:
        reports.append(fct.backfill(source, new, h, **common, **options))

    list(open_source(gallery.source).pieces())
    benchmark.pedantic(run, setup=setup, rounds=gallery.parts if gallery.parts > 1 else 3)
    shutil.rmtree(new)
    alone.append(kernel_rates(h, precision))
    rates = [report.rows_per_second for report in reports]
    windows = [rate for group in alone for rate in group]
    kernel = statistics.median(windows)
    if gallery.parts > 1:
        assert sum(report.rows_out for report in reports) == N
        ours = N / sum(report.seconds for report in reports)
    else:
        assert [report.rows_out for report in reports] == [N] * 3
        ours = statistics.median(rates)
    facts: dict[str, Any] = {"kernel_rows_per_s": kernel, "share_of_kernel": ours / kernel}
    facts["kernel_spread"] = (max(windows) - min(windows)) / kernel
    if gallery.parts > 1:
        shares = [
            rate / statistics.median(before + after)
            for rate, (before, after) in zip(rates, itertools.pairwise(alone), strict=True)
        ]
        facts |= {"part_share": statistics.median(shares), "part_low": min(shares), "part_high": max(shares)}
    if inner == 128:
        if not gallery.copied:
            copied = []
            for _ in range(1 if N > WHOLE else 3):
                start, cpu = time.perf_counter(), time.process_time()
                copy(gallery)
                copied.append((time.perf_counter() - start, time.process_time() - cpu))
            wall, cpu = (statistics.median(x) for x in zip(*copied, strict=True))
            gallery.copied = {"rows_per_s": N / wall, "cpu": cpu / N}
        rate, cost = gallery.copied["rows_per_s"], gallery.copied["cpu"]
        record(TABLE, what=f"pyarrow copy, {gallery.kind}", rows=N, rows_per_s=rate)
        # What these processors could do at most: h's and the copy's CPU time, perfectly spread.
        possible = threads / (threads / kernel + cost)
        facts |= {"share_of_copy": ours / rate, "share_of_possible": ours / possible}
    record(
        TABLE, what=f"fct, {gallery.kind}", inner=inner, precision=precision, rows=N, rows_per_s=ours, **facts
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_naive_loop(precision: str, threads: int, record: Callable[..., None], tmp_path: Path) -> None:
    """What users write today: a pyarrow batch, torch eager, write."""
    import torch

    from fct.bench.peers import torch_module

    n = min(N, 100_000)
    h, source = transformation(2048), make(tmp_path, "parquet, list", n).source
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = torch_module(h, dtype)
    start = time.perf_counter()
    with pq.ParquetFile(source / "0.parquet") as file, torch.inference_mode():
        writer = None
        for batch in file.iter_batches(BATCH):
            old, side = (
                torch.from_numpy(batch.column(c).flatten().to_numpy().reshape(-1, D).copy()).to(dtype)
                for c in ("old", "side")
            )
            new = model(old, side).float().numpy()
            table = pa.table({"id": batch.column("id"), "new": vector_array(new)})
            writer = writer or pq.ParquetWriter(tmp_path / "new.parquet", table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()
    rate = n / (time.perf_counter() - start)
    assert pq.read_metadata(tmp_path / "new.parquet").num_rows == n
    record("backfill", what="pyarrow -> torch eager -> write", inner=2048, precision=precision, rows=n, rows_per_s=rate)


def test_float64_lists(threads: int, record: Callable[..., None], tmp_path: Path) -> None:
    """Lists of float64, as Python's lists leave them, against float32 binary columns: the same rows, turn by turn."""
    n, h = min(N, 2_000_000), transformation(2048)
    sources = {kind: tmp_path / f"{kind}.parquet" for kind in ("float32 binary", "float64 lists")}
    write_parquet(sources["float32 binary"], "binary", n, 0)
    with pq.ParquetWriter(
        sources["float64 lists"],
        pa.schema({"id": pa.int64(), **dict.fromkeys(("old", "side"), pa.list_(pa.float64()))}),
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    ) as writer:
        for first, old, side in blocks(n):
            lists = (
                pa.ListArray.from_arrays(
                    np.arange(0, rows.size + 1, D, dtype=np.int32), pa.array(rows.ravel(), pa.float64())
                )
                for rows in (old, side)
            )
            ids = pa.array(np.arange(first, first + len(old)))
            writer.write_table(pa.Table.from_arrays([ids, *lists], names=["id", "old", "side"]))
    common: dict[str, Any] = {
        "old_model": "random-old", "precision": "int8", "vector_column": "old", "progress": False, "threads": threads,
        "vector_format": "binary",
    }  # fmt: skip
    rates: dict[str, list[float]] = {kind: [] for kind in sources}
    for _ in range(3):
        for kind, source in sources.items():
            report = fct.backfill(source, tmp_path / "new", h, **common)
            assert report.rows_out == n
            rates[kind].append(report.rows_per_second)
            shutil.rmtree(tmp_path / "new")
    share = statistics.median(a / b for a, b in zip(rates["float64 lists"], rates["float32 binary"], strict=True))
    for kind, found in rates.items():
        rate = statistics.median(found)
        facts = {"share_of_float32_binary": share if kind == "float64 lists" else 1.0}
        record(TABLE, what=f"fct, parquet, {kind}", inner=2048, precision="int8", rows=n, rows_per_s=rate, **facts)


def test_isotrieve(record: Callable[..., None], tmp_path: Path) -> None:
    """The one file-to-file tool there is. Its maps are linear, without side-information: far less work than h."""
    linear = pytest.importorskip("isotrieve.mapping.linear", reason="isotrieve 0.4 is not installed")
    from isotrieve.migrate import migrate_store
    from isotrieve.stores.numpy_files import NumpyFileStore

    n = min(N, 20_000)
    (_, old, side) = next(blocks(n))
    mapping = linear.RidgeMapping().fit(old[:2000], side[:2000])
    source = NumpyFileStore.from_arrays(tmp_path / "old", old)
    target = NumpyFileStore(tmp_path / "new", create=True)
    start = time.perf_counter()
    migrate_store(source, target, mapping)
    rate = n / (time.perf_counter() - start)
    assert target.count() == n
    record("backfill", what="isotrieve 0.4 (a linear map)", precision="float64", rows=n, rows_per_s=rate)


def test_ray_against_local(threads: int, record: Callable[..., None], tmp_path: Path) -> None:
    """One actor on all the cores, shards of about a second; Ray is up before, its worker's start is included."""
    n = min(N, 3_000_000)
    h, gallery = transformation(2048), make(tmp_path, "npy", n)
    common: dict[str, Any] = {
        "old_model": "random-old", "precision": "bf16", "progress": False, "shard_rows": 65536, "threads": threads,
    }  # fmt: skip
    source, options = gallery.job()
    common |= options
    with ray_here(num_cpus=threads):
        there = fct.backfill(source, tmp_path / "ray", h, ray="auto", ray_cpus=threads, **common)
    here = fct.backfill(source, tmp_path / "local", h, **common)
    for file in sorted((tmp_path / "local").glob("*.npy")):
        assert file.read_bytes() == (tmp_path / "ray" / file.name).read_bytes()
    for what, report in (("fct, npy, local", here), ("fct, npy, Ray", there)):
        share = {"share_of_local": report.rows_per_second / here.rows_per_second}
        record(
            "backfill", what=what, inner=2048, precision="bf16", rows=n, rows_per_s=report.rows_per_second, **share
        )  # fmt: skip


_CHILD = """
import json, sys
import fct
source, new, path = sys.argv[1:]
report = fct.backfill(source, new, path, old_model="random-old", precision="bf16", progress=False)
lines = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))  # getrusage's is the parent's too
print(json.dumps([report.rows_out, peak]))
"""


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_resident_memory(kind: str, record: Callable[..., None], tmp_path: Path) -> None:
    """Peak resident memory of a process of its own, at 1 M and 4 M rows (20 M in the full case).

    The sources take no room: a file of holes, and Parquet whose one row is in a dictionary.
    """
    Transformation.random(D, D, D, inner=128, side_info=False).save(tmp_path / "h.safetensors")
    peaks = []
    for n in (1_000_000, max(2 * N, 4_000_000)):
        source = tmp_path / "old"
        source.mkdir()
        if kind == "npy":
            with open(source / "a.npy", "wb") as file:
                file.write(npy_header((n, D), np.dtype(np.float32)))
                file.truncate(128 + n * D * 4)
        else:
            rows = pa.table({"old": vector_array(np.zeros((BLOCK, D), np.float32), "binary")})
            with pq.ParquetWriter(source / "a.parquet", rows.schema) as writer:
                for first in range(0, n, BLOCK):
                    writer.write_table(rows.slice(0, min(BLOCK, n - first)))
        arguments = [str(source), str(tmp_path / "new"), str(tmp_path / "h.safetensors")]
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, *arguments], capture_output=True, text=True, check=True
        )  # fmt: skip
        rows_out, peak = json.loads(done.stdout.splitlines()[-1])
        assert rows_out == n
        peaks.append(peak / 1024)
        shutil.rmtree(source)
        shutil.rmtree(tmp_path / "new")
        record("backfill", what=f"resident memory, {kind}", rows=n, peak_mb=peaks[-1], growth=peaks[-1] / peaks[0] - 1)
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 1024
