"""The GPU benchmark's own code, on the stand-in device; and the rule by which it is skipped where no GPU is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice

from fct.ops import proof as selfproof
from fct.ops.transform import triton_backend as backend

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeDevice]:
    device = FakeDevice(seed=3)
    device.model = "NVIDIA H100 80GB HBM3"
    device.install(monkeypatch, tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with device.torch():
        yield device


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def benchmark_code(fake: FakeDevice) -> Any:
    import test_gpu

    return test_gpu


@pytest.fixture
def record(rows: list[dict[str, Any]]) -> Any:
    return lambda table, **fields: rows.append({"table": table, **fields, "context": {}})


def test_the_transformation(
    benchmark_code: Any, fake: FakeDevice, rows: list[dict[str, Any]], record: Any, tmp_path: Path
) -> None:
    import reporting

    h = benchmark_code.paper(d=16, inner=32)
    benchmark_code.measure_transform(h, 5, "cuda:0", record, seconds=0.01, skip=("torch.compile",))
    ok = {(r["who"], r["precision"]) for r in rows if r["status"] == "ok"}
    assert {("fct triton", p) for p in ("fp32", "bf16", "fp16", "int8", "fp8")} <= ok
    assert {("torch eager", "fp32"), ("cuBLASLt", "bf16"), ("torch eager", "fp16")} <= ok
    assert all(r["gflops"] > 0 and 0 < r["share_of_published_peak"] < 1 for r in rows if r["status"] == "ok")
    missing = {r["who"]: r["status"] for r in rows if r["status"] != "ok"}
    assert set(missing) == {"fct cuda"}, missing  # no CUDA driver here: said, not hidden
    for row in rows:
        row["context"] = {"commit": "c", "machine": "m", "command": "x"}
    reporting.write(rows, tmp_path / "report")
    assert len(json.loads((tmp_path / "report" / "results.json").read_text())["rows"]) == len(rows)
    assert "fct triton" in (tmp_path / "report" / "results.md").read_text()
    assert (tmp_path / "report" / "gpu-transform.png").exists()


def test_the_small_transformation(benchmark_code: Any, rows: list[dict[str, Any]], record: Any) -> None:
    """Its peers add the skip too: each is held against the reference before it is timed."""
    h = benchmark_code.small(d=16, inner=32)
    benchmark_code.measure_transform(h, 5, "cuda:0", record, seconds=0.01, skip=("torch.compile",), table="small")
    ok = {(r["who"], r["precision"]) for r in rows if r["status"] == "ok" and r["table"] == "small"}
    assert {("fct triton", p) for p in ("fp32", "bf16", "fp16", "int8", "fp8")} <= ok
    assert {("torch eager", "fp32"), ("cuBLASLt", "bf16")} <= ok


def test_roofs_are_those_of_the_machine_that_was_measured(benchmark_code: Any) -> None:
    import reporting

    rows = [
        {"table": table, "what": "fp32", "gflops": gflops, "context": {"machine": machine}}
        for table, gflops, machine in (("peaks", 500, "new"), ("peaks", 200, "old"), ("transform", 450, "new"))
    ]
    assert [row["gflops"] for row in reporting.peaks_of("new", rows).values()] == [500]
    assert reporting.peaks_of("another", rows) == {}


def test_a_wrong_result_is_not_timed(benchmark_code: Any, monkeypatch: pytest.MonkeyPatch, record: Any) -> None:
    run = backend.TritonTransform.run

    def wrong(self: Any, packed: Any, old: Any, side: Any, out: Any, *, threads: int) -> None:
        run(self, packed, old, side, out, threads=threads)
        packed.device._push(lambda: out.values[0, 0].add_(9))

    monkeypatch.setattr(backend.TritonTransform, "run", wrong)
    with pytest.raises(AssertionError, match=r"fct triton \(fp32\): error .* against the reference"):
        benchmark_code.measure_transform(benchmark_code.paper(d=8, inner=8), 3, "cuda:0", record, seconds=0.01)


def test_the_search(benchmark_code: Any, rows: list[dict[str, Any]], record: Any) -> None:
    benchmark_code.measure_search(7, 300, 24, 5, "cuda:0", record, seconds=0.01)
    status = {r["who"]: r["status"] for r in rows}
    assert status["fct.topk"] == status["torch matmul + topk"] == "ok"
    assert "no GPU part" in status["FAISS GpuIndexFlatIP"]
    assert "cuvs" in status["cuVS brute force"]


@pytest.mark.slow
def test_streaming(benchmark_code: Any, rows: list[dict[str, Any]], record: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("FCT_BACKEND", "triton")
    monkeypatch.setattr(selfproof, "ROWS", (3,))
    benchmark_code.measure_streaming(benchmark_code.paper(d=8, inner=16), 70, "cuda:0", record)
    assert [r["status"] for r in rows] == ["ok"] * 5
    assert all(r["gb_per_s"] > 0 for r in rows)


def test_skipped_with_the_reason_where_no_gpu_is() -> None:
    if torch.cuda.is_available():
        return
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "benchmarks/test_gpu.py"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.startswith("s" * 19 + " "), ran.stdout
    assert "no GPU to run on: " in ran.stdout


def test_published_peaks() -> None:
    from fct.bench.data_sheets import published_peak

    assert published_peak("NVIDIA A100-SXM4-80GB", "int8") == 624.0
    assert published_peak("NVIDIA A100-SXM4-80GB", "fp8") is None
    assert published_peak("NVIDIA GeForce RTX 4090", "bf16") == 165.2
    assert published_peak("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16") is None
    assert published_peak("NVIDIA L40S", "bf16") is None
