"""A shadow in halves: a few queries read the high four bits alone, and answers are the same to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from oracle import check_search
from spectra import SPECTRA, narrow_gallery, spectrum

import fct
from fct import _C
from fct.ops.isa import using_isa
from fct.ops.search import cpu_search, levels
from fct.ops.search.cpu_search import Shadow, build_shadow, extend_shadow, topk_cpu
from fct.rows import Rows, rows_of

ISAS = _C.isa_names[: _C.detected_isa() + 1]
METRICS = ("l2", "ip", "cosine")


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves also for small galleries, and where levels would gain more."""
    monkeypatch.setattr(cpu_search, "_HALVED", 1)
    monkeypatch.setattr(levels, "_GAIN", -1.0)


def halved(g: Any, metric: str, threads: int = 2) -> tuple[Rows, Shadow]:
    rows = rows_of(g, "g")
    shadow = build_shadow(rows, metric, threads=threads, levels=True)
    assert shadow.low is not None
    return rows, shadow


def whole_bytes(shadow: Shadow, d: int, n: int) -> tuple[Any, Any]:
    """(values, high), (n, d): what the bytes say, and what their high halves alone say."""
    assert shadow.low is not None
    high, low = (
        part.reshape(len(part), -1, 64, 4).transpose(0, 2, 1, 3).reshape(len(part) * 64, -1)[:n].astype(np.int64)
        for part in (shadow.tiles, shadow.low)
    )
    bytes_ = np.stack([(high & 0xF0) | (low & 0x0F), (high << 4 & 0xF0) | (low >> 4)], axis=1)  # even and odd steps
    values = bytes_.reshape(n, 2, -1, 4).transpose(0, 2, 1, 3).reshape(n, -1)[:, :d]
    return values - 128, (values & 0xF0) + 8 - 128


@pytest.mark.grid(5)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", SPECTRA)
def test_no_spectrum_makes_it_wrong(name: str, metric: str, rng: np.random.Generator) -> None:
    n, d = 5000, 61
    x = spectrum(rng, n + 40, d, name)
    g, q = x[:n], x[n:]
    rows, shadow = halved(g, metric)
    for some in (q[:1], q[1:3], q[:5], q):
        for k in (1, 10):
            found = topk_cpu(rows_of(some, "q"), rows, shadow, k, metric, False, threads=2)
            check_search(found[0], found[1], some, g, metric)


@pytest.mark.grid(4)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("metric", METRICS)
def test_every_instruction_set(isa: str, metric: str, rng: np.random.Generator) -> None:
    """One query and two read the high halves, up to 24 join them on the way, more join them first."""
    with using_isa(isa):
        for n, d, k in ((65, 33, 9), (700, 97, 20), (1000, 64, 1000), (3000, 300, 10), (200, 3, 5)):
            x = spectrum(rng, n + 40, d, "even")
            g, q = x[:n], x[n:]
            rows, shadow = halved(g, metric)
            for n_q in (1, 2, 3, 24, 40):
                found = topk_cpu(rows_of(q[:n_q], "q"), rows, shadow, k, metric, False, threads=3)
                check_search(found[0], found[1], q[:n_q], g, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["even", "mixed lengths", "zeros", "tiny", "nearly equal"])
def test_the_bounds_hold_for_every_row(name: str, metric: str, rng: np.random.Generator) -> None:
    """Recomputed in float64 from the packed shadow alone."""
    n, d = 777, 61
    g = spectrum(rng, n, d, name)
    shadow = halved(g, metric)[1]
    x = g.astype(np.float64)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x = np.where(norms > 0, x / np.where(norms > 0, norms, 1), x) if metric == "cosine" else x
    x = x - shadow.shift.astype(np.float64)
    values, high = whole_bytes(shadow, d, n)
    rounding = 1e-15  # of this very arithmetic: rows near 1, differences of 1e-7
    scale, _, error, norm = (
        shadow.meta[:, :256].reshape(-1, 4, 64)[:, j].reshape(-1)[:n].astype(float) for j in range(4)
    )
    assert (scale > 0).all(), "a row of scale 0 has no high half that stands for zeros"
    assert (np.linalg.norm(x - scale[:, None] * values, axis=1) <= error + rounding).all()
    assert (np.linalg.norm(scale[:, None] * values, axis=1) <= norm + rounding).all()
    lost = np.linalg.norm(x - scale[:, None] * high, axis=1)
    assert shadow.high_error is not None
    assert (lost <= shadow.high_error.reshape(-1)[:n] + rounding).all()
    assert (shadow.high_error.reshape(-1)[:n] <= lost * (1 + 1e-6) + rounding).all()


