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
from fct.bench.measure import Peaks, interleave, measure_batch, timing_fields
from fct.bench.peers import torch_peer, transform_peers
from fct.bench.throughput import TOLERANCE, error_of, our_call
from fct.fit.precision_choice import calibrate
from fct.ops.transform.cpu_backend import CpuTransform, Packed
from fct.ops.weights import packed
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


@pytest.mark.parametrize("rows", [4096])  # fewer: test_small_shapes_and_batches
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
        off = error_of(call()[:256], want)
        assert off < TOLERANCE[precision], f"{name} ({precision}): error {off:.1e} against the reference"
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


# The paper's h; 128-d with 64-d side-information, one mixer block and a skip; and a shape `fct fit` chooses for text.
SHAPES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "128-d, the paper's": ((128, 128, 128), {"inner": 2048}),
    "128-d, small": ((128, 64, 128), {"branch": 128, "blocks": 1, "inner": 512, "skip": True}),
    "384-d, small": ((384, 64, 384), {"branch": 256, "blocks": 1, "inner": 512, "skip": True}),
}
WANTED = {"128-d, small": 300, "384-d, small": 120}  # x the reference code's eager fp32 of the paper's h


def shaped(name: str, rows: int) -> tuple[Transformation, Any, Any]:
    (d_old, d_side, d_new), options = SHAPES[name]
    rng = np.random.default_rng(0)
    h = Transformation.random(d_old, d_side, d_new, **options)
    old, side = (rng.standard_normal((max(rows, 1024), d), dtype=np.float32) for d in (d_old, d_side))
    return calibrate(h, old[:1024], side[:1024]), old[:rows], side[:rows]


@pytest.mark.parametrize("rows", [4096, 64, 8, 1])
@pytest.mark.parametrize("name", list(SHAPES))
def test_small_shapes_and_batches(
    name: str, rows: int, peaks: Peaks, threads: int, record: Callable[..., None], tmp_path: Path
) -> None:
    """What a server sees, through the public call: warm and after a pause, peers likewise, in one run.

    Beside them stands the reference code's eager fp32 of the paper's h at the same dimensions, which a small h
    replaces, and for one row the time to read the packed weights once.
    """
    h, old, side = shaped(name, rows)
    (d_old, d_side, d_new), _ = SHAPES[name]
    paper = Transformation.random(d_old, d_side, d_new, inner=2048)
    calls = {("fct", precision): our_call(h, old, side, precision, threads) for precision in BYTES}
    peers = transform_peers(h, old, side, threads, tmp_path)
    missing: dict[tuple[str, str], str] = {}
    for key, build in peers.items():
        try:
            calls[key] = build()
            calls[key]()
        except Exception as error:
            calls.pop(key, None)
            missing[key] = f"{type(error).__name__}: {str(error)[:80]}"
    want = ref.transform(old[:256], side[:256], h)
    for (who, precision), call in calls.items():
        # one row alone has no spread to compare with: its root mean square stands for it
        off = error_of(call()[:256], want)  # type: ignore[index]
        assert off < TOLERANCE[precision] * (1 if rows > 1 else 3), f"{who} ({precision}): error {off:.1e}"
    fns: dict[str, Callable[[], Any]] = {f"{who}|{precision}": call for (who, precision), call in calls.items()}
    fns["reference code, the paper's h|fp32"] = torch_peer(paper, old, side, "fp32", convolutions=True)
    if rows == 1:
        handles = {p: packed(CpuTransform(), h, p, "cpu").at(_C.detected_isa()).handle for p in BYTES}
        for p, handle in handles.items():
            fns[f"reading the weights|{p}"] = lambda handle=handle: handle.read_weights(threads)  # type: ignore[misc]
    for state, times in measure_batch(fns, rows, seconds=2.0, rounds=5).items():
        reference = times["reference code, the paper's h|fp32"].median
        others = [t.median for key, t in times.items() if key.partition("|")[0] in {who for who, _ in peers}]
        for call_name, timing in times.items():
            who, _, precision = call_name.partition("|")
            flop = (paper if "paper" in who else h).flop_per_row * rows
            fields = timing_fields(timing, rows=rows, flop=None if who == "reading the weights" else flop)
            if who == "fct":
                fields |= {
                    "share_of_peak": fields["gflops"] * 1e9 / peaks.ops[precision],
                    "x_reference_code": reference / timing.median,
                    "wanted_x_reference_code": WANTED.get(name) if rows == 4096 else None,
                    "x_best_peer": min(others) / timing.median if others else None,
                }
            record(
                f"transform {name}, {rows} rows",
                peer=who,
                precision=precision,
                state=state,
                rows=rows,
                threads=threads,
                **fields,
                status="ok",
            )
    for (who, precision), why in missing.items():
        record(f"transform {name}, {rows} rows", peer=who, precision=precision, rows=rows, threads=threads, status=why)


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
        "rows": [(128, 2048, n) for n in (512, 4096, 32_768, 262_144)],  # fewer: test_small_shapes_and_batches
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
