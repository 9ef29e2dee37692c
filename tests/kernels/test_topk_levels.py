"""A shadow with levels: exact whatever the spectrum, the order of the rows, or what the rotation was fitted on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from oracle import check_search
from spectra import SPECTRA, narrow_gallery, spectrum

import fct
from fct import _C
from fct.ops.isa import using_isa
from fct.ops.search import levels as fitting
from fct.ops.search.cpu_search import Shadow, _sampled, _shift, build_shadow, extend_shadow, topk_cpu
from fct.rows import Rows, rows_of

ISAS = _C.isa_names[: _C.detected_isa() + 1]
METRICS = ("l2", "ip", "cosine")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels also for small galleries, and where they gain nothing."""
    monkeypatch.setattr(fitting, "_LEAST_ROWS", 1)
    monkeypatch.setattr(fitting, "_GAIN", 1e9)
    monkeypatch.setattr(fitting, "HEADS", (16, 24))


def levelled(g: Any, metric: str, threads: int = 2) -> tuple[Rows, Shadow]:
    rows = rows_of(g, "g")
    shadow = build_shadow(rows, metric, threads=threads, levels=True)
    assert shadow.levels is not None
    return rows, shadow


@pytest.mark.grid(5)
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", SPECTRA)
def test_no_spectrum_makes_it_wrong(name: str, metric: str, rng: np.random.Generator) -> None:
    n, d = 5000, 61
    x = spectrum(rng, n + 40, d, name)
    g, q = x[:n], x[n:]
    rows, shadow = levelled(g, metric)
    for some in (q[:1], q[:5], q):
        for k in (1, 10):
            found = topk_cpu(rows_of(some, "q"), rows, shadow, k, metric, False, threads=2)
            check_search(found[0], found[1], some, g, metric)


@pytest.mark.grid(4)
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("metric", METRICS)
def test_every_instruction_set(isa: str, metric: str, rng: np.random.Generator) -> None:
    with using_isa(isa):
        search_every_shape(metric, rng)


def search_every_shape(metric: str, rng: np.random.Generator) -> None:
    for n, d, k, n_q in ((65, 33, 9, 3), (700, 97, 20, 30), (1000, 64, 1000, 2), (3000, 300, 10, 50)):
        x = spectrum(rng, n + n_q, d, "falling")
        g, q = x[:n], x[n:]
        rows, shadow = levelled(g, metric)
        for threads in (1, 3):
            found = topk_cpu(rows_of(q, "q"), rows, shadow, k, metric, False, threads=threads)
            check_search(found[0], found[1], q, g, metric)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("metric", METRICS)
def test_the_sample_misleads(metric: str, rng: np.random.Generator, monkeypatch: Any) -> None:
    """The rotation is fitted on rows of another space: the head holds nothing, and answers stay exact."""
    g, q = spectrum(rng, 4000, 64, "even"), spectrum(rng, 30, 64, "even")
    g[:, :16] *= np.float32(1e-3)
    other = np.zeros((500, 64))
    other[:, :16] = rng.standard_normal((500, 16))
    monkeypatch.setattr("fct.ops.search.cpu_search._sampled", lambda *_: other)
    rows, shadow = levelled(g, metric)
    found = topk_cpu(rows_of(q, "q"), rows, shadow, 10, metric, False, threads=2)
    check_search(found[0], found[1], q, g, metric)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("metric", METRICS)
