"""Exact search: ours and every peer on the same rows and threads, answers compared first.

FAISS runs in a process of its own, under the fastest of OpenBLAS's kernels here and the faster of its two ways to
search, both measured at the start: the same search takes up to nine times as long under others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct.bench.measure import Peaks, interleave, measure_batch, timing_fields
from fct.bench.peers import Worker, best_setting, faiss_worker, openblas_times
from fct.bench.throughput import same_neighbours

FAISS = "FAISS IndexFlatIP"
OURS = "fct, prepared"


def make(n: int, d: int, queries: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((queries, d), dtype=np.float32), rng.standard_normal((n, d), dtype=np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("topk")


@contextmanager
def faiss_search(q: Any, g: Any, k: int, threads: int, settings: dict[str, str], folder: Path) -> Iterator[Worker]:
    """FAISS's search of ``g``, an array or the .npy file that holds it."""
    gallery = g if isinstance(g, Path) else folder / "gallery.npy"
    if not isinstance(g, Path):
        np.save(gallery, g)
    np.save(folder / "queries.npy", q)
    with faiss_worker(folder / "queries.npy", gallery, k, threads, settings) as worker:
        worker()
        yield worker


@pytest.fixture(scope="module")
def faiss_settings(folder: Path, threads: int, record: Callable[..., None]) -> dict[str, str]:
    """The OPENBLAS_* variables under which FAISS is fastest here; every setting is recorded."""
    q, g = make(200_000, 128, 1000)
    np.save(folder / "small.npy", g)
    np.save(folder / "small-queries.npy", q)
    times = openblas_times(
        lambda variables: faiss_worker(folder / "small-queries.npy", folder / "small.npy", 10, threads, variables)
    )
    name, variables = best_setting(times)
    for what, seconds in times.items():
        record(
            "topk settings of FAISS",
            setting=what,
            taken="yes" if what == name else "",
            queries=1000,
            gallery=200_000,
            ms=1e3 * seconds,
            gflops=2 * 1000 * 200_000 * 128 / seconds / 1e9,
        )
    return variables


@pytest.fixture(scope="module")
def million(folder: Path, threads: int) -> tuple[Any, Any, Path, Any]:
    """(queries, gallery, its file, prepared)."""
    q, g = make(1_000_000, 128, 1000)
    np.save(folder / "million.npy", g)
    return q, g, folder / "million.npy", fct.prepare_gallery(g, metric="ip", threads=threads)


def measure(
    table: str,
    fns: dict[str, Callable[[], Any]],
    q: Any,
    g: Any,
    k: int,
    threads: int,
    record: Callable[..., None],
    peaks: Peaks,
    *,
    exact: dict[str, Any],
    seconds: float = 1.0,
) -> None:
    """Compares the rows in ``exact`` with ours, then times ``fns`` turn by turn and records them."""
    want = fns[OURS]()
    for name, ids in exact.items():
        assert same_neighbours(q, g, want, ids), f"{name}: other rows than ours"
    flop = 2.0 * len(q) * g.shape[0] * g.shape[1]
    for state, times in measure_batch(fns, len(q), seconds=seconds).items():
        for name, timing in times.items():
            fields = timing_fields(timing, rows=len(q), flop=flop)
            record(
                table,
                who=name,
                state=state,
                queries=len(q),
                gallery=g.shape[0],
                d=g.shape[1],
                k=k,
                threads=threads,
                times_ours=timing.median / times[OURS].median,
                share_of_peak=flop / timing.median / peaks.ops["int8" if name.startswith("fct") else "fp32"],
                **{key.replace("rows_per_s", "queries_per_s"): value for key, value in fields.items()},
            )


def ours(q: Any, prepared: Any, k: int, threads: int) -> Callable[[], Any]:
    return lambda: fct.topk(q, prepared, k, metric="ip", threads=threads).indices


@pytest.mark.parametrize("queries", [1, 10, 100, 1000])
@pytest.mark.parametrize("k", [10, 100])
def test_topk(
    queries: int, k: int, million: Any, faiss_settings: dict[str, str], folder: Path, threads: int, peaks: Peaks,
    record: Callable[..., None],
) -> None:  # fmt: skip
    q, g, file, prepared = million
    q = q[:queries]
    with faiss_search(q, file, k, threads, faiss_settings, folder) as worker:
        fns = {OURS: ours(q, prepared, k, threads), FAISS: worker}
        measure("topk", fns, q, g, k, threads, record, peaks, exact={FAISS: worker.result()})  # type: ignore[arg-type]


def torch_search(q: Any, g: Any, k: int, dtype: Any) -> Callable[[], Any]:
    import torch

    a, b = (torch.from_numpy(x).to(dtype) for x in (q, g))
    return lambda: torch.topk(a @ b.T, k).indices


