"""CUDA's search, its whole Python path, on the emulator: CPU tensors for GPU memory, random schedules."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from typing import Any

import cuda_support as support
import numpy as np
import pytest
import torch
from cuda_support import rows
from oracle import check_search
from spectra import HOSTILE, hostile_rows

from fct.ops.search.cuda_search import CudaSearch
from fct.rows import Rows

pytestmark = support.needs_cxx


@pytest.fixture(scope="module")
def runtime() -> support.EmulatedRuntime:
    return support.EmulatedRuntime()


@pytest.fixture
def schedule(runtime: support.EmulatedRuntime) -> Callable[[int, int], None]:
    def schedule(sched: int, seed: int = 1) -> None:
        runtime.lib.schedule(sched, seed, 2)

    return schedule


def costs(queries: Any, gallery: Any, metric: str) -> Any:
    """Float64 costs rounded once, the smallest best, as docs/retrieval.md defines the order."""
    q, g = queries.astype(np.float64), gallery.astype(np.float64)
    if metric == "l2":
        c = ((q[:, None] - g[None]) ** 2).sum(2)
    else:
        c = -(q @ g.T)
        if metric == "cosine":
            norms = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(g, axis=1)
            c = np.divide(c, norms, out=np.zeros_like(c), where=norms > 0)
    return c.astype(np.float32)


@pytest.mark.grid(5)
@pytest.mark.parametrize("sched", [1, 2, 3])
@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_topk(runtime: Any, schedule: Any, rng: Any, metric: str, kind: str, sched: int) -> None:
    schedule(sched, 11)
    # few, wide and deep scans; one row, primes, dims beside a chunk of 64 and 128
    for nq, n, d, k in [(1, 1, 1, 1), (3, 197, 65, 7), (17, 331, 127, 10), (2, 700, 33, 600)]:
        q, g = rng.standard_normal((nq, d), dtype=np.float32), rng.standard_normal((n, d), dtype=np.float32)
        search = CudaSearch(runtime)
        found = search.search(rows(q), search.prepare(rows(g), metric, kind), k)
        check_search(*found, q, g, metric)


# Warps along the queries, fragments, candidates a thread, stages, gallery rows a tile: topk_scan.cuh's.
FEW, WIDE, NARROW, DEEP = (1, 1, 4, 6, 64), (4, 2, 8, 3, 64), (4, 2, 8, 3, 32), (4, 1, 16, 3, 64)
# KiB of shared memory a block may have, kind, queries, rows, d, k -> the scan, and whether it keeps its queries
SCANS = [
    (99, "bf16", 3, 301, 100, 5, FEW, True), (99, "int8", 3, 301, 100, 5, FEW, True),
    (99, "bf16", 2, 150, 1300, 5, FEW, False), (99, "int8", 2, 150, 2500, 5, FEW, False),
    (163, "bf16", 140, 331, 128, 10, WIDE, True), (227, "bf16", 140, 331, 128, 10, WIDE, True),
    (99, "bf16", 20, 331, 60, 10, WIDE, True), (99, "int8", 140, 331, 128, 10, WIDE, True),
    (99, "bf16", 20, 131, 320, 10, WIDE, False), (99, "int8", 20, 131, 600, 10, WIDE, False),
    (99, "bf16", 140, 331, 128, 10, NARROW, True), (99, "int8", 140, 331, 200, 10, NARROW, True),
    (163, "bf16", 20, 131, 384, 10, NARROW, False), (163, "int8", 20, 131, 700, 10, NARROW, False),
    (99, "bf16", 2, 700, 33, 600, DEEP, True), (99, "int8", 2, 700, 33, 600, DEEP, True),
    (99, "bf16", 2, 600, 600, 520, DEEP, False), (99, "int8", 2, 600, 1200, 520, DEEP, False),
]  # fmt: skip


def launched(search: CudaSearch, *args: Any) -> list[tuple[str, Any]]:
    """(mangled kernel, its arguments' bytes) of a search that is not carried out."""
    seen: list[tuple[str, Any]] = []
    search.runtime.lib.intercept(lambda name, grid, block, shared, cooperative, args: seen.append((name, args)))
    try:
        search.search(*args)
    finally:
        search.runtime.lib.intercept(None)
    return seen


@pytest.mark.grid(5)
@pytest.mark.parametrize("case", SCANS, ids=str)
def test_every_scan_that_a_device_can_run(schedule: Any, rng: Any, case: Any) -> None:
    kib, kind, nq, n, d, k, shape, held = case
    search = CudaSearch(support.EmulatedRuntime(shared_memory=kib << 10))
    q, g = rng.standard_normal((nq, d), dtype=np.float32), rng.standard_normal((n, d), dtype=np.float32)
    prepared = search.prepare(rows(g), "l2", kind)
    (scan,) = ((name, args) for name, args in launched(search, rows(q), prepared, k) if "4scanI" in name)
    assert shape_of(scan[0]) == (kind, *shape)
    assert bool(scan[1][0][48]) == held  # ScanArgs::queries_resident
    for sched in (1, 2, 3):
        schedule(sched, 3)
        check_search(*search.search(rows(q), prepared, k), q, g, "l2")


def shape_of(name: str) -> tuple[Any, ...]:
    """Of a mangled scan: its kind and its shape's five numbers."""
    found = re.search(r"4scanILNS0_6ShadowE(\d)ENS0_9ScanShapeI((?:Li\d+E)+)E", name)
    assert found is not None, name
    return (("bf16", "int8")[int(found[1])], *(int(x) for x in re.findall(r"Li(\d+)E", found[2])))


def test_the_list_of_scans_is_whole(runtime: Any) -> None:
    symbols = subprocess.run(["nm", "-D", runtime.lib.__file__], capture_output=True, text=True, check=True).stdout
    built = {shape_of(s) for s in symbols.split() if "4scanI" in s and "ScanArgs" in s}
    assert len(built) == 8
    ran = {(kind, *shape, held) for _, kind, *_, shape, held in SCANS}
    assert ran == {(*scan, held) for scan in built for held in (True, False)}


@pytest.mark.parametrize(
    ("kib", "multiprocessors"), [(99, 1), (99, 20), (99, 58), (99, 128), (163, 108), (227, 132), (227, 114), (99, 170)]
)
@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("d", [128, 256, 768])
def test_a_call_fills_the_device(runtime: Any, kib: int, multiprocessors: int, kind: str, d: int) -> None:
    """In whole waves: no block trails behind, few slots stay empty, and a split's query blocks run together."""
    device = {"multiprocessors": multiprocessors, "shared_memory": kib << 10}
    for k, per_block, per_list in ((10, 128, 4), (200, 128, 4), (1000, 64, 12)):
        queries = runtime.lib.cuda_search_queries(d=d, kind=("bf16", "int8").index(kind), k=k, **device)
        assert 2048 <= queries <= 4096
        size = size_of(runtime, nq=queries, n=10**6, d=d, k=k, kind=kind, **device)
        slots, blocks = multiprocessors * size["blocks_per_multiprocessor"], queries // per_block
        together = max(1, slots // blocks)  # splits that run at once
        if slots >= 2048 // per_block:
            assert together * blocks > 0.93 * slots
        assert size["splits"] % together == 0
        assert 0 <= size["splits"] - (k // per_list + 1) < together


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8-row", "int8-dim"])
def test_topk_reads_every_dtype_and_stride(runtime: Any, rng: Any, dtype: str) -> None:
    q, g = rng.standard_normal((5, 20), dtype=np.float32), rng.standard_normal((300, 20), dtype=np.float32)
    scale = {
        "int8-row": lambda x: np.abs(x).max(1, keepdims=True) / 127,
        "int8-dim": lambda x: np.abs(x).max(0, keepdims=True) / 127,
    }
    blocks = [rows(x, dtype[:4], scale[dtype](x)) if dtype in scale else rows(x, dtype) for x in (q, g)]
    wide = torch.zeros(300, 29, dtype=blocks[1].values.dtype)
    wide[:, :20] = blocks[1].values
    blocks[1] = Rows(wide[:, :20], blocks[1].dtype, blocks[1].scale, "cpu", "torch")
    search = CudaSearch(runtime)
    found = search.search(blocks[0], search.prepare(blocks[1], "l2"), 4)
    check_search(*found, *(b.float32().numpy() for b in blocks), "l2")


@pytest.mark.grid(5)
@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("case", HOSTILE)
def test_topk_is_exact_on_hostile_rows(runtime: Any, rng: Any, case: str, metric: str, kind: str) -> None:
    q, g = hostile_rows(case, rng, 600)
    search = CudaSearch(runtime)
    found = search.search(rows(q), search.prepare(rows(g), metric, kind), 9)
    check_search(*found, q, g, metric)
    if case == "equal":
        assert (found[1].numpy() == np.arange(9)).all()


def test_topk_of_a_split_gallery(runtime: Any, rng: Any) -> None:
    q, g = rng.integers(-3, 4, (4, 12)).astype(np.float32), rng.integers(-3, 4, (500, 12)).astype(np.float32)
    for k, part in [(5, 101), (5, 250), (90, 99)]:
        search = CudaSearch(runtime, part=part)
        distances, indices = search.search(rows(q), search.prepare(rows(g), "l2"), k)
        cost = costs(q, g, "l2")
        assert (indices.numpy() == np.argsort(cost, 1, kind="stable")[:, :k]).all()  # integers: ties are ties
        assert (distances.numpy() == np.sort(cost, 1)[:, :k]).all()


def test_topk_leaves_the_own_row_out(runtime: Any, rng: Any) -> None:
    g = rng.standard_normal((120, 16), dtype=np.float32)
    g[7] = g[8] = g[9]
    search = CudaSearch(runtime)
    distances, indices = search.search(rows(g), search.prepare(rows(g), "l2"), 3, same_items=True)
    check_search(distances, indices, g, g, "l2", same_items=True)


def test_no_bank_conflicts(runtime: Any, rng: Any) -> None:
    search = CudaSearch(runtime)
    g = rows(rng.standard_normal((200, 100), dtype=np.float32))
    with support.no_bank_conflicts(runtime, least=100):
        search.search(g[slice(0, 20)], search.prepare(g, "ip"), 3)


def test_zero_rows_launch_nothing(runtime: Any) -> None:
    search = CudaSearch(runtime)
    with support.nothing_launched(runtime):
        empty = rows(np.zeros((0, 5), np.float32))
        assert search.search(empty, None, 3)[1].shape == (0, 3)  # type: ignore[arg-type]  # asks no gallery for no query


def test_rows_past_two_to_the_31_elements(runtime: Any) -> None:
    """Three rows 2^30 elements apart, in memory that exists only as address space."""
    import mmap

    stride = (1 << 30) + 64  # 0x4000 below: Linux's MAP_NORESERVE, which Python names from 3.13 on
    memory = mmap.mmap(-1, 2 * stride + 8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    values = torch.frombuffer(memory, dtype=torch.int8).as_strided((3, 8), (stride, 1))
    for i in range(3):
        values[i] = torch.arange(8, dtype=torch.int8) * (i + 1)
    far = Rows(values, "int8", torch.full((1, 1), 0.5), "cpu", "torch")
    search = CudaSearch(runtime)
    distances, indices = search.search(far[slice(2, 3)], search.prepare(far, "l2"), 3)
    assert indices.tolist() == [[2, 1, 0]]
    assert distances.tolist() == [[0.0, 35.0, 140.0]]


def test_the_exact_way_in_many_rounds(runtime: Any) -> None:
    g = np.ones((3000, 3), np.float32)
    g[::5] = 2
    search = CudaSearch(runtime)
    distances, indices = search.search(rows(g[:1]), search.prepare(rows(g), "l2"), 700)
    cost = costs(g[:1], g, "l2")
    assert (indices.numpy() == np.argsort(cost, 1, kind="stable")[:, :700]).all()
    assert (distances.numpy() == np.sort(cost, 1)[:, :700]).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"k": 0}, "expected k from 1 to 2048, got 0"),
        ({"k": 2049}, "expected k from 1 to 2048, got 2049"),
        ({"n": 0}, "expected 1 to 2^31 - 65 gallery rows in one part, got 0"),
        ({"n": 2**31}, f"expected 1 to 2^31 - 65 gallery rows in one part, got {2**31}"),
        ({"nq": 40000}, "expected 1 to 32768 queries in one call, got 40000"),
    ],
)
def test_sizes_are_refused_with_a_reason(runtime: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        size_of(runtime, **arguments)


def size_of(
    runtime: Any, *, nq: int = 1, n: int = 100, d: int = 8, k: int = 5, kind: str = "bf16", multiprocessors: int = 132,
    shared_memory: int = 227 << 10,
) -> dict[str, int]:  # fmt: skip
    zeros = dict.fromkeys(("query_shadow", "query_meta", "gallery_shadow", "gallery_meta", "distances", "indices"), 0)
    queries, gallery = (0, 0, nq, d, d, 0, 0, 0), (0, 0, n, d, d, 0, 0, 0)
    return dict(
        runtime.lib.cuda_search_size(
            queries=queries, gallery=gallery, metric=0, kind=("bf16", "int8").index(kind), k=k, base=0, scratch=0,
            multiprocessors=multiprocessors, shared_memory=shared_memory, **zeros
        )
    )  # fmt: skip


def test_scratch_of_the_largest_part_needs_64_bits(runtime: Any) -> None:
    size = size_of(runtime, nq=32768, n=2**31 - 65, d=4096, k=2048)
    assert size["scratch"] > 2**31
    assert size["rescored"] == 2 * 2048 + 64
    assert size_of(runtime, nq=1, n=10**9, d=128, k=10)["splits"] >= 2 * 132


def test_a_bad_device_is_named(runtime: Any) -> None:
    with pytest.raises(RuntimeError, match=r"device 9.*cudaErrorInvalidDevice"):
        runtime.properties(9)