def test_bounds_that_are_too_small_are_caught(rng: np.random.Generator) -> None:
    """The check has teeth: with nothing said to be lost, answers go wrong."""
    x = spectrum(rng, 5040, 64, "even")
    rows, shadow = halved(x[:5000], "ip")
    assert shadow.high_error is not None
    shadow.high_error[:] = 0
    shadow.meta[:, 256] = 0
    wrong = 0
    for query in x[5000:]:
        found = topk_cpu(rows_of(query[None], "q"), rows, shadow, 10, "ip", False, threads=1)
        try:
            check_search(found[0], found[1], query[None], x[:5000], "ip")
        except AssertionError:
            wrong += 1
    assert wrong > 0


@pytest.mark.parametrize("threads", [1, 2])
def test_a_gallery_that_proves_the_guess_wrong(threads: int) -> None:
    """High halves that promise too much in rows that come first, and too little in the best: the threshold that was
    thought to hold leaves the best out, and the search has to notice and read the bytes."""
    d = 64
    decoys = np.full((300, d), 16)  # a low half of 0: the high one stands for 8 more in each dimension
    best = np.full((30, d), 15)  # a low half of 15: for 7 less
    best[:, 1:11] = 31
    rows = np.concatenate([decoys, best])
    rows[:, 0] = 127  # so that the scale of every row is 1
    g = np.concatenate([rows, -rows, np.tile([[1], [-1]], (2000, d))]).astype(np.float32)  # their mean is 0
    query = np.ones((1, d), np.float32)
    packed, shadow = halved(g, "ip", threads)
    assert (shadow.shift == 0).all()
    found = topk_cpu(rows_of(query, "q"), packed, shadow, 10, "ip", False, threads=threads)
    check_search(found[0], found[1], query, g, "ip")
    assert found[1].tolist() == [list(range(300, 310))]


def test_batches_threads_and_preparation_change_nothing(rng: np.random.Generator) -> None:
    x = spectrum(rng, 9061, 48, "even")
    g, q = x[:9000], x[9000:]
    rows, shadow = halved(g, "l2")
    want = fct.topk(q, g, 17, precision="fp32")
    for threads in (1, 2, 5):
        for size in (1, 2, 7, 61):
            for at in range(0, 61, size):
                got = topk_cpu(rows_of(q[at : at + size], "q"), rows, shadow, 17, "l2", False, threads=threads)
                np.testing.assert_array_equal(got[0], want.distances[at : at + size])
                np.testing.assert_array_equal(got[1], want.indices[at : at + size])


@pytest.mark.parametrize("metric", METRICS)
def test_own_rows_and_large_k(metric: str, rng: np.random.Generator) -> None:
    x = spectrum(rng, 2500, 40, "even")
    x[900] = x[3]
    rows, shadow = halved(x, metric)
    found = topk_cpu(rows, rows, shadow, 5, metric, True, threads=2)
    check_search(found[0], found[1], x, x, metric, same_items=True)
    found = topk_cpu(rows_of(x[:2], "q"), rows, shadow, 2048, metric, False, threads=2)
    check_search(found[0], found[1], x[:2], x, metric)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_narrow_rows_grow_and_are_saved(dtype: str, rng: np.random.Generator, tmp_path: Any) -> None:
    x = spectrum(rng, 1000, 40, "even")
    galleries, exact = narrow_gallery(x, dtype, tmp_path / "shadow")
    for gallery in galleries:
        assert gallery.shadow is not None
        assert gallery.shadow.low is not None
        for query in x[:30]:
            check_search(*fct.topk(query[None], gallery, 7), query[None], exact, "l2")


def test_grown_equals_packed_at_once(rng: np.random.Generator) -> None:
    g = spectrum(rng, 777, 40, "even")
    whole = build_shadow(rows_of(g, "g"), "l2", threads=1, levels=True)
    start = build_shadow(rows_of(g[:130], "g"), "l2", threads=1, levels=True)
    grown = extend_shadow(extend_shadow(start, rows_of(g[:131], "g"), threads=2), rows_of(g, "g"), threads=2)
    assert grown.low is not None
    assert grown.tiles.shape == whole.tiles.shape == grown.low.shape == (13, 5 * 4 * 64)
    found = topk_cpu(rows_of(g[700:702], "q"), rows_of(g, "g"), grown, 9, "l2", False, threads=2)
    check_search(found[0], found[1], g[700:702], g, "l2")


def test_one_query_scores_few_rows(rng: np.random.Generator) -> None:
    """What reading half is worth: hardly a row in a hundred is left over, on rows that nothing can be known of."""
    g, q = (rng.standard_normal((n, 128), dtype=np.float32) for n in (50_000, 20))
    rows, shadow = halved(g, "l2")
    scored = sum(
        topk_cpu(rows_of(q[i : i + 1], "q"), rows, shadow, 10, "l2", False, threads=1)[2]["rescored"] for i in range(20)
    )
    assert scored < 0.02 * 20 * 50_000
