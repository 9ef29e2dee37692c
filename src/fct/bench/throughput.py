"""What h and a search cost on this machine, ours and the installed peers in one run, in under a minute."""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import fct
from fct import _C, ref
from fct.artifact.transformation import Transformation
from fct.bench.bench_report import NEIGHBOURS, BenchReport
from fct.bench.measure import SMALL_BATCH, Peaks, Timing, interleave, measure_batch, measure_peaks
from fct.bench.peers import best_setting, faiss_worker, openblas_times, transform_peers
from fct.extras import why_missing
from fct.ops.backend import PRECISIONS
from fct.ops.isa import isa
from fct.ops.processors import threads_of
from fct.ops.registry import pick_transform
from fct.ops.transform.cpu_backend import CpuTransform
from fct.ops.weights import packed
from fct.transform import transform_batch
from fct.types import Array

__all__ = ["TOLERANCE", "error_of", "inputs_of", "our_call", "processor", "run_bench", "same_neighbours"]

# Error against the float64 reference, relative to the output's spread, that counts as the same result.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "int8": 1e-1}
ROWS_TO_COME = (1_000_000, 1_000_000_000, 10_000_000_000)
_SECONDS = 0.3  # about, of each call that is timed
_CALL = 0.1  # seconds of the largest batch's fp32 call at the machine's peak, at most
_SEARCH = 1.28e8  # gallery rows x dimensions, at most
_PROBED = 50_000  # rows in which FAISS's settings are compared
_QUERIES = (1, 1000)


def processor() -> str:
    """The processor's name and the instruction sets that matter here."""
    flags = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd")
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in reversed(text.splitlines()) if ":" in line)
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    have = [f for f in flags if f in fields.get("flags", fields.get("Features", "")).split()]
    name = fields.get("model name", platform.machine())
    family = f"family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else ""
    return " ".join(part for part in (name, family, f"({', '.join(have)})") if part)


def error_of(got: Array, want: Array) -> float:
    """Root mean squared difference over the spread of ``want``."""
    return float(np.sqrt(np.mean((got - want) ** 2) / np.var(want)))


def inputs_of(h: Transformation, rows: int, seed: int = 0) -> tuple[Array, Array]:
    """Gaussian (rows, d_old) and (rows, d_side) float32, inside the ranges h was calibrated on where it was; at most
    65,536 of them differ, since the values cost nothing and drawing them does."""
    rng = np.random.default_rng(seed)
    found = []
    for branch, d in (("old", h.d_old), ("side", h.d_side)):
        x = rng.standard_normal((min(rows, 65_536), d), dtype=np.float32)
        ranges = h.calibration.get(f"{branch}.0")
        if ranges is not None:
            low, high = np.asarray(ranges[0], np.float32), np.asarray(ranges[1], np.float32)
            x = np.clip((low + high) / 2 + x * (high - low) / 8, low, high)
        found.append(np.resize(x, (rows, d)))
    return found[0], found[1] if h.uses_side_info else found[0]


def same_neighbours(queries: Array, gallery: Array, a: Array, b: Array) -> bool:
    """Whether two (n, k) answers by inner product differ only where the rows' scores are float32 rounding apart."""
    other = a != b
    if not other.any():
        return True
    rows = np.nonzero(other)[0]
    q = queries[rows].astype(np.float64)
    x, y = (np.einsum("id,id->i", q, gallery[ids[other]]) for ids in (a, b))
    limit = 1e-6 * np.linalg.norm(q, axis=1) * np.linalg.norm(gallery[a[other]], axis=1)
    return bool((np.abs(x - y) <= limit).all() and other.mean() < 1e-2)


