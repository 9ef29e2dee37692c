from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

import fct
from fct import metrics, ref


@pytest.fixture
def case(rng: np.random.Generator) -> tuple[Any, Any, Any, Any]:
    g = rng.standard_normal((400, 6), dtype=np.float32)
    g[50:80] = g[3]  # tied rows of several classes
    return g[:60] * 0.9, g, rng.integers(0, 12, 60), rng.integers(0, 12, 400)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_average_precision_is_scikit_learns(case: Any, metric: str) -> None:
    q, g, q_labels, g_labels = case
    got = fct.evaluate(q, g, q_labels, g_labels, metric=metric)
    scores = ref.scores(q, g, metric).astype(np.float32) * (-1 if metric == "l2" else 1)
    want = [average_precision_score(g_labels == y, s) for y, s in zip(q_labels, scores, strict=True)]
    np.testing.assert_allclose(got.average_precision, want, rtol=1e-12)
    assert got.map == pytest.approx(np.mean(want), rel=1e-12)


def test_cmc_is_what_topk_finds(case: Any) -> None:
    q, g, q_labels, g_labels = case
    got = fct.evaluate(q, g, q_labels, g_labels, ks=(1, 3, 20))
    assert set(got.cmc) == {1, 3, 5, 20}
    for k, share in got.cmc.items():
        found = g_labels[fct.topk(q, g, k).indices]
        assert share == (found == q_labels[:, None]).any(axis=1).mean()
    assert (got.cmc1, got.cmc5) == (got.cmc[1], got.cmc[5])


def test_own_row_is_left_out(case: Any) -> None:
    _, g, _, labels = case
    got = fct.evaluate(g, g, labels, same_items=True)
    first, ap = ref.evaluate(g, g, labels, labels, "l2", True)
    np.testing.assert_array_equal(got.first_match, first)
    np.testing.assert_allclose(got.average_precision, ap, rtol=1e-12)
    assert fct.evaluate(g, g, labels).cmc1 == 1.0 or got.cmc1 < 1.0


def test_different_label_lists_are_not_all_hits(rng: np.random.Generator) -> None:
    """A known slip reports 100 % CMC for every query that has a match anywhere."""
    q = np.zeros((2, 1), np.float32)
    g = np.array([[0.0], [1.0], [2.0]], np.float32)
    got = fct.evaluate(q, g, [7, 8], [8, 9, 7])
    assert got.cmc1 == 0.5
    np.testing.assert_array_equal(got.first_match, [2, 0])


def test_cosine_divides_by_the_2_norm() -> None:
    """Under the 1-norm (another known slip) the second row would win."""
    q = np.array([[1.0, 1.0]], np.float32)
    g = np.array([[3.0, 3.1], [0.0, 5.0]], np.float32)
    got = fct.topk(q, g, 2, metric="cosine")
    assert got.indices.tolist() == [[0, 1]]
    assert got.distances[0, 1] == pytest.approx(np.sqrt(0.5))


def test_queries_without_a_match_are_counted_and_left_out(case: Any) -> None:
    q, g, q_labels, g_labels = case
    without = q_labels.copy()
    without[:7] = 99
    got = fct.evaluate(q, g, without, g_labels)
    rest = fct.evaluate(q[7:], g, without[7:], g_labels)
    assert (got.queries, got.queries_without_match) == (53, 7)
    assert (got.cmc1, got.map) == (rest.cmc1, rest.map)
    none = fct.evaluate(q[:7], g, without[:7], g_labels)
    assert (none.queries, none.queries_without_match) == (0, 7)
    assert np.isnan(none.map)
    assert none.intervals == {}


def test_strings_and_prepared_galleries(case: Any) -> None:
    q, g, q_labels, g_labels = case
    want = fct.evaluate(q, g, q_labels, g_labels)
    named = fct.evaluate(q, fct.prepare_gallery(g), [f"c{y}" for y in q_labels], [f"c{y}" for y in g_labels])  # type: ignore[arg-type]  # labels of text
    assert named == want
    with pytest.raises(ValueError, match="gallery_labels: expected labels of the queries' kind"):
        fct.evaluate(q, g, q_labels, [str(y) for y in g_labels])


def test_intervals_hold_the_mean_and_repeat_by_seed(case: Any) -> None:
    q, g, q_labels, g_labels = case
    a, b, c = (fct.evaluate(q, g, q_labels, g_labels, seed=s) for s in (1, 1, 2))
    assert a.intervals == b.intervals != c.intervals
    for name, value in (("map", a.map), ("cmc1", a.cmc1), ("cmc5", a.cmc5)):
        low, high = a.intervals[name]
        assert low <= value <= high
        assert high - low < 0.4
    ap = a.average_precision
    assert np.subtract(*a.intervals["map"][::-1]) == pytest.approx(2 * 1.96 * ap.std() / np.sqrt(len(ap)), rel=0.15)
    assert fct.evaluate(q, g, q_labels, g_labels, bootstrap=0).intervals == {}


