"""The compiled search on every instruction set, against the float64 reference, and the checker that judges it."""

from __future__ import annotations

import ctypes
import mmap
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import DTYPES, drawn_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check_search

import fct
from fct import _C, ref
from fct.ops.isa import using_isa
from fct.ops.search.cpu_search import Shadow, build_shadow, extend_shadow, ranks_cpu, topk_cpu
from fct.rows import Rows, ScaledInt8, rows_of

LEVELS = _C.isa_names[: _C.detected_isa() + 1]
METRICS = ("l2", "ip", "cosine")
FLOATS = ("float32", "float16", "bfloat16")


def search(q: Any, g: Any, k: int, metric: str, *, shadow: bool = True, same: bool = False, threads: int = 2) -> Any:
    rows = rows_of(g, "g")
    packed = build_shadow(rows, metric, threads=threads) if shadow else None
    return topk_cpu(rows_of(q, "q"), rows, packed, k, metric, same, threads=threads)


@pytest.fixture(params=LEVELS)
def level(request: Any) -> Iterator[str]:
    with using_isa(request.param):
        yield str(request.param)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 3, 8, 17, 64, 97, 130])
def test_every_level_is_exact(level: str, metric: str, d: int, rng: np.random.Generator) -> None:
    for n, k, nq in ((1, 1, 1), (63, 63, 2), (65, 7, 3), (1000, 20, 13)):
        g = rng.standard_normal((n, d), dtype=np.float32) + np.float32(0.5)
        q = rng.standard_normal((nq, d), dtype=np.float32)
        for shadow in (True, False):
            got = search(q, g, k, metric, shadow=shadow)
            check_search(got[0], got[1], q, g, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_same_items_leaves_the_own_row_out(level: str, metric: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal((200, 9), dtype=np.float32)
    x[50] = x[3]
    for shadow in (True, False):
        d, i, _ = search(x, x, 199, metric, shadow=shadow, same=True)
        check_search(d, i, x, x, metric, same_items=True)


def test_whole_numbers_are_exact_to_the_bit(level: str, rng: np.random.Generator) -> None:
    g = rng.integers(-4, 5, (900, 31)).astype(np.float32)  # many ties
    q = rng.integers(-4, 5, (20, 31)).astype(np.float32)
    for metric in ("l2", "ip"):
        for shadow in (True, False):
            d, i, _ = search(q, g, 50, metric, shadow=shadow)
            want = ref.topk(q, g, 50, metric)
            np.testing.assert_array_equal(d, want[0])
            np.testing.assert_array_equal(i, want[1])


def adversaries(rng: np.random.Generator, name: str) -> tuple[Any, Any]:
    n, d = (30_000 if name in ("all rows equal", "all zero") else 6000), 48
    g = rng.standard_normal((n, d)).astype(np.float32)
    q = rng.standard_normal((7, d)).astype(np.float32)
    if name == "near ties":  # tighter than 8 bits without the shift
        g = (g[:1] + 1e-5 * g).astype(np.float32)
    elif name == "huge norms":
        g *= np.float32(1e9)
        q *= np.float32(1e9)
    elif name == "tiny norms":
        g *= np.float32(1e-18)
        q *= np.float32(1e-18)
    elif name == "mixed norms":
        g *= (10.0 ** rng.uniform(-8, 8, (n, 1))).astype(np.float32)
    elif name == "one outlier component":
        g[:, 5] *= np.float32(1e5)
        q[:, 7] *= np.float32(1e5)
    elif name == "duplicates":
        g = g[rng.integers(0, 40, n)]
    elif name == "all rows equal":
        g[:] = g[0]
    elif name == "all zero":
        g[:] = 0
    elif name == "a zero query":
        q[3] = 0
    elif name == "zeros among the rows":  # without a shift that would make them something else
        g = np.round(4 * g)
        g[rng.integers(0, len(g), 900)] = 0
        g[:64] = 0  # a whole tile, and the lowest of the ties
        g = np.concatenate([g, -g])
    elif name == "rows far longer than queries":  # half of the squared norm past what whole numbers hold
        g = np.round(1000 * g) * np.float32(1e5)
        g = np.concatenate([g, -g])
    elif name == "queries far longer than rows":
        q *= np.float32(1e11)
    elif name == "far from the origin":
        g += np.float32(1e4)
        q += np.float32(1e4)
    return q, g


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "name",
    [
        "near ties",
        "huge norms",
        "tiny norms",
        "mixed norms",
        "one outlier component",
        "duplicates",
        "all rows equal",
        "all zero",
        "a zero query",
        "zeros among the rows",
        "rows far longer than queries",
        "queries far longer than rows",
        "far from the origin",
    ],
)
def test_adversaries_never_make_it_wrong(name: str, metric: str, rng: np.random.Generator) -> None:
    q, g = adversaries(rng, name)
    want = ref.topk(q, g, 12, metric)
    for shadow in (True, False):
        d, i, counts = search(q, g, 12, metric, shadow=shadow)
        np.testing.assert_allclose(d, want[0], rtol=1.3e-7, atol=1e-13 if metric == "cosine" else 0)
        same_value = np.abs(d - want[0]) <= np.spacing(np.abs(d))
        assert ((i == want[1]) | same_value).all()
        assert (i == want[1]).mean() > 0.95
        if shadow and name in ("all rows equal", "all zero"):
            assert counts["exhausted"] == len(q), "expected the fall-back"
        if shadow and name.startswith("rows far longer"):
            assert counts["exhausted"] == 0, "the scan left out rows before it had enough"


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_ties_where_8_bits_lose_nothing(level: str, metric: str, rng: np.random.Generator) -> None:
    """Bounds as tight as they get, and the k-th score shared by rows before and behind it."""
    g = rng.integers(-1, 2, (2000, 8)).astype(np.float32) * 127
    g = np.concatenate([g, -g])  # a mean of 0, so that no shift breaks the whole numbers
    q = rng.integers(-1, 2, (30, 8)).astype(np.float32) * 127
    for k in (1, 20, 500):
        d, i, counts = search(q, g, k, metric)
        want = ref.topk(q, g, k, metric)
        np.testing.assert_array_equal(d, want[0])
        np.testing.assert_array_equal(i, want[1])
        assert counts["exhausted"] < len(q)


def test_scales_of_a_tile_fit_the_whole_numbers_of_the_scan(rng: np.random.Generator) -> None:
    """A row of next to nothing beside the others would cost every other row of its tile a comparison in float32."""
    g = np.round(64 * rng.standard_normal((640, 40))).astype(np.float32)
    g[::50] *= np.float32(2.0**-20)
    g[1::50] = 0
    g = np.concatenate([g, -g])
    shadow = build_shadow(rows_of(g, "g"), "ip", threads=1)
    scale = shadow.meta[:, :64]
    assert (scale.max(axis=1) / scale.min(axis=1) <= (2**31 - 383 * 127 * 40) / (127 * 127 * 40) * 1.001).all()


@pytest.mark.parametrize("order", ["drawn", "best first", "best last", "in clusters", "duplicates"])
@pytest.mark.parametrize("k", [1, 10, 300])
def test_guessed_thresholds_are_proved_whatever_the_order(order: str, k: int, rng: np.random.Generator) -> None:
    """Many queries and tiles: thresholds are guessed from a sample, which sorted or clustered rows make unfair."""
    g = rng.standard_normal((20_000, 16)).astype(np.float32)
    q = rng.standard_normal((40, 16)).astype(np.float32)
    if order in ("best first", "best last"):
        q = (q[:1] + 0.1 * q).astype(np.float32)
        g = g[np.argsort(g @ q[0])]
        g = np.ascontiguousarray(g if order == "best last" else g[::-1])
    elif order == "in clusters":  # all of a query's best rows lie in one or two tiles
        centres = rng.standard_normal((200, 16)).astype(np.float32)
        g = np.repeat(centres, 100, axis=0) + np.float32(0.05) * g
        q = centres[:40] + np.float32(0.05) * q
    elif order == "duplicates":
        g = g[rng.integers(0, 50, len(g))]
    for metric in METRICS:
        want = ref.topk(q, g, k, metric)
        for threads in (1, 2):
            d, i, _ = search(q, g, k, metric, threads=threads)
            np.testing.assert_allclose(d, want[0], rtol=1.3e-7, atol=1e-13 if metric == "cosine" else 0)
            same_value = np.abs(d - want[0]) <= np.spacing(np.abs(d))
            assert ((i == want[1]) | same_value).all()


@pytest.mark.parametrize("metric", METRICS)
def test_the_bound_holds_for_every_pair(metric: str, rng: np.random.Generator) -> None:
    """Recomputed here from the packed shadow alone: |<q, x - x'>| <= |q| |x - x'|, with the stored |x - x'|."""
    q, g = adversaries(rng, "mixed norms")
    shadow = build_shadow(rows_of(g, "g"), metric, threads=1)
    n, d = g.shape
    tiles = shadow.tiles.reshape(-1, d // 4, 64, 4).transpose(0, 2, 1, 3).reshape(-1, d)[:n].astype(np.float64) - 128
    facts = shadow.meta[:, :256].reshape(-1, 4, 64)
    scale, half, error, norm = (facts[:, j].reshape(-1)[:n].astype(np.float64) for j in range(4))
    x = g.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True) if metric == "cosine" else x
    x = x - shadow.shift.astype(np.float64)
    packed = scale[:, None] * tiles
    assert (np.linalg.norm(x - packed, axis=1) <= error * (1 + 1e-12)).all()
    assert (np.linalg.norm(packed, axis=1) <= norm * (1 + 1e-12)).all()
    assert (error <= 1e-30 + 0.02 * np.linalg.norm(x, axis=1)).all(), "8 bits should lose about one percent"
    np.testing.assert_allclose(half, (x**2).sum(1) / 2 if metric == "l2" else 0, rtol=1e-6)
    lost = np.abs(q.astype(np.float64) @ (x - packed).T)
    assert (lost <= np.linalg.norm(q, axis=1)[:, None] * error * (1 + 1e-6)).all()
    assert (shadow.meta[:, 256] == facts[:, 2].max(1)).all()
    assert (shadow.meta[:, 257] == facts[:, 3].max(1)).all()


def test_a_shadow_whose_bound_is_too_small_is_caught(rng: np.random.Generator) -> None:
    """The check has teeth: with the stored errors set to nothing and the 8-bit rows disturbed, answers go wrong."""
    g = rng.standard_normal((3000, 32), dtype=np.float32)
    q = rng.standard_normal((20, 32), dtype=np.float32)
    rows = rows_of(g, "g")
    shadow = build_shadow(rows, "ip", threads=1)
    shadow.tiles[:] = np.clip(shadow.tiles.astype(int) + rng.integers(-60, 61, shadow.tiles.shape), 1, 255)
    shadow.meta[:, 128:256] = 0
    shadow.meta[:, 256:258] = 0
    d, i, _ = topk_cpu(rows_of(q, "q"), rows, shadow, 10, "ip", False, threads=1)
    with pytest.raises(AssertionError):
        check_search(d, i, q, g, "ip")


@pytest.mark.parametrize("isa", LEVELS)
@settings(max_examples=100)
@given(
    n=st.integers(2, 400),
    nq=st.integers(1, 30),
    d=st.integers(1, 70),
    k=st.integers(1, 400),
    metric=st.sampled_from(METRICS),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    starts=st.tuples(*[st.integers(0, 67)] * 2),
    gaps=st.tuples(*[st.sampled_from([0, 0, 1, 3])] * 2),
    exponent=st.integers(-30, 30),
    whole=st.booleans(),
    same=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_any_search(
    isa: str,
    n: int,
    nq: int,
    d: int,
    k: int,
    metric: str,
    dtypes: tuple[str, str],
    starts: tuple[int, int],
    gaps: tuple[int, int],
    exponent: int,
    whole: bool,
    same: bool,
    threads: int,
    seed: int,
) -> None:
    """Every level, metric, dtype and scale layout of either side, at any byte and row distance, any k, both paths.

    Whole numbers (times powers of two) have exact scores, so ties and all the answer is the reference's to the bit.
    """
    rng = np.random.default_rng(seed)

    def rows(count: int, side: int) -> Rows:
        x = rng.standard_normal((count, d)) + 0.3
        power = exponent // 4 if dtypes[side] == "float16" else exponent if dtypes[side] in FLOATS else 0
        x = (np.rint(x) if whole else x) * 2.0**power
        return drawn_rows(x.astype(np.float32), dtypes[side], rng, starts[side], gaps[side], powers_of_two=whole)

    gallery = rows(n, 0)
    queries = gallery if same else rows(nq, 1)
    k = min(k, n - 1 if same else n)
    with using_isa(isa):
        for shadow in (build_shadow(gallery, metric, threads=threads), None):
            got = topk_cpu(queries, gallery, shadow, k, metric, same, threads=threads)
            check_search(got[0], got[1], queries.float32(), gallery.float32(), metric, same_items=same)
            if whole and metric != "cosine":
                want = ref.topk(queries.float32(), gallery.float32(), k, metric, same)
                np.testing.assert_array_equal(got[0], want[0])
                np.testing.assert_array_equal(got[1], want[1])


def test_strided_and_misaligned(rng: np.random.Generator) -> None:
    base = rng.standard_normal((500, 40), dtype=np.float32)
    raw = bytearray(500 * 40 * 4 + 8)
    odd = np.frombuffer(raw, np.float32, 500 * 40, offset=4).reshape(500, 40)
    odd[:] = base
    wide = np.full((500, 61), np.nan, np.float32)
    wide[:, 7:47] = base
    want = ref.topk(base[:9], base, 30)
    for g in (odd, wide[:, 7:47]):
        for shadow in (True, False):
            rows = rows_of(g, "g", finite=True)
            assert np.shares_memory(rows.values, g), "a copy would hide a wrong stride"
            d, i, _ = search(g[:9], g, 30, "l2", shadow=shadow)
            np.testing.assert_array_equal(i, want[1])
            np.testing.assert_array_equal(d, want[0])


@pytest.mark.parametrize("d", [5, 16, 19])
def test_reads_nothing_past_the_last_row(level: str, d: int, rng: np.random.Generator) -> None:
    page = mmap.PAGESIZE
    n = 131
    size = -(-n * d * 4 // page) * page
    area = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), 0) == 0  # PROT_NONE
    try:
        g = np.frombuffer(area, np.float32, n * d, offset=size - n * d * 4).reshape(n, d)
        g[:] = rng.standard_normal((n, d))
        q = g[-4:]
        for metric in METRICS:
            for shadow in (True, False):
                got = search(q, g, 5, metric, shadow=shadow)
                check_search(got[0], got[1], q, g, metric)
        ranks_cpu(rows_of(q, "q"), rows_of(g, "g"), np.zeros(4, int), np.arange(n) % 2, "l2", False, threads=1)
    finally:
        assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), 3) == 0


