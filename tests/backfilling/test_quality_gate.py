"""The quality gate measures what the job will write: its precision, its dtype, its backend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct.backfilling import quality
from fct.transform import transform_finite

D = 16


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "old").mkdir()
    np.save(tmp_path / "old/a.npy", np.random.default_rng(0).standard_normal((64, D), dtype=np.float32))
    return tmp_path / "old"


def pairs_close_together(h: fct.Transformation) -> dict[str, Any]:
    """Rows that differ by less than bf16 can tell apart: at fp32 h is perfect on them, at bf16 it is not."""
    rng = np.random.default_rng(1)
    old = rng.standard_normal(D).astype(np.float32) + 1e-3 * rng.standard_normal((200, D)).astype(np.float32)
    return {"old": old, "new": fct.transform_batch(old, None, h, precision="fp32")}


def test_the_gate_is_the_jobs_own_precision(source: Path, tmp_path: Path) -> None:
    h = fct.Transformation.random(D, D, 8, inner=32, side_info=False)
    options: dict[str, Any] = {"old_model": "random-old", "pairs": pairs_close_together(h), "min_recall": 0.99}
    exact = fct.plan_backfill(source, tmp_path / "new", h, precision="fp32", measure_seconds=0.001, **options)
    assert exact.quality is not None
    assert (exact.quality.recall_at_10, exact.refusals) == (1.0, ())
    coarse = fct.plan_backfill(source, tmp_path / "new", h, precision="bf16", measure_seconds=0.001, **options)
    assert coarse.quality is not None
    assert coarse.quality.recall_at_10 < 0.9
    assert "quality gate: recall@10 is" in coarse.gate_refusals[0]
    with pytest.raises(fct.QualityGateError, match=r"recall@10 is 0\.\d+ on 200 pairs, below 0\.99"):
        fct.backfill(source, tmp_path / "new", h, precision="bf16", progress=False, **options)
    assert not (tmp_path / "new").exists()


def test_the_gate_is_the_jobs_own_dtype(source: Path, tmp_path: Path) -> None:
    """Values past float16's range would all go to rejects/."""
    h = fct.Transformation.random(D, D, 8, inner=32, side_info=False)
    old = np.random.default_rng(2).standard_normal((30, D)).astype(np.float32) * 1e6
    options: dict[str, Any] = {"old_model": "random-old", "precision": "fp32", "measure_seconds": 0.001}
    options["pairs"] = {"old": old, "new": fct.transform_batch(old, None, h, precision="fp32")}
    assert fct.plan_backfill(source, tmp_path / "new", h, **options).gate_refusals == ()
    plan = fct.plan_backfill(source, tmp_path / "new", h, dtype="float16", **options)
    assert "quality gate: h's output is not finite in float16 for 30 of 30 pairs" in plan.gate_refusals


