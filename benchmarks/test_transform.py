"""The transformation: ours and every peer at its best setting, on the same rows and threads, in one run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct import _C, ref
from fct.artifact.transformation import Transformation
from fct.bench.measure import Peaks, interleave, timing_fields
from fct.bench.peers import transform_peers
from fct.bench.throughput import TOLERANCE, error_of
from fct.fit.precision_choice import calibrate
from fct.ops.transform.cpu_backend import Packed
from fct.rows import rows_of

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def make(d: int, inner: int, rows: int) -> tuple[Transformation, Any, Any]:
    rng = np.random.default_rng(0)
    h = Transformation.random(d, d, d, inner=inner)
    old, side = rng.standard_normal((2, rows, d), dtype=np.float32)
    return calibrate(h, old[:1024], side[:1024]), old, side


def ours(
    h: Transformation, old: Any, side: Any, precision: str, threads: int, packed: Packed | None = None
) -> Callable[[], Any]:
    packed = packed or Packed(h, precision, _C.detected_isa())
    out = np.empty((len(old), h.d_new), np.float32)
    views = rows_of(old, "old"), rows_of(side, "side"), rows_of(out, "out", finite=False)

    def call() -> Any:
        packed.run(*views, threads=threads)
        return out

    return call


@pytest.mark.parametrize("rows", [4096, 1])
def test_against_peers(
    rows: int, peaks: Peaks, threads: int, record: Callable[..., None], tmp_path: Path, benchmark: Any
) -> None:
    """The paper's h, 128 dimensions in and out, inner 2048: everybody."""
    h, old, side = make(128, 2048, rows)
    want = ref.transform(old[:256], side[:256], h)
    calls: dict[tuple[str, str], Callable[[], Any]] = {
        ("fct", precision): ours(h, old, side, precision, threads) for precision in BYTES
    }
    calls[("fct, one thread", "bf16")] = ours(h, old, side, "bf16", 1)
    calls[("fct, one thread", "fp32")] = ours(h, old, side, "fp32", 1)
    calls[("fct, one thread", "int8")] = ours(h, old, side, "int8", 1)
    missing: dict[tuple[str, str], str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key, build in transform_peers(h, old, side, threads, tmp_path, compiled=True).items():
            try:
                calls[key] = build()
                calls[key]()
            except Exception as error:
                missing[key] = f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    for (name, precision), call in calls.items():
        error = error_of(call()[:256], want)
        assert error < TOLERANCE[precision], f"{name} ({precision}): error {error:.1e} against the reference"
    times = interleave({f"{a}|{b}": call for (a, b), call in calls.items()}, seconds=2.0, rounds=7, most=40, pause=0.02)
    for (name, precision), _ in calls.items():
        fields = timing_fields(times[f"{name}|{precision}"], rows=rows, flop=h.flop_per_row * rows)
        moved = h.parameters * BYTES[precision] + rows * 4 * (h.d_old + h.d_side + h.d_new)
        record(
            "transform",
            peer=name,
            precision=precision,
            rows=rows,
            threads=1 if "one thread" in name else threads,
            **fields,
            share_of_peak=fields["gflops"] * 1e9 / peaks.ops[precision] * (threads if "one thread" in name else 1),
            flop_per_byte=h.flop_per_row * rows / moved,
            status="ok",
        )
    for (name, precision), why in missing.items():
        record("transform", peer=name, precision=precision, rows=rows, threads=threads, status=why)
    benchmark.extra_info["rows"] = rows
    benchmark.pedantic(calls[("fct", "bf16")], rounds=5, iterations=1, warmup_rounds=1)


def test_one_row_against_reading_the_weights(peaks: Peaks, threads: int, record: Callable[..., None]) -> None:
    """The floor of a single query's latency: every packed weight must be read once.

    What a row takes besides is told by a row through an h of the same seven layers whose weights are next to nothing:
    the call, and the threads' meeting after each layer.
    """
    h, old, side = make(128, 2048, 1)
    small, small_old, small_side = make(16, 16, 1)
    for precision in BYTES:
        packed = Packed(h, precision, _C.detected_isa())
        calls = {
            "row": ours(h, old, side, precision, threads, packed),  # the same weights: two copies would share the cache
            "read": lambda packed=packed: packed.handle.read_weights(threads),
            "no weights": ours(small, small_old, small_side, precision, threads),
        }
        times = interleave(calls, seconds=0.5, rounds=50, most=2000)
        megabytes = packed.handle.weight_bytes / 1e6
        record(
            "transform one row",
            precision=precision,
            ms=times["row"].median * 1e3,
            ms_reading_weights=times["read"].median * 1e3,
            ratio=times["row"].median / times["read"].median,
            ms_without_weights=times["no weights"].median * 1e3,
            weights_mb=megabytes,
            gb_per_s=megabytes / 1e3 / times["row"].median,
        )


SWEPT = [
    ("torch folded", "fp32"),
    ("torch folded", "bf16"),
    ("ONNX Runtime", "fp32"),
    ("ONNX Runtime dynamic", "int8"),
    ("OpenVINO", "fp32"),
    ("OpenVINO", "bf16"),
]


@pytest.mark.parametrize("axis", ["rows", "dims", "inner"])
def test_sweep(axis: str, full: bool, threads: int, record: Callable[..., None], tmp_path: Path) -> None:
    """How cost grows with the batch, the dimensions and the inner width; peers beside us."""
    grids: dict[str, list[tuple[int, int, int]]] = {
        "rows": [(128, 2048, n) for n in (1, 8, 64, 512, 4096, 32_768, 262_144)],
        "dims": [(d, 2048, 2048) for d in (128, 384, 768, 1536)],
        "inner": [(128, inner, 4096) for inner in (256, 512, 1024, 2048, 4096)],
    }
    if full:
        grids["rows"] += [(128, 2048, 1_000_000)]
        grids["dims"] = [(d, 2048, 16_384) for d in (128, 384, 768, 1536)]
    for d, inner, rows in grids[axis]:
        h, old, side = make(d, inner, rows)
        calls = {f"fct {precision}": ours(h, old, side, precision, threads) for precision in BYTES}
        large = rows > 32_768  # minutes for the peers, whose rate has long stopped to change
        if not large:
            folder = tmp_path / f"{d}-{inner}-{rows}"
            folder.mkdir()
            found = transform_peers(h, old, side, threads, folder)
            wanted = SWEPT if axis == "rows" else [key for key in SWEPT if key[0] == "torch folded"]
            calls |= {f"{name} {precision}": found[name, precision]() for name, precision in wanted}
        want = ref.transform(old[:64], side[:64], h)
        for name, call in calls.items():
            assert error_of(call()[:64], want) < TOLERANCE[name.rpartition(" ")[2]], name
        times = interleave(calls, seconds=0.5, rounds=1 if large else 3, most=30, pause=0.01, warm=large)
        for name, timing in times.items():
            fields = timing_fields(timing, rows=rows, flop=h.flop_per_row * rows)
            record(f"transform {axis}", peer=name, rows=rows, d=d, inner=inner, threads=threads, **fields)


def test_auto_is_what_the_artifact_allows(threads: int) -> None:
    """The public call must reach the kernels that are measured here."""
    h, old, side = make(128, 256, 100)
    direct = ours(h, old, side, "fp32", threads)()
    np.testing.assert_array_equal(fct.transform_batch(old, side, h, threads=threads), direct)