def test_threads_and_batches_change_nothing(rng: np.random.Generator) -> None:
    g, q = rng.standard_normal((9000, 24), dtype=np.float32), rng.standard_normal((61, 24), dtype=np.float32)
    d, i, _ = search(q, g, 17, "l2", threads=1)
    for threads in (2, 3, 5):
        again = search(q, g, 17, "l2", threads=threads)
        np.testing.assert_array_equal(again[0], d)
        np.testing.assert_array_equal(again[1], i)
    for row in range(0, 61, 7):
        for shadow in (True, False):
            one = search(q[row : row + 1], g, 17, "l2", shadow=shadow)
            np.testing.assert_array_equal(one[0][0], d[row])
            np.testing.assert_array_equal(one[1][0], i[row])


def test_k_of_2048(rng: np.random.Generator) -> None:
    g, q = rng.standard_normal((5000, 16), dtype=np.float32), rng.standard_normal((3, 16), dtype=np.float32)
    got = search(q, g, 2048, "ip")
    check_search(got[0], got[1], q, g, "ip")


def test_extended_shadow_equals_one_built_at_once(rng: np.random.Generator) -> None:
    g = rng.standard_normal((777, 20), dtype=np.float32)
    start = build_shadow(rows_of(g[:130], "g"), "l2", threads=1)
    grown = extend_shadow(extend_shadow(start, rows_of(g[:131], "g"), threads=2), rows_of(g, "g"), threads=2)
    assert grown.n == 777
    for q in (g[:20], g[700:720]):
        d, i, _ = topk_cpu(rows_of(q, "q"), rows_of(g, "g"), grown, 9, "l2", False, threads=2)
        check_search(d, i, q, g, "l2")