def test_recall_at_k() -> None:
    assert metrics.recall_at_k(np.array([[0, 1, 2]]), np.array([[2, 5, 9]]), 3) == pytest.approx(1 / 3)
    assert metrics.recall_at_k(np.array([[0, 1, 2]]), np.array([[2, 5, 9]]), 2) == 0
    with pytest.raises(ValueError, match="indices: expected each index once per row, got one twice"):
        metrics.recall_at_k([[1, 1]], [[1, 2]], 2)
    with pytest.raises(ValueError, match="indices: expected as many rows as reference_indices"):
        metrics.recall_at_k([[1, 2]], [[1, 2], [3, 4]], 2)
    with pytest.raises(ValueError, match=r"indices: expected \(n, at least 3\)"):
        metrics.recall_at_k([[1, 2]], [[1, 2]], 3)


def test_gap_closed_and_negative_flips(case: Any) -> None:
    assert metrics.gap_closed(0.9, 0.5, 0.7) == pytest.approx(2.0)
    assert np.isnan(metrics.gap_closed(0.5, 0.5, 0.5))
    q, g, q_labels, g_labels = case
    before = fct.evaluate(q, g, q_labels, g_labels)
    after = fct.evaluate(-q, g, q_labels, g_labels)
    want = np.mean((before.first_match == 0) & (after.first_match != 0))
    assert metrics.negative_flip_rate(before, after) == want
    assert metrics.negative_flip_rate(before.first_match == 0, after.first_match == 0) == want
    assert metrics.negative_flip_rate(before, before) == 0
    with pytest.raises(ValueError, match=r"after: expected \(2,\) like before, got \(1,\)"):
        metrics.negative_flip_rate([True, False], [True])


def test_backfilling_curve_ends_where_evaluate_does(case: Any, rng: np.random.Generator) -> None:
    q, g, q_labels, g_labels = case
    noisy = g + rng.standard_normal(g.shape).astype(np.float32)
    curve = metrics.backfilling_curve(q, noisy, g, q_labels, g_labels, shares=(0, 0.5, 1), seed=3)
    assert curve.map[0] == fct.evaluate(q, noisy, q_labels, g_labels).map
    assert curve.map[2] == fct.evaluate(q, g, q_labels, g_labels).map
    half = np.random.default_rng(3).permutation(400)[:200]
    mixed = noisy.copy()
    mixed[half] = g[half]
    assert curve.map[1] == fct.evaluate(q, mixed, q_labels, g_labels).map
    assert len(curve.cmc1) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_labels": [1]}, r"query_labels: expected \(60,\)"),
        ({"gallery_labels": np.zeros(3, int)}, r"gallery_labels: expected \(400,\)"),
        ({"gallery_labels": None}, r"gallery_labels: expected \(400,\).*of which there are 60"),
        ({"metric": "dot"}, "metric: expected one of"),
        ({"ks": (0,)}, "ks: expected a whole number of at least 1, got 0"),
        ({"confidence": 95}, "confidence: expected a share between 0 and 1"),
        ({"confidence": 0.0}, "confidence: expected a share between 0 and 1"),
        ({"confidence": 1.0}, "confidence: expected a share between 0 and 1"),
        ({"bootstrap": -1}, "bootstrap: expected"),
        ({"gallery": np.empty((0, 6), np.float32)}, "gallery: expected at least one row"),
        ({"same_items": True}, "queries: expected .* the gallery's own rows"),
    ],
)
def test_bad_input(case: Any, change: dict[str, Any], message: str) -> None:
    q, g, q_labels, g_labels = case
    with pytest.raises(ValueError, match=message):
        fct.evaluate(**{"queries": q, "gallery": g, "query_labels": q_labels, "gallery_labels": g_labels, **change})


def test_cli(case: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    from fct.cli import main

    q, g, q_labels, g_labels = case
    np.save(tmp_path / "q.npy", q)
    np.save(tmp_path / "y.npy", q_labels)
    pq.write_table(pa.table({"e": list(g), "y": g_labels}), tmp_path / "g.parquet")
    arguments = ["evaluate", "--queries", str(tmp_path / "q.npy"), "--query-labels", str(tmp_path / "y.npy")]
    arguments += ["--gallery", f"{tmp_path}/g.parquet:e", "--gallery-labels", f"{tmp_path}/g.parquet:y"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--out", str(tmp_path / "o.json")])
    assert done.value.code == 0
    want = fct.evaluate(q, g, q_labels, g_labels)
    assert json.loads((tmp_path / "o.json").read_text()) == json.loads(json.dumps(want.to_dict()))
    assert f"{100 * want.map:.2f}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as failed:
        main([*arguments[:-1], f"{tmp_path}/g.parquet:label"])
    assert failed.value.code == 1
    assert "--gallery-labels: expected a column of" in capsys.readouterr().err
    for labels, message in (
        ("g.parquet", "expected a column of {}/g.parquet (e, y), got none; write FILE_OR_FOLDER:COLUMN"),
        ("none.parquet:y", "expected a gallery, found nothing at {}/none.parquet"),
        ("none.npy", "expected a gallery, found nothing at {}/none.npy"),
    ):
        with pytest.raises(SystemExit) as failed:
            main([*arguments[:-1], f"{tmp_path}/{labels}"])
        assert failed.value.code == 1
        assert f"--gallery-labels: {message.format(tmp_path)}" in capsys.readouterr().err
