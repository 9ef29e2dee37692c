"""The Triton search in the interpreter: exact on integers, certified on floats, on poisoned and guarded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeDevice, plain
from oracle import check_search
from spectra import HOSTILE, hostile_rows

from fct import ref
from fct.kernels import search_kernels as kernels
from fct.kernels.kernel_arguments import Shadow
from fct.ops.search import triton_search as topk_triton
from fct.ops.search.triton_search import TritonSearch
from fct.rows import Rows

KINDS = ("bf16", "int8")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDevice:
    device = FakeDevice(seed=5)
    device.install(monkeypatch, tmp_path)
    return device


def searched(fake: FakeDevice, q: Rows, g: Rows, k: int, metric: str, kind: str, **how: Any) -> tuple[Any, Any]:
    search = TritonSearch(**how)
    found = search.search(q, search.prepare(g, metric, kind), k)
    distances, rows = (fake.download(x) for x in found)
    fake.check_guards()
    return distances, rows


def check(found: tuple[Any, Any], q: Any, g: Any, k: int, metric: str) -> None:
    assert found[1].shape == (len(q), k)
    check_search(*found, q, g, metric)


def never(*_: Any) -> Any:
    raise AssertionError("every row was scored")


@pytest.mark.grid(5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize(
    ("n_q", "n", "d", "k"),
    [
        (1, 1, 1, 1), (5, 77, 9, 7), (5, 90, 300, 4),  # the tile for few queries: held, and streamed by 128 bytes
        (35, 150, 100, 6), (35, 331, 131, 10), (34, 130, 300, 4),  # the other: held in one line and in two, streamed
    ],
)  # fmt: skip
def test_search(
    fake: FakeDevice, rng: Any, monkeypatch: Any, kind: str, metric: str, n_q: int, n: int, d: int, k: int
) -> None:
    monkeypatch.setattr(topk_triton, "topk_blocked", never)  # certified, not exhausted
    q, g = rng.standard_normal((n_q, d), dtype=np.float32), rng.standard_normal((n, d), dtype=np.float32)
    check(searched(fake, fake.rows(q), fake.rows(g, pitch=d + 3), k, metric, kind), q, g, k, metric)


@pytest.mark.grid(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_ties_go_to_the_lower_row(fake: FakeDevice, rng: Any, kind: str, metric: str) -> None:
    """Small integers: every score is exact, and ties abound, beyond what any list keeps."""
    q, g = (rng.integers(-2, 3, (n, 6)).astype(np.float32) for n in (4, 700))
    for k in (1, 9, 200):
        found = searched(fake, fake.rows(q), fake.rows(g), k, metric, kind)
        want = ref.topk(q, g, k, metric)
        np.testing.assert_array_equal(found[1], want[1])
        np.testing.assert_array_equal(found[0], want[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nearer", [1, -1])
def test_every_row_nearer_than_the_last(fake: FakeDevice, kind: str, nearer: int) -> None:
    """The most candidates that a tile can hold, and after the first tiles none."""
    q, g = np.zeros((2, 8), np.float32), np.zeros((700, 8), np.float32)
    q[:, 0], g[:, 0] = (1, 2), np.arange(1, 701)[::nearer]
    found = searched(fake, fake.rows(q), fake.rows(g), 70, "ip", kind)
    np.testing.assert_array_equal(found[1], ref.topk(q, g, 70, "ip")[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_of_many_queries(fake: FakeDevice, rng: Any, kind: str, monkeypatch: Any) -> None:
    """In whole waves: as many queries a launch as query tiles of which a whole number fills the device."""
    tile = kernels.tile(kind, 32, "sm_89")
    for processors, queries in ((58, 29 * 128), (108, 27 * 128), (132, 22 * 128), (128, 32 * 128)):
        place = FakeDevice("sm_89", processors=processors)
        assert topk_triton.queries_at_once(tile, place) == queries
        made = topk_triton.plan(10**6, 10, kind, queries, place)
        assert made.splits % (processors * 128 // queries) == 0
        assert 7 <= made.splits < 7 + processors * 128 // queries
    monkeypatch.setattr(topk_triton, "queries_at_once", lambda *_: 40)
    q, g = rng.integers(-3, 4, (90, 6)).astype(np.float32), rng.integers(-3, 4, (99, 6)).astype(np.float32)
    found = searched(fake, fake.rows(q), fake.rows(g), 5, "l2", kind)
    np.testing.assert_array_equal(found[1], ref.topk(q, g, 5)[1])
    assert fake.launches.count("scan") == 3


@pytest.mark.grid(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(2048, 2048), (2500, 2047)])
def test_the_largest_k(fake: FakeDevice, rng: Any, kind: str, n: int, k: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(topk_triton, "topk_blocked", never)
    q, g = rng.standard_normal((2, 8), dtype=np.float32), rng.standard_normal((n, 8), dtype=np.float32)
    check(searched(fake, fake.rows(q), fake.rows(g), k, "l2", kind), q, g, k, "l2")


@pytest.mark.grid(5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("case", HOSTILE)
def test_exact_on_hostile_rows(fake: FakeDevice, rng: Any, case: str, metric: str, kind: str) -> None:
    q, g = hostile_rows(case, rng, 900)
    found = searched(fake, fake.rows(q), fake.rows(g), 9, metric, kind)
    check(found, q, g, 9, metric)
    if case == "equal":
        np.testing.assert_array_equal(found[1], np.broadcast_to(np.arange(9), (3, 9)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8-one", "int8-row", "int8-dim"])
def test_every_dtype(fake: FakeDevice, rng: Any, dtype: str) -> None:
    sides = []
    for n in (4, 200):
        x = rng.standard_normal((n, 20), dtype=np.float32)
        if dtype.startswith("int8"):
            axis = {"one": None, "row": 1, "dim": 0}[dtype[5:]]
            scale = np.atleast_2d(np.abs(x).max(axis, keepdims=True) / 127).astype(np.float32)
            values = torch.from_numpy(np.clip(np.rint(x / scale), -127, 127).astype(np.int8))
            sides.append(fake.rows(values, scale, pitch=23))
        else:
            sides.append(fake.rows(torch.from_numpy(x).to(getattr(torch, dtype)), pitch=23))
    q, g = sides
    found = searched(fake, q, g, 6, "l2", "bf16")
    check(found, plain(q.float32()).numpy(), plain(g.float32()).numpy(), 6, "l2")


def test_a_split_gallery_and_split_queries(fake: FakeDevice, rng: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(topk_triton, "_KEYS", 8 * 32 * 10 * 3)  # three queries at a time
    q, g = (rng.integers(-3, 4, (n, 12)).astype(np.float32) for n in (7, 500))
    for k, slab in ((5, 101), (90, 60)):
        found = searched(fake, fake.rows(q), fake.rows(g), k, "l2", "bf16", slab=slab)
        np.testing.assert_array_equal(found[1], ref.topk(q, g, k)[1])


def test_the_own_row_is_left_out(fake: FakeDevice, rng: Any) -> None:
    g = rng.standard_normal((120, 16), dtype=np.float32)
    g[7] = g[8] = g[9]
    search, rows = TritonSearch(), fake.rows(g)
    found = [fake.download(x) for x in search.search(rows, search.prepare(rows, "l2"), 3, same_items=True)]
    want = ref.topk(g, g, 3, same_items=True)
    np.testing.assert_array_equal(found[1], want[1])
    np.testing.assert_array_equal(found[0], want[0])


def test_no_rows_launch_nothing(fake: FakeDevice) -> None:
    search = TritonSearch()
    g = search.prepare(fake.rows(np.ones((3, 4), np.float32)), "l2")
    found = search.search(fake.rows(np.empty((0, 4), np.float32)), g, 2)
    assert [tuple(x.shape) for x in found] == [(0, 2), (0, 2)]
    assert fake.launches == []


def test_certified_by_the_bounds_and_not_by_luck(fake: FakeDevice, rng: Any, monkeypatch: Any) -> None:
    """Lists that keep too little: the bounds must say so. Without them, the answer is wrong."""
    g = np.repeat(rng.standard_normal((32, 16)), 64, axis=0).astype(np.float32)
    g += rng.standard_normal(g.shape).astype(np.float32) * 1e-4  # near-ties that bfloat16 cannot tell
    q = g[::300] + np.float32(1e-4)
    narrow = topk_triton.Plan(
        kernels.tile("bf16", 32, "sm_90", width=64, queries=4), 32, 1, False
    )  # one list of 32 for 2,048 rows
    monkeypatch.setattr(topk_triton, "plan", lambda *_: narrow)
    check(searched(fake, fake.rows(q), fake.rows(g), 10, "l2", "bf16"), q, g, 10, "l2")
    settle = topk_triton._Scan._settle

    def trusting(*args: Any) -> Any:
        costs, ids, certain = settle(*args)
        return costs, ids, torch.ones_like(certain)

    monkeypatch.setattr(topk_triton._Scan, "_settle", trusting)
    with pytest.raises(AssertionError):
        check(searched(fake, fake.rows(q), fake.rows(g), 10, "l2", "bf16"), q, g, 10, "l2")


def test_the_bounds_hold_for_every_pair(fake: FakeDevice, rng: Any) -> None:
    """Upper bounds of q.g - |g|^2 / 2, pair by pair, and not much above it."""
    q, g = rng.standard_normal((6, 40), dtype=np.float32), rng.standard_normal((64, 40), dtype=np.float32)
    g[5] *= 1e4
    g[6] *= 1e-6
    for kind in KINDS:
        (sq, mq, _), (sg, mg, _) = (
            topk_triton._pack(fake.rows(x), "l2", kind, is_query=query) for x, query in ((q, True), (g, False))
        )
        keys = fake.empty((6, 1, 64), "int64")
        tile = kernels.tile(kind, 64, "sm_90", width=sg.shape[1], queries=6)
        fake.launch(kernels.scan, (1, 1), {
            "queries": Shadow(sq, sq.stride(0), mq), "gallery": Shadow(sg, sg.stride(0), mg), "out": keys, "n_q": 6,
            "n_g": 64, "splits": 1, "width": sg.shape[1], "HELD": True, "KEEP": 64, "TILE": tile, "UPCAST": True,
        }, warps=4, stages=1)  # fmt: skip
        found = fake.download(keys)[:, 0]
        bits = (found >> 32).astype(np.int32)
        bound = -(bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(np.float32).astype(np.float64)
        rows = found & 0xFFFFFFFF
        true = q.astype(np.float64) @ g.T.astype(np.float64) - (g.astype(np.float64) ** 2).sum(1) / 2
        true = np.take_along_axis(true, rows, 1)
        lengths = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(g, axis=1)[rows]
        assert (bound >= true).all()
        assert (bound - true <= (0.02 if kind == "bf16" else 0.05) * lengths + 1e-3 * np.abs(true)).all()