def test_past_two_to_the_31_elements(tmp_path: Path, rng: np.random.Generator) -> None:
    """A sparse file of int8 rows, read in place: elements and bytes past 2^31, the answers at its very end."""
    d, n = 4096, (1 << 19) + 70
    path = tmp_path / "rows.int8"
    with open(path, "wb") as file:
        file.truncate(n * d)
    data = np.memmap(path, np.int8, "r+", shape=(n, d))
    assert data.size > 1 << 31
    rows = rows_of(ScaledInt8(data[-200:], 1.0), "g")
    data[-200:] = rng.integers(-100, 100, (200, d))
    whole = rows_of(ScaledInt8(data, 1.0), "g")
    q = rows_of(rng.standard_normal((1, d)).astype(np.float32), "q")
    tail = topk_cpu(q, rows, None, 50, "ip", False, threads=1)
    # The shadow of the tail alone stands where it would in the whole: the rows before it are never near the best.
    values = (ref.scores(q.float32(), data[-200:], "ip")).astype(np.float32)
    np.testing.assert_array_equal(np.sort(values[0])[::-1][:50], tail[0][0])
    got = topk_cpu(q, whole, None, 50, "ip", False, threads=2)
    np.testing.assert_array_equal(got[0], tail[0])
    np.testing.assert_array_equal(got[1], tail[1] + n - 200)


