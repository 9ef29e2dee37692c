"""Exact search: ours and every peer on the same rows and threads, answers compared first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fct
from fct.report.measure import Peaks, interleave, timing_fields

D = 128


def make(n: int, d: int, queries: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((queries, d), dtype=np.float32), rng.standard_normal((n, d), dtype=np.float32)


def same_answer(q: Any, g: Any, a: Any, b: Any) -> None:
    """Indices differ only where the two rows' products are within float32 rounding of each other."""
    other = a != b
    if other.any():
        rows = np.nonzero(other)[0]
        x = np.einsum("id,id->i", q[rows].astype(np.float64), g[a[other]])
        y = np.einsum("id,id->i", q[rows].astype(np.float64), g[b[other]])
        limit = 1e-6 * np.linalg.norm(q[rows], axis=1) * np.linalg.norm(g[a[other]], axis=1)
        assert (np.abs(x - y) <= limit).all()
    assert other.mean() < 1e-3


@pytest.fixture(scope="module")
def faiss_variables() -> dict[str, float]:
    """Seconds of one FAISS search under this shell's OPENBLAS_* variables and without them, in a fresh process."""
    code = (
        "import faiss, numpy as np, time\n"
        "r = np.random.default_rng(0); g = r.standard_normal((200_000, 128), dtype=np.float32)\n"
        "i = faiss.IndexFlatIP(128); i.add(g); i.search(g[:500], 10)\n"
        "def once():\n    t = time.perf_counter(); i.search(g[:500], 10); return time.perf_counter() - t\n"
        "print(min(once() for _ in range(3)))"
    )
    plain = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
    return {
        name: float(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
        for name, env in (("as set", dict(os.environ)), ("without OPENBLAS_*", plain))
    }


def test_faiss_is_at_its_best(faiss_variables: dict[str, float], record: Callable[..., None], threads: int) -> None:
    for name, seconds in faiss_variables.items():
        record("topk: FAISS settings", what=name, threads=threads, ms=1e3 * seconds)
    best = min(faiss_variables.values())
    assert faiss_variables["as set"] <= 1.1 * best, "run the benchmarks without the OPENBLAS_* variables"


@pytest.mark.parametrize("queries", [1, 10, 100, 1000])
@pytest.mark.parametrize("k", [10, 100])
def test_topk(queries: int, k: int, full: bool, threads: int, peaks: Peaks, record: Callable[..., None]) -> None:
    import faiss

    n = 1_000_000
    q, g = make(n, D, queries)
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(D)
    index.add(g)
    prepared = fct.prepare_gallery(g, metric="ip", threads=threads)
    fns: dict[str, Callable[[], Any]] = {
        "fct, prepared": lambda: fct.topk(q, prepared, k, metric="ip", threads=threads).indices,
        "FAISS IndexFlatIP": lambda: index.search(q, k)[1],
    }
    if queries == 1000 and full:
        fns["fct, prepared, 1 thread"] = lambda: fct.topk(q, prepared, k, metric="ip", threads=1).indices
    want = fns["FAISS IndexFlatIP"]()
    for fn in fns.values():
        same_answer(q, g, fn(), want)
    flop = 2.0 * queries * n * D
    for name, timing in interleave(fns, seconds=2.0, rounds=3).items():
        fields = timing_fields(timing, rows=queries, flop=flop)
        share = flop / timing.median / peaks.ops["int8" if name.startswith("fct") else "fp32"]
        record("topk", who=name, queries=queries, gallery=n, d=D, k=k, threads=threads, share_of_peak=share, **fields)


@pytest.mark.parametrize("d", [128, 384, 768, 1536])
def test_dimensions(d: int, threads: int, peaks: Peaks, record: Callable[..., None]) -> None:
    import faiss

    n, queries = 100_000, 500
    q, g = make(n, d, queries)
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(d)
    index.add(g)
    prepared = fct.prepare_gallery(g, metric="ip", threads=threads)
    fns: dict[str, Callable[[], Any]] = {
        "fct, prepared": lambda: fct.topk(q, prepared, 10, metric="ip", threads=threads).indices,
        "FAISS IndexFlatIP": lambda: index.search(q, 10)[1],
    }
    want = fns["FAISS IndexFlatIP"]()
    same_answer(q, g, fns["fct, prepared"](), want)
    flop = 2.0 * queries * n * d
    for name, timing in interleave(fns, rounds=3).items():
        record("topk by dimension", who=name, d=d, gallery=n, queries=queries, k=10,
               **timing_fields(timing, rows=queries, flop=flop))  # fmt: skip