def usearch_search(q: Any, g: Any, k: int, threads: int, dtype: str) -> Callable[[], Any]:
    from usearch.index import search

    if dtype == "i8":
        top = max(np.abs(q).max(), np.abs(g).max())
        q, g = (np.rint(x * (127 / top)).astype(np.int8) for x in (q, g))
    elif dtype == "f16":
        q, g = q.astype(np.float16), g.astype(np.float16)
    return lambda: search(g, q, k, metric="ip", exact=True, threads=threads).keys


def test_every_peer(
    faiss_settings: dict[str, str], folder: Path, threads: int, peaks: Peaks, record: Callable[..., None]
) -> None:
    """100 queries in 100,000 rows, k = 10: what one call of each costs. Narrow dtypes find other rows: see recall."""
    import torch

    k = 10
    q, g = make(100_000, 128, 100)
    prepared = fct.prepare_gallery(g, metric="ip", threads=threads)
    fns: dict[str, Callable[[], Any]] = {
        OURS: ours(q, prepared, k, threads),
        "fct, packed in the call": lambda: fct.topk(q, g, k, metric="ip", threads=threads).indices,
        "fct, every row (fp32)": lambda: fct.topk(q, g, k, metric="ip", precision="fp32", threads=threads).indices,
        "torch matmul + topk fp32": torch_search(q, g, k, torch.float32),
        "torch matmul + topk bf16": torch_search(q, g, k, torch.bfloat16),
        **{f"usearch exact {t}": usearch_search(q, g, k, threads, t) for t in ("f32", "f16", "i8")},
    }
    want = fns[OURS]()
    exact = {}
    for name, call in fns.items():
        ids = np.asarray(call())
        kept = np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(want, ids, strict=True)])
        record("topk recall of peers", who=name, queries=100, gallery=100_000, k=k, recall=float(kept))
        if name.startswith("fct") or name.endswith((" fp32", " f32")):
            exact[name] = ids
        else:
            assert kept > 0.5, f"{name}: finds {kept:.0%} of the rows"
    with faiss_search(q, g, k, threads, faiss_settings, folder) as worker:
        exact[FAISS] = worker.result()
        measure("topk peers", {**fns, FAISS: worker}, q, g, k, threads, record, peaks, exact=exact)


@pytest.mark.parametrize("k", [1, 10, 100, 1000])
def test_k(
    k: int, faiss_settings: dict[str, str], folder: Path, threads: int, peaks: Peaks, record: Callable[..., None]
) -> None:
    q, g = make(200_000, 128, 500)
    fns = {OURS: ours(q, fct.prepare_gallery(g, metric="ip", threads=threads), k, threads)}
    with faiss_search(q, g, k, threads, faiss_settings, folder) as worker:
        measure("topk k", {**fns, FAISS: worker}, q, g, k, threads, record, peaks, exact={FAISS: worker.result()})


@pytest.mark.parametrize(("queries", "table"), [(100, "topk gallery"), (1, "topk one query")])
@pytest.mark.parametrize("n", [10_000, 50_000, 300_000])  # others' sizes: one case stands in one table alone
def test_gallery_size(
    n: int, queries: int, table: str, million: Any, faiss_settings: dict[str, str], folder: Path, threads: int,
    peaks: Peaks, record: Callable[..., None],
) -> None:  # fmt: skip
    q, g = million[0][:queries], million[1][:n]
    fns = {OURS: ours(q, fct.prepare_gallery(g, metric="ip", threads=threads), 10, threads)}
    with faiss_search(q, g, 10, threads, faiss_settings, folder) as worker:
        measure(table, {**fns, FAISS: worker}, q, g, 10, threads, record, peaks,
                exact={FAISS: worker.result()})  # fmt: skip


@pytest.mark.parametrize("d", [128, 384, 768, 1536])
def test_dimensions(
    d: int, faiss_settings: dict[str, str], folder: Path, threads: int, peaks: Peaks, record: Callable[..., None]
) -> None:
    q, g = make(100_000, d, 500)
    fns = {OURS: ours(q, fct.prepare_gallery(g, metric="ip", threads=threads), 10, threads)}
    with faiss_search(q, g, 10, threads, faiss_settings, folder) as worker:
        measure("topk dims", {**fns, FAISS: worker}, q, g, 10, threads, record, peaks,
                exact={FAISS: worker.result()})  # fmt: skip


@pytest.mark.parametrize("queries", [1, 1000])
def test_threads(queries: int, million: Any, threads: int, record: Callable[..., None]) -> None:
    """1 -> 2 threads, and on to all."""
    q, _, _, prepared = million
    counts = sorted({1, 2, threads} if threads > 1 else {1})
    fns = {str(count): ours(q[:queries], prepared, 10, count) for count in counts}
    want = fns["1"]()
    for call in fns.values():
        np.testing.assert_array_equal(call(), want)
    times = interleave(fns, seconds=1.0, rounds=5, most=50)
    for count, timing in times.items():
        record("topk threads", who=OURS, threads=int(count), queries=queries, gallery=1_000_000, k=10,
               speedup=times["1"].median / timing.median, **timing_fields(timing))  # fmt: skip