@pytest.mark.slow
def test_a_shadow_past_two_to_the_31_elements(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse float16 file: elements, bytes and the packed tiles all past 2^31, and the bytes of the rows past 2^32.

    Planted rows on both sides of each border are found by the scan alone (no query goes through every row), and stand
    in the shadow where they lie in the file.
    """
    monkeypatch.setattr("fct.ops.search.cpu_search._HALVED", 1 << 62)  # whole bytes: halves are half as large
    d, n = 1024, (1 << 21) + 200
    data = np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.float16, (n, d))
    assert data.size > 1 << 31
    middle = (1 << 31) // d  # the row whose first element, and byte of its tile, is number 2^31
    at = [*range(middle // 2 - 2, middle // 2 + 2), *range(middle - 66, middle + 3), n - 1]
    # The other rows are zeros and score 0. Ahead of them, in each part that a worker scans by itself, some that do
    # better: else all the zeros tie for the best.
    ahead = [64 * (-(-n // 64) * part // 4) + r for part in range(4) for r in range(8)]
    planted = np.unique([*ahead, *at])
    data[planted] = 1 + rng.standard_normal((len(planted), d))
    data.flush()
    gallery = np.load(tmp_path / "rows.npy", mmap_mode="r")
    prepared = fct.prepare_gallery(gallery, metric="ip")
    shadow = prepared.shadow
    assert isinstance(shadow, Shadow)
    few = np.asarray(gallery[planted])
    wanted = few[[np.searchsorted(planted, row) for row in (0, *at)]]
    queries = (wanted + 0.1 * rng.standard_normal(wanted.shape)).astype(np.float32)
    for some in (*np.split(queries[-3:], 3), queries[:20]):  # alone, the gallery in parts; and many
        q = rows_of(some, "q")
        distances, indices, counts = topk_cpu(q, prepared.rows, shadow, 5, "ip", False, threads=2)
        assert counts["exhausted"] == 0
        want = ref.topk(some, few, 5, "ip")
        np.testing.assert_array_equal(indices, planted[want[1]])
        np.testing.assert_allclose(distances, want[0], rtol=1.3e-7)
    assert shadow.tiles.nbytes > 1 << 31
    for row, values in zip(planted, few, strict=True):
        tile, r = divmod(int(row), 64)
        packed = shadow.tiles[tile].reshape(d // 4, 64, 4)[:, r].reshape(d).astype(np.float64) - 128
        scale, half, error, norm = shadow.meta[tile, :256].reshape(4, 64)[:, r].astype(np.float64)
        exact = values.astype(np.float64) - shadow.shift
        assert np.linalg.norm(exact - scale * packed) <= error * (1 + 1e-12)
        assert error < 0.02 * norm
        assert half == 0
    assert not shadow.meta[-1, :256].reshape(4, 64)[:, n % 64 :].any(), "facts of rows past the last"


@pytest.mark.parametrize("call", ["topk", "evaluate"])
def test_ctrl_c_stops_a_long_call(call: str) -> None:
    code = f"""
    import numpy as np, os, signal, threading, time, fct
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without it
    x = np.random.default_rng(0).standard_normal((60_000, 256), dtype=np.float32)
    def interrupt():
        time.sleep(0.5)
        global at
        at = time.perf_counter()
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        if {call!r} == "topk":
            fct.topk(x, x, 10, precision="fp32")
        else:
            fct.evaluate(x, x, np.arange(60_000) % 100)
        print("finished")
    except KeyboardInterrupt:
        print("stopped", time.perf_counter() - at)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    word, _, seconds = out.stdout.strip().partition(" ")
    assert word == "stopped", out.stdout + out.stderr
    assert float(seconds) < 1.0
    assert signal.getsignal(signal.SIGINT) is not None


@pytest.mark.grid(4)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("classes", [2, 5, 400])
def test_ranks_equal_the_reference(level: str, metric: str, classes: int, rng: np.random.Generator) -> None:
    """Two classes: the bucketed count; 400: the plain one, and queries without a match."""
    g = rng.standard_normal((333, 11), dtype=np.float32)
    g[100:140] = g[7]
    labels = rng.integers(0, classes, 333)
    for q, q_labels, same in ((g, labels, True), (g[:37] * 0.5, rng.integers(0, classes, 37), False)):
        first, ap = ranks_cpu(rows_of(q, "q"), rows_of(g, "g"), q_labels, labels, metric, same, threads=2)
        want_first, want_ap = ref.evaluate(q, g, q_labels, labels, metric, same)
        np.testing.assert_array_equal(first, want_first)
        np.testing.assert_allclose(ap, want_ap, rtol=1e-12)


@pytest.mark.parametrize("spread", ["one value", "clumps", "outlier", "subnormal", "infinite"])
def test_ranks_where_buckets_degenerate(spread: str, rng: np.random.Generator) -> None:
    g = rng.standard_normal((500, 1)).astype(np.float32)
    if spread == "one value":
        g[:] = 2
    elif spread == "clumps":  # tens of rows in a bucket
        g = np.round(g * 5) + rng.standard_normal((500, 1)).astype(np.float32) * np.float32(1e-4)
    elif spread == "outlier":
        g[17] = 1e15
    elif spread == "subnormal":
        g *= np.float32(1e-22)
    else:
        g[:250] *= np.float32(1e25)  # squares beyond float32: infinite, and tied
    labels = np.arange(500) % 2
    with np.errstate(over="ignore"):
        want = ref.evaluate(g, g, labels, labels, "l2", True)
    first, ap = ranks_cpu(rows_of(g, "q"), rows_of(g, "g"), labels, labels, "l2", True, threads=1)
    np.testing.assert_array_equal(first, want[0])
    np.testing.assert_allclose(ap, want[1], rtol=1e-12)
