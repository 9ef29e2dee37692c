"""Score maps: scikit-learn's isotonic regression, thresholds that keep as many pairs, pairs by brute force."""

from __future__ import annotations

import numpy as np
import pytest

import fct


def noisy(n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    old = np.round(rng.random(n), 2)  # ties
    return old, old**3 + rng.normal(0, 0.1, n)


def test_the_map_is_scikit_learn_s_isotonic_regression() -> None:
    isotonic = pytest.importorskip("sklearn.isotonic")
    old, new = noisy()
    found = fct.fit_score_map(old, new, seed=3)
    other = isotonic.IsotonicRegression(out_of_bounds="clip").fit(found.fitted_old, found.fitted_new)
    asked = np.linspace(-0.5, 1.5, 501)
    np.testing.assert_allclose(found(asked), other.predict(asked), atol=1e-12)
    assert (np.diff(found(asked)) >= 0).all()
    assert found.error < 0.5 * found.error_of_mean
    assert found.error == pytest.approx(np.abs(other.predict(found.held_old) - found.held_new).mean())


@pytest.mark.parametrize("nearest", ["larger", "smaller"])
def test_a_threshold_keeps_as_many_pairs_as_before(nearest: str) -> None:
    old, new = noisy()
    sign = 1 if nearest == "larger" else -1
    found = fct.fit_score_map(sign * old, sign * new, nearest=nearest)
    carried = found.threshold(sign * 0.9)
    before, after = sign * found.held_old >= 0.9, sign * found.held_new >= sign * carried.value
    assert carried.pairs == before.sum()
    assert after.sum() == pytest.approx(before.sum(), rel=0.15)
    assert carried.recall == pytest.approx((before & after).sum() / before.sum())
    assert carried.precision == pytest.approx((before & after).sum() / after.sum())
    assert 0.5 < carried.recall < 1
    assert "held-out pairs that the old threshold keeps" in str(carried)


def test_a_threshold_where_there_are_no_pairs_is_refused() -> None:
    found = fct.fit_score_map(*noisy())
    with pytest.raises(ValueError, match=r"old: expected a threshold between .* and .*, got 3, which keeps 0"):
        found.threshold(3.0)


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_pairs_are_the_near_ones_of_either_space_once_each(metric: str) -> None:
    rng = np.random.default_rng(2)
    old, new = (rng.standard_normal((40, d)).astype(np.float32) for d in (5, 7))

    def matrix(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        if metric == "l2":
            return ((x[:, None] - x[None]) ** 2).sum(-1)
        if metric == "cosine":
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
        return x @ x.T

    wanted = set()
    for table in (matrix(old), matrix(new)):
        ranked = table if metric == "l2" else -table
        np.fill_diagonal(ranked, np.inf)
        for i, row in enumerate(ranked):
            wanted |= {(min(i, j), max(i, j)) for j in np.argsort(row)[:3]}
    pairs = np.array(sorted(wanted))
    a, b = fct.neighbour_scores(old, new, metric=metric, k=3, progress=False)
    np.testing.assert_allclose(a, matrix(old)[tuple(pairs.T)], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(b, matrix(new)[tuple(pairs.T)], rtol=1e-6, atol=1e-9)


def test_bad_input_is_refused_by_name() -> None:
    old, new = noisy()
    for bad, message in (
        ((old[:50], new[:50]), "old_scores: expected at least 100 pairs, got 50"),
        ((old, new[:-1]), r"new_scores: expected \(4000,\), the old scores' pairs, got \(3999,\)"),
        ((np.ones(200), new[:200]), "old_scores: expected different scores, got 1 every time"),
        (
            (old, np.where(old > 0.5, np.nan, new)),
            "new_scores: expected finite numbers, got some that are not",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            fct.fit_score_map(*bad)
    x = np.eye(4, dtype=np.float32)
    with pytest.raises(
        ValueError, match="new_metric: expected distances in both spaces or in neither, got cosine and l2"
    ):
        fct.neighbour_scores(x, x, new_metric="l2")
    with pytest.raises(ValueError, match="k: expected a whole number from 1 to 3, got 4"):
        fct.neighbour_scores(x, x, k=4)