def test_the_bounds_hold_for_every_row(metric: str, rng: np.random.Generator) -> None:
    """Recomputed in float64 from the packed shadow alone: what was lost, the lengths, and the rotation's own loss."""
    g = spectrum(rng, 777, 61, "mixed lengths")
    shadow = levelled(g, metric)[1]
    levels = shadow.levels
    assert levels is not None
    n, d, head = 777, 61, levels.head
    turn = np.eye(d) - levels.down.astype(np.float64) @ levels.up.astype(np.float64)
    skew = np.linalg.norm(turn @ turn.T - np.eye(d), 2)
    assert skew <= levels.loss
    assert levels.loss < 1e-3
    x = g.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True) if metric == "cosine" else x
    x = x - shadow.shift.astype(np.float64)
    y = x @ turn
    heads = shadow.tiles.reshape(-1, head // 4, 64, 4).transpose(0, 2, 1, 3).reshape(-1, head)[:n].astype(float) - 128
    facts = shadow.meta[:, :192].reshape(-1, 3, 64)
    scale, half, tail = (facts[:, j].reshape(-1)[:n].astype(np.float64) for j in range(3))
    assert shadow.tails is not None
    own = np.ascontiguousarray(shadow.tails[:, :12]).view(np.float32).astype(np.float64)
    rest = shadow.tails[:, 12 : 12 + d - head].astype(np.float64) - 128
    packed = np.concatenate([scale[:, None] * heads, own[:, :1] * rest], axis=1)
    assert (np.linalg.norm(y - packed, axis=1) <= own[:, 1]).all()
    assert (np.linalg.norm(packed, axis=1) <= own[:, 2]).all()
    assert (np.linalg.norm(y[:, head:], axis=1) <= tail).all()
    assert (own[:, 1] <= 0.03 * np.linalg.norm(x, axis=1) + 1e-30).all(), "8 bits should lose about one percent"
    np.testing.assert_allclose(half, (x**2).sum(1) / 2 if metric == "l2" else 0, rtol=1e-6)
    lost = np.linalg.norm((y - packed)[:, :head], axis=1)
    assert (lost <= np.repeat(shadow.meta[:, 192], 64)[:n]).all()


@pytest.mark.usefixtures("eager")
def test_bounds_that_are_too_small_are_caught(rng: np.random.Generator) -> None:
    """The check has teeth: with tails said to be nothing, answers go wrong."""
    x = spectrum(rng, 3040, 64, "even")
    rows, shadow = levelled(x[:3000], "ip")
    shadow.meta[:, 128:192] = 0
    found = topk_cpu(rows_of(x[3000:], "q"), rows, shadow, 10, "ip", False, threads=1)
    with pytest.raises(AssertionError):
        check_search(found[0], found[1], x[3000:], x[:3000], "ip")


@pytest.mark.usefixtures("eager")
def test_batches_threads_and_preparation_change_nothing(rng: np.random.Generator) -> None:
    x = spectrum(rng, 9061, 48, "falling")
    g, q = x[:9000], x[9000:]
    rows, shadow = levelled(g, "l2")
    want = fct.topk(q, g, 17, precision="fp32")
    for threads in (1, 2, 5):
        for size in (1, 7, 61):
            for at in range(0, 61, size):
                got = topk_cpu(rows_of(q[at : at + size], "q"), rows, shadow, 17, "l2", False, threads=threads)
                np.testing.assert_array_equal(got[0], want.distances[at : at + size])
                np.testing.assert_array_equal(got[1], want.indices[at : at + size])


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("metric", METRICS)
def test_own_rows_and_large_k(metric: str, rng: np.random.Generator) -> None:
    x = spectrum(rng, 2500, 40, "falling")
    x[900] = x[3]
    rows, shadow = levelled(x, metric)
    found = topk_cpu(rows, rows, shadow, 5, metric, True, threads=2)
    check_search(found[0], found[1], x, x, metric, same_items=True)
    found = topk_cpu(rows_of(x[:3], "q"), rows, shadow, 2048, metric, False, threads=2)
    check_search(found[0], found[1], x[:3], x, metric)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_narrow_rows_grow_and_are_saved(dtype: str, rng: np.random.Generator, tmp_path: Any) -> None:
    x = spectrum(rng, 1000, 40, "falling")
    galleries, exact = narrow_gallery(x, dtype, tmp_path / "shadow")
    for gallery in galleries:
        assert gallery.shadow is not None
        assert gallery.shadow.levels is not None
        check_search(*fct.topk(x[:30], gallery, 7), x[:30], exact, "l2")


@pytest.mark.usefixtures("eager")
def test_grown_equals_packed_at_once(rng: np.random.Generator) -> None:
    g = spectrum(rng, 777, 40, "falling")
    start = build_shadow(rows_of(g[:130], "g"), "l2", threads=1, levels=True)
    grown = extend_shadow(extend_shadow(start, rows_of(g[:131], "g"), threads=2), rows_of(g, "g"), threads=2)
    assert grown.tails is not None
    assert start.levels is not None
    assert grown.tails.shape == (777, 12 + 4 * -(-(40 - start.levels.head) // 4))
    found = topk_cpu(rows_of(g[700:720], "q"), rows_of(g, "g"), grown, 9, "l2", False, threads=2)
    check_search(found[0], found[1], g[700:720], g, "l2")


def test_levels_are_fitted_where_they_gain_and_only_there(rng: np.random.Generator) -> None:
    falling = spectrum(rng, 20_000, 128, "falling")
    for metric in METRICS:
        shadow = build_shadow(rows_of(falling, "g"), metric, threads=2, levels=True)
        assert shadow.levels is not None
        assert shadow.nbytes <= 0.3 * falling.nbytes
        counts = topk_cpu(rows_of(falling[:200], "q"), rows_of(falling, "g"), shadow, 10, metric, False, threads=2)[2]
        assert counts["tails"] < 0.2 * 200 * 20_000
    even = rng.standard_normal((20_000, 128), dtype=np.float32)
    assert build_shadow(rows_of(even, "g"), "l2", threads=2, levels=True).levels is None


def test_what_a_rotation_loses_is_bounded(rng: np.random.Generator) -> None:
    """Of a rotation that is far from orthogonal, and of one that is as near as float32 is."""
    g = rows_of(spectrum(rng, 4000, 300, "falling"), "g")
    shift = _shift(g, "l2")
    basis = fitting._basis(_sampled(g, "l2", shift).astype(np.float32), np.zeros(300, np.float32), 48)
    down, up = fitting._reflections(basis)
    assert fitting.loss_of(down, up) < 3e-4
    turn = np.eye(300) - 1.001 * down.astype(np.float64) @ up.astype(np.float64)
    skew = np.linalg.norm(turn @ turn.T - np.eye(300), 2)
    assert fitting.loss_of(np.float32(1.001) * down, up) >= skew > 1e-4