def run_bench(
    h: Transformation,
    *,
    threads: int | None = None,
    peers: bool = True,
    progress: Callable[[float, str], None] = lambda share, what: None,
) -> BenchReport:
    """Measures h, a search in h's output space and the peers that are installed, on this machine's CPU.

    Args:
        h: the transformation; where it is not calibrated, int8 is left out.
        threads: by default FCT_NUM_THREADS or all; peers get as many.
        peers: whether torch, ONNX Runtime, OpenVINO and FAISS are measured beside us.
        progress: told the share that is done (0 to 1) and what comes next.

    Every result is held against the float64 reference (a search: against the other's rows) before it is timed; one
    that differs gets the error as its ``status`` and no time.

    Examples:
        >>> import fct
        >>> from fct.bench.throughput import run_bench
        >>> report = run_bench(fct.Transformation.random(8, 4, 8, inner=16), peers=False)
        >>> {row["rows"] for row in report.to_come} == {10**6, 10**9, 10**10}
        True
    """
    count = threads_of(threads)
    progress(0.0, "the machine's own peaks")
    found = measure_peaks(count, 0.3, every_isa=False)
    backend = CpuTransform()
    precisions = [p for p in PRECISIONS if not backend.why_not(h, p, "cpu")]
    largest = 4096
    while largest > 64 and largest * h.flop_per_row > _CALL * found.ops["fp32"]:
        largest //= 2
    report = _begun(h, count, found)
    if "int8" not in precisions:
        report.notes.append(f"int8 is left out: {'; '.join(backend.why_not(h, 'int8', 'cpu'))}.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for share, rows in ((0.1, largest), (0.3, SMALL_BATCH), (0.4, 8), (0.5, 1)):
            progress(share, f"the transformation, batches of {rows:,}")
            _transform(report, h, precisions, rows, count, folder, peers=peers)
        progress(0.65, "exact search")
        _search(report, h.d_new, count, folder, peers=peers, progress=progress)
    _extrapolate(report, largest)
    progress(1.0, "done")
    return report


def _begun(h: Transformation, threads: int, peaks: Peaks) -> BenchReport:
    """The report with what is measured and where, and nothing measured but the machine's own peaks."""
    return BenchReport(
        h={
            "what": repr(h),
            "fingerprint": h.fingerprint,
            "flop_per_row": h.flop_per_row,
            "mflop_per_row": h.flop_per_row / 1e6,
            "d_old": h.d_old,
            "d_side": h.d_side if h.uses_side_info else 0,
            "d_new": h.d_new,
        },
        machine={
            "processor": processor(),
            "system": platform.platform(),
            "threads": threads,
            "isa": _C.isa_names[isa()],
            "fct": fct.__version__,
        },
        peaks={p: peaks.ops[p] / 1e9 for p in PRECISIONS}
        | {"memory_gb_per_s": peaks.memory / 1e9, "cache_gb_per_s": peaks.l3 / 1e9},
        auto=pick_transform(h, "auto", "cpu")[1],
    )


def _extrapolate(report: BenchReport, largest: int) -> None:
    """What whole galleries would take at the rate of the largest batch."""
    ours = (r for r in report.transform if r["who"] == "fct" and r["rows"] == largest and r["status"] == "ok")
    best = {r["precision"]: r["rows_per_s"] for r in ours}
    for precision, rate in best.items():
        for rows in ROWS_TO_COME:
            report.to_come.append(
                {
                    "precision": precision,
                    "rows": rows,
                    "seconds": rows / rate,
                    "bytes_read": 4 * rows * (report.h["d_old"] + report.h["d_side"]),
                    "bytes_written": 4 * rows * report.h["d_new"],
                }
            )


def our_call(h: Transformation, old: Array, side: Array, precision: str, threads: int) -> Callable[[], object]:
    """:func:`fct.transform_batch` of these rows on the CPU, as a server calls it again and again, into one buffer. It
    names no backend, since a call that demands one is checked from the beginning each time."""
    out = np.empty((len(old), h.d_new), np.float32)
    side_info = side if h.uses_side_info else None
    return lambda: transform_batch(old, side_info, h, out=out, precision=precision, threads=threads, progress=False)


def _transform(
    report: BenchReport,
    h: Transformation,
    precisions: list[str],
    rows: int,
    threads: int,
    folder: Path,
    *,
    peers: bool,
) -> None:
    old, side = inputs_of(h, rows)
    checked = inputs_of(h, 64)  # one row alone has no spread to compare with
    calls = {("fct", p): our_call(h, old, side, p, threads) for p in precisions}
    checks = {("fct", p): our_call(h, *checked, p, threads) for p in precisions}
    status: dict[tuple[str, str], str] = {}
    if peers:
        _torch_threads(threads)
        small = transform_peers(h, *checked, threads, folder)
        for key, build in transform_peers(h, old, side, threads, folder).items():
            try:
                calls[key], checks[key] = build(), small[key]()
            except Exception as error:  # whatever a peer cannot do here, the others are measured
                status[key] = _why(error)
    want = ref.transform(*checked, h)
    for key, check in checks.items():
        off = error_of(np.asarray(check()), want)
        if not off < TOLERANCE[key[1]]:
            status[key] = f"differs: error {off:.1e}"
    rounds = {f"{a}|{b}": call for (a, b), call in calls.items() if (a, b) not in status}
    readers = {p: packed(CpuTransform(), h, p, "cpu").at(isa()).handle for p in precisions} if rows == 1 else {}
    for p, handle in readers.items():
        rounds[f"reading the weights|{p}"] = lambda handle=handle: handle.read_weights(threads)  # type: ignore[misc]
    times = measure_batch(rounds, rows, seconds=_SECONDS)
    for state, timings in times.items():
        for who, precision in [*calls, *(key for key in status if key not in calls)]:
            entry = {"who": who, "precision": precision, "rows": rows, "state": state}
            entry["status"] = status.get((who, precision), "ok")
            if entry["status"] == "ok":
                entry |= _figures(timings[f"{who}|{precision}"], rows, h.flop_per_row, report.peaks[precision])
            report.transform.append(entry)
        for p, handle in readers.items():
            report.weights.append(
                {
                    "precision": p,
                    "state": state,
                    "ms": timings[f"reading the weights|{p}"].median * 1e3,
                    "bytes": handle.weight_bytes,
                }
            )


def _figures(timing: Timing, rows: int, flop_per_row: int, peak: float) -> dict[str, float]:
    gflops = flop_per_row * rows / timing.median / 1e9
    return {
        "ms": timing.median * 1e3,
        "ms_p20": timing.p20 * 1e3,
        "ms_p80": timing.p80 * 1e3,
        "rows_per_s": rows / timing.median,
        "gflops": gflops,
        "share_of_peak": gflops / peak,
    }


def _why(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "not installed"
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"


def _torch_threads(threads: int) -> None:
    if why_missing("torch"):  # its row says so
        return
    import torch

    torch.set_num_threads(threads)


def _available_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 << 30


def _search(
    report: BenchReport, d: int, threads: int, folder: Path, *, peers: bool, progress: Callable[[float, str], None]
) -> None:
    n = int(min(1_000_000, _SEARCH / d, _available_memory() / 8 / (4 * d)))
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((n, d), dtype=np.float32)
    queries = rng.standard_normal((_QUERIES[-1], d), dtype=np.float32)
    k = min(NEIGHBOURS, n)
    begun = time.perf_counter()
    prepared = fct.prepare_gallery(gallery, metric="ip", threads=threads, progress=False)
    took = time.perf_counter() - begun
    report.notes.append(
        f"Preparing the {n:,} x {d} gallery took {took:.2f} s; it takes {prepared.memory_ratio:.2f} x the rows' memory."
    )
    setting: dict[str, str] = {}
    why = "" if peers else "left out"
    if peers:
        try:
            progress(0.7, "FAISS's best setting")
            setting = _faiss_setting(queries, gallery[:_PROBED], threads, folder, report)
            np.save(folder / "gallery.npy", gallery)
        except (ImportError, RuntimeError) as error:
            why = _why(error)
    for i, m in enumerate(_QUERIES):
        progress(0.8 + 0.1 * i, f"exact search, {m:,} queries")
        q = queries[:m]

        def ours(q: Array = q) -> fct.TopK:
            return fct.topk(q, prepared, k, metric="ip", threads=threads, progress=False)

        calls: dict[str, Callable[[], object]] = {"fct, prepared": ours}
        status = {"FAISS IndexFlatIP": why} if why else {}
        with contextlib.ExitStack() as stack:
            if not why:
                np.save(folder / f"queries{m}.npy", q)
                worker = faiss_worker(folder / f"queries{m}.npy", folder / "gallery.npy", k, threads, setting)
                stack.callback(worker.close)
                worker()
                if same_neighbours(q, gallery, ours().indices, worker.result()):
                    calls["FAISS IndexFlatIP"] = worker
                else:
                    status["FAISS IndexFlatIP"] = "differs: other rows"
            times = interleave(calls, seconds=2 * _SECONDS, rounds=2, most=20, pause=0.02)
        sizes = {"queries": m, "gallery": n, "d": d, "k": k}
        for who, timing in times.items():
            figures = {"ms": timing.median * 1e3, "queries_per_s": m / timing.median}
            report.search.append({"who": who, **sizes, "status": "ok", **figures})
        if peers:
            report.search.extend({"who": who, **sizes, "status": reason} for who, reason in status.items())


def _faiss_setting(queries: Array, gallery: Array, threads: int, folder: Path, report: BenchReport) -> dict[str, str]:
    """The OPENBLAS_* variables under which FAISS is fastest here, found on a small gallery."""
    np.save(folder / "small.npy", gallery)
    np.save(folder / "probe.npy", queries)
    files = (folder / "probe.npy", folder / "small.npy")
    times = openblas_times(lambda variables: faiss_worker(*files, NEIGHBOURS, threads, variables), calls=1)
    name, variables = best_setting(times)
    report.notes.append(
        f"FAISS runs under {name}, the fastest of "
        + ", ".join(f"{key} ({1e3 * seconds:.0f} ms)" for key, seconds in times.items())
        + f" in a search of 1,000 queries in its first {_PROBED:,} rows."
    )
    return variables