def test_the_gate_runs_on_the_jobs_backend(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h = fct.Transformation.random(D, D, 8, inner=32, side_info=False)
    seen: list[tuple[Any, ...]] = []
    real = transform_finite

    def watched(*rows: Any, **how: Any) -> Any:
        seen.append((how["precision"], how["backend"], how["device"], how["threads"]))
        return real(*rows, **how)

    monkeypatch.setattr(quality, "transform_finite", watched)
    fct.plan_backfill(
        source, tmp_path / "new", h, old_model="random-old", pairs=pairs_close_together(h), precision="fp32",
        backend="ref", threads=1, measure_seconds=0.001,
    )  # fmt: skip
    assert seen == [("fp32", "ref", "cpu", 1)]


def test_a_threshold_keeps_its_share_of_rows() -> None:
    """Of five rows, 0.25 stands a quarter of the way up: from the other end where only one side is a distance."""
    old, new = [0.0, 0.25, 0.5, 0.75, 1.0], [10.0, 20.0, 30.0, 40.0, 50.0]
    assert quality.map_threshold(old, new, 0.25) == 20.0
    assert quality.map_threshold(old, new, 0.25, flipped=True) == 40.0


def test_recall_that_equals_its_limit_passes(source: Path, tmp_path: Path) -> None:
    h = fct.Transformation.random(D, D, 8, inner=32, side_info=False)
    plan = fct.plan_backfill(
        source, tmp_path / "new", h, precision="fp32", measure_seconds=0.001, old_model="random-old",
        pairs=pairs_close_together(h), min_recall=1.0,
    )  # fmt: skip
    assert plan.quality is not None
    assert (plan.quality.recall_at_10, plan.refusals) == (1.0, ())


def test_twelve_pairs_are_enough_and_eleven_are_not(source: Path, tmp_path: Path) -> None:
    h = fct.Transformation.random(16, 16, 12, inner=64, side_info=False)
    pairs = {name: rows[:12] for name, rows in pairs_close_together(h).items()}
    assert fct.plan_backfill(source, tmp_path / "new", h, old_model="random-old", pairs=pairs).quality is not None
    few = {name: rows[:11] for name, rows in pairs.items()}
    with pytest.raises(ValueError, match="pairs: expected as many rows of each, at least 12"):
        fct.plan_backfill(source, tmp_path / "new", h, old_model="random-old", pairs=few)
    with pytest.raises(ValueError, match="pairs: expected as many rows of each, at least 12"):
        fct.plan_backfill(source, tmp_path / "new", h, old_model="random-old", pairs=pairs | {"old": few["old"]})


def test_a_pair_is_no_neighbour_of_its_own(source: Path, tmp_path: Path) -> None:
    """Recall and mAP as one counts them by hand, each pair's own row left out: it would be found by any h."""
    h = fct.Transformation.random(D, D, 8, inner=32, side_info=False)
    rng = np.random.default_rng(3)
    old, labels = rng.standard_normal((60, D), dtype=np.float32), rng.integers(0, 4, 60)
    mapped = fct.transform_batch(old, None, h, precision="fp32")
    new = mapped + 0.5 * mapped.std() * rng.standard_normal(mapped.shape, dtype=np.float32)

    def order(queries: Any, gallery: Any) -> Any:
        distances = ((queries[:, None].astype(np.float64) - gallery[None]) ** 2).sum(axis=2)
        np.fill_diagonal(distances, np.inf)
        return np.argsort(distances, axis=1, kind="stable")[:, :-1]

    def mean_average_precision(queries: Any, gallery: Any) -> float:
        hits = labels[order(queries, gallery)] == labels[:, None]
        ranks = np.arange(1, hits.shape[1] + 1)
        return float(np.mean([(np.cumsum(h) / ranks)[h].mean() for h in hits if h.any()]))

    plan = fct.plan_backfill(
        source, tmp_path / "new", h, precision="fp32", measure_seconds=0.001, old_model="random-old",
        pairs={"old": old, "new": new, "labels": labels},
    )  # fmt: skip
    assert plan.quality is not None
    shared = [len(set(a[:10]) & set(b[:10])) for a, b in zip(order(new, mapped), order(new, new), strict=True)]
    assert plan.quality.recall_at_10 == pytest.approx(np.mean(shared) / 10)
    assert plan.quality.recall_at_10 < 0.9, "the pairs tell something"
    scores = [mean_average_precision(q, g) for q, g in ((new, mapped), (old, old), (new, new))]
    assert plan.quality.gap_closed == pytest.approx((scores[0] - scores[1]) / (scores[2] - scores[1]))


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_where_no_job_can_be_made_the_gate_takes_what_was_asked_for(dtype: Any, source: Path, tmp_path: Path) -> None:
    """auto is the store's own dtype in a job; where there is none, it is what loses nothing."""
    h = fct.Transformation.random(D, D, 8, inner=32, side_info=False)
    old = np.random.default_rng(2).standard_normal((30, D)).astype(np.float32) * 1e6
    plan = fct.plan_backfill(
        source, tmp_path / "new", h, dtype=dtype, precision="fp32", measure_seconds=0.001, old_model="another",
        pairs={"old": old, "new": fct.transform_batch(old, None, h, precision="fp32")},
    )  # fmt: skip
    assert any("'another'" in why for why in plan.refusals)
    refused = "quality gate: h's output is not finite in float16 for 30 of 30 pairs"
    assert plan.gate_refusals == ((refused,) if dtype == "float16" else ())


def test_rows_before_and_after_are_the_same_rows(tmp_path: Path) -> None:
    from fct.backfilling.resolve import resolve
    from fct.options.groups import PlanOptions

    rows = np.random.default_rng(0).standard_normal((9, D), dtype=np.float32)
    rows[[0, 5], 2] = np.nan
    np.save(tmp_path / "old.npy", rows)
    h = fct.Transformation.random(D, D, 8, inner=32, side_info=False)
    options = PlanOptions.split({"old_model": "random-old", "precision": "fp32"})
    found = resolve(tmp_path / "old.npy", tmp_path / "new", h, options)
    (piece,) = found.source.pieces()
    (batch,) = found.source.read(piece, 0, 9, 9)
    old, new, kept = quality.before_and_after(found.mapper(found.job), batch, None)
    assert kept.tolist() == [1, 2, 3, 4, 6, 7, 8]
    np.testing.assert_array_equal(old, rows[kept])
    np.testing.assert_allclose(new, fct.transform_batch(rows[kept], None, h, precision="fp32"), rtol=1e-5)


def test_scores_of_nearest_rows_are_those_of_each_space(source: Path, tmp_path: Path) -> None:
    """l2 before and inner product after: a small old threshold is a large new one."""
    h = fct.Transformation.random(D, D, 8, inner=32, side_info=False)
    h = h.with_(new_space=replace(h.new_space, metric="ip"))
    plan = fct.plan_backfill(
        source, tmp_path / "new", h, precision="fp32", measure_seconds=0.001, old_model="random-old"
    )
    rows = np.load(source / "a.npy")
    mapped = fct.transform_batch(rows, None, h, precision="fp32").astype(np.float64)
    squared = ((rows[:, None].astype(np.float64) - rows[None]) ** 2).sum(axis=2)
    products = mapped @ mapped.T
    np.fill_diagonal(squared, np.inf)
    np.fill_diagonal(products, -np.inf)
    found = plan.scores
    assert found is not None
    assert (found.metric_old, found.metric_new, found.rows) == ("l2", "ip", 64)
    assert found.old == pytest.approx(np.quantile(squared.min(axis=1), found.quantiles), rel=1e-4)
    assert found.new == pytest.approx(np.quantile(products.max(axis=1), found.quantiles), rel=1e-4)
    assert found.threshold(-1.0) == found.new[-1], "nearer than every old score"
    assert replace(found, metric_new="l2").threshold(-1.0) == found.new[0]
    assert replace(found, metric_old="cosine").threshold(-1.0) == found.new[0]
