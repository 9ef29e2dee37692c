"""Mapped rows among true ones: the correction is found, helps at every share, is written by --mixed and is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.errors import FctWarning
from fct.mixed_choice import _kept_promise
from fct.mixed_gallery import (
    MIXED_SHARES,
    MixedCorrection,
    add_coordinate,
    choose_correction,
    correction_of,
    mixed_curve,
    mixed_transformation,
)
from fct.mixed_warning import warn_uncorrected
from fct.mixture import mixtures


def unit(x: Any) -> Any:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def rows() -> tuple[Any, Any]:
    """(true rows, mapped rows): mapped ones keep a part of what tells an item from its cluster, at unit length."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((60, 24))
    which = rng.integers(0, 60, 1500)
    own = rng.standard_normal((1500, 24))
    kept = own * (np.arange(24) < 6)
    return unit(centres[which] + 0.8 * own), unit(centres[which] + 0.8 * kept)


@pytest.mark.parametrize(("metric", "kind"), [("ip", "length"), ("l2", "length"), ("cosine", "coordinate")])
def test_the_correction_helps_at_every_share(rows: tuple[Any, Any], metric: str, kind: str) -> None:
    new, mapped = rows
    correction = choose_correction(new[::2], mapped[::2], metric)
    assert correction.kind == kind
    assert (correction.value > 1) == (metric == "l2"), "shorter under ip and cosine, longer under l2"
    report = mixed_curve(new[1::2], mapped[1::2], metric, correction)
    assert [p.true_share for p in report.points] == list(MIXED_SHARES)
    for point in report.points:
        assert point.corrected_recall > point.recall
        assert point.recall >= report.mapped_recall - 0.01
        assert abs(point.corrected_found_true - point.true_share) < abs(point.found_true - point.true_share) + 0.1
    half = report.points[2]
    assert half.found_true < 0.45, "uncorrected, mapped rows crowd true ones out"
    assert half.corrected_recall > 1.03 * half.recall
    assert "corrected" in str(report)


def blurred(n: int, seed: int) -> tuple[Any, Any]:
    """(true rows, mapped rows): eight numbers make an item, h knows five of them and gives the mean over the others."""
    fixed = np.random.default_rng(7)
    out, others = fixed.standard_normal((8, 16)), fixed.standard_normal((64, 3))
    latent = np.random.default_rng([seed, n]).standard_normal((n, 8))
    mapped = np.mean([np.tanh(latent[:, :5] @ out[:5] + other @ out[5:]) for other in others], axis=0)
    return unit(np.tanh(latent @ out)), unit(mapped)


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
def test_what_few_rows_ask_for_is_milder_in_a_larger_gallery(metric: str) -> None:
    new, mapped = blurred(4_000, seed=1)
    chosen = choose_correction(*blurred(300, seed=0), metric)
    assert chosen.rows == 300
    assert chosen.fade > 0
    curves = [mixed_curve(new, mapped, metric, how) for how in (chosen, MixedCorrection(chosen.kind, chosen.value))]
    here, unfaded = curves
    assert abs(np.log(here.correction.value)) < abs(np.log(chosen.value))
    assert unfaded.points[0].corrected_recall < unfaded.points[0].recall - 0.003, "as it is, it is too strong"
    for point in here.points:
        assert point.corrected_recall >= point.recall - 0.002
        assert point.corrected_recall >= here.mapped_recall


def cross_fitted(n: int, leak: float) -> tuple[Any, Any, list[Any]]:
    """(true rows, mapped rows, the parts of a cross-fit): what maps a part has seen the other parts' true rows, and
    draws each of its own a little to the nearest of them."""
    new, mapped = blurred(n, seed=3)
    parts = np.array_split(np.random.default_rng(4).permutation(n), 4)
    drawn = mapped.copy()
    for part in parts:
        others = np.setdiff1d(np.arange(n), part)
        drawn[part] += leak * new[others[np.argmax(mapped[part] @ new[others].T, axis=1)]]
    return new, unit(drawn), parts


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_parts_of_a_cross_fit_do_not_meet(metric: str) -> None:
    new, mapped, parts = cross_fitted(400, leak=0.4)
    apart, together = choose_correction(new, mapped, metric, parts=parts), choose_correction(new, mapped, metric)
    assert (apart.rows, together.rows) == (100, 400)
    assert abs(np.log(apart.at(400).value)) < abs(np.log(together.value)), "rows that know the queries come too near"
    other = mapped.copy()
    other[parts[0]] = unit(np.random.default_rng(5).standard_normal(other[parts[0]].shape))
    last = [choose_correction(new, x, metric, parts=parts[1:]) for x in (mapped, other)]
    assert last[0] == last[1], "rows of no part count for nothing"

    how = MixedCorrection("length", 0.9)
    curve = mixed_curve(new, mapped, metric, how, parts=parts)
    alone = [mixed_curve(new[part], mapped[part], metric, how) for part in parts]
    assert curve.rows == 100
    assert curve.mapped_recall == pytest.approx(np.mean([x.mapped_recall for x in alone]))
    assert curve.points[2].corrected_recall == pytest.approx(np.mean([x.points[2].corrected_recall for x in alone]))


@pytest.mark.parametrize(("metric", "strong"), [("ip", 0.6), ("l2", 1 / 0.6)])
def test_a_correction_that_finds_less_than_none_gives_way_to_a_milder_one(metric: str, strong: float) -> None:
    new, mapped = blurred(1_500, seed=1)
    values = [1.0, *(strong**power for power in (0.25, 0.5, 0.75, 1.0)), 1 / strong]
    kept = _kept_promise(mixtures(new, mapped, metric, 10, 0), "length", strong, values)

    def margin(value: float) -> float:
        curve = mixed_curve(new, mapped, metric, MixedCorrection("length", value))
        return min(point.corrected_recall for point in curve.points) - curve.mapped_recall

    assert margin(strong) < 0, "this one breaks the promise"
    assert kept in values[1:4]
    assert margin(kept) >= 0
    assert margin(values[values.index(kept) + 1]) < 0, "the next stronger one would not have kept it"


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_what_is_chosen_never_finds_less_than_before_any_row_was_re_embedded(metric: str) -> None:
    for seed in range(3):
        new, mapped = blurred(300, seed)
        chosen = choose_correction(new, mapped, metric, seed=seed)
        curve = mixed_curve(new, mapped, metric, chosen, seed=seed)
        assert min(point.corrected_recall for point in curve.points) >= curve.mapped_recall


def test_a_correction_fades_and_never_turns() -> None:
    for value in (0.8, 1.25):
        chosen = MixedCorrection("length", value, rows=500, fade=0.05)
        assert chosen.at(20).value == chosen.at(500).value == pytest.approx(value)
        ladder = [abs(np.log(chosen.at(rows).value)) for rows in (500, 5_000, 50_000, 10**9)]
        assert ladder == sorted(ladder, reverse=True)
        assert ladder[1] == pytest.approx(np.log(1.25) - 0.05 * np.log(10))
        assert ladder[-1] == 0, "at last nothing is corrected; mapped rows never get the other way"
    assert MixedCorrection("length", 0.8).at(10**9).value == 0.8, "an older artifact's holds everywhere"


def test_nothing_changes_while_every_row_is_mapped(rows: tuple[Any, Any]) -> None:
    new, mapped = rows
    before, after = (fct.topk(new, mapped * np.float32(s), 10, metric="ip").indices for s in (1.0, 0.5))
    np.testing.assert_array_equal(before, after)


def test_the_added_coordinate_is_the_shorter_length_in_a_store_that_normalises(rows: tuple[Any, Any]) -> None:
    new, mapped = rows
    how = MixedCorrection("coordinate", 0.9)
    stored = np.concatenate(
        [add_coordinate(mapped[:700], how, mapped=True), add_coordinate(new[700:], how, mapped=False)]
    )
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, atol=1e-6)
    got = fct.topk(add_coordinate(new, how, mapped=False), stored, 10, metric="cosine").indices
    want = fct.topk(new, np.concatenate([mapped[:700] * np.float32(0.9), new[700:]]), 10, metric="ip").indices
    assert np.mean(got == want) > 0.999


def fitted(metric: str) -> tuple[Any, Any, fct.Transformation]:
    rng = np.random.default_rng(1)
    old = rng.standard_normal((120, 6)).astype(np.float32)
    new = unit(np.tanh(old @ rng.standard_normal((6, 8))) + 0.3 * rng.standard_normal((120, 8)))
    space = fct.EmbeddingSpace("new", 8, metric=metric, normalised=True)
    info = {"mixed": mixed_curve(new, unit(new + 0.4), "ip", MixedCorrection("length", 0.9)).to_dict()}
    if metric == "cosine":
        info["mixed"]["correction"]["kind"] = "coordinate"
    h = fct.Transformation.random(6, 6, 8, inner=8, side_info=False, normalise=True).with_(new_space=space, info=info)
    return old, new, h


def test_backfill_writes_that_length_and_the_space_says_so(tmp_path: Path) -> None:
    old, new, h = fitted("ip")
    np.save(tmp_path / "old.npy", old)
    how: dict[str, Any] = {"old_model": "random-old", "progress": False}
    fct.backfill(tmp_path / "old.npy", tmp_path / "mixed", h, mixed=True, **how)
    fct.backfill(tmp_path / "old.npy", tmp_path / "plain", h, **how)
    lengths = [np.linalg.norm(np.load(next((tmp_path / x).glob("*.npy"))), axis=1) for x in ("mixed", "plain")]
    np.testing.assert_allclose(lengths[0], 0.9, atol=2e-3)
    np.testing.assert_allclose(lengths[1], 1.0, atol=2e-3)
    gallery = fct.UpgradingGallery(tmp_path / "old.npy", tmp_path / "mixed", h, old_model="random-old", mixed=True)
    assert gallery.space.mapped_length == 0.9
    assert "mapped rows 0.9 times as long" in str(gallery.space)
    assert gallery.topk(new[:3], 2, query_space=h.new_space).indices.shape == (3, 2), "queries are the model's own"
    with pytest.raises(fct.FctError, match="another backfill"):
        fct.UpgradingGallery(tmp_path / "old.npy", tmp_path / "mixed", h, old_model="random-old")


def test_a_backfill_takes_the_length_for_its_rows_and_keeps_it(tmp_path: Path) -> None:
    old, _, h = fitted("ip")
    h.info["mixed"]["correction"] |= {"value": 0.8, "rows": 30, "fade": 0.05}
    want = MixedCorrection("length", 0.8, rows=30, fade=0.05).at(120).value
    assert want == pytest.approx(0.857, abs=1e-3)
    table = pa.table({"id": pa.array(range(120)), "embedding": pa.array(list(old), pa.list_(pa.float32(), 6))})
    (tmp_path / "old").mkdir()
    pq.write_table(table, tmp_path / "old" / "a.parquet")
    how: dict[str, Any] = {"old_model": "random-old", "progress": False, "mixed": True}
    fct.backfill(tmp_path / "old", tmp_path / "new", h, **how)
    pq.write_table(table, tmp_path / "old" / "b.parquet")
    fct.backfill(tmp_path / "old", tmp_path / "new", h, follow=True, **how)
    rows = pq.read_table(tmp_path / "new", columns=["embedding"])["embedding"].to_pylist()
    assert len(rows) == 240
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), want, atol=2e-3)
    assert fct.evaluate_mixed(old, None, fitted("ip")[1], h, shares=[0.5]).correction.value == want  # type: ignore[arg-type]
    assert mixed_transformation(h).length == pytest.approx(correction_of(h).at(10**6).value)


def test_a_cosine_space_is_told_what_to_do_instead(tmp_path: Path) -> None:
    old, _, h = fitted("cosine")
    np.save(tmp_path / "old.npy", old)
    with pytest.raises(ValueError, match=r"mixed: .* compared by cosine, .* metric='ip' .*add_coordinate"):
        fct.backfill(tmp_path / "old.npy", tmp_path / "new", h, mixed=True, old_model="random-old", progress=False)


def test_an_h_without_a_measured_correction_is_refused_by_name() -> None:
    h = fct.Transformation.random(6, 6, 8, inner=8, side_info=False, normalise=True)
    with pytest.raises(ValueError, match="transformation: expected one with a measured correction"):
        mixed_transformation(h)
    with pytest.raises(ValueError, match="transformation: expected one with a measured correction"):
        correction_of(h)


def test_rows_that_are_not_normalised_are_scaled(rng: np.random.Generator) -> None:
    h = fct.Transformation.random(6, 4, 8, inner=8)
    old, side = rng.standard_normal((9, 6), dtype=np.float32), rng.standard_normal((9, 4), dtype=np.float32)
    got = fct.transform_batch(old, side, mixed_transformation(h, MixedCorrection("length", 0.5)), precision="fp32")
    np.testing.assert_allclose(got, 0.5 * fct.transform_batch(old, side, h, precision="fp32"), rtol=1e-4, atol=1e-6)


def test_the_warning_holds_the_measured_loss() -> None:
    _, _, h = fitted("ip")
    with pytest.warns(
        FctWarning, match=r"gallery: mapped rows stand among true ones .* recall@10 is 0\.\d+ so, and 0\.\d+"
    ):
        warn_uncorrected(h, "gallery")
    with pytest.warns(FctWarning, match=r"was not measured when h was fitted; fct\.evaluate_mixed tells"):
        warn_uncorrected(h.with_(info={}), "gallery")


def test_evaluate_mixed_reports_labels_and_refuses_nonsense(rng: np.random.Generator) -> None:
    old, new, h = fitted("ip")
    report = fct.evaluate_mixed(old, None, new, h, shares=[0.0, 0.5, 1.0], labels=rng.integers(0, 3, 120))
    assert report.correction == MixedCorrection("length", 0.9)
    assert report.points[0].recall == report.points[0].corrected_recall == report.mapped_recall
    assert report.points[2].recall == 1.0
    assert report.points[1].map is not None
    with pytest.raises(ValueError, match=r"shares: expected a share from 0 to 1, got 1\.5"):
        fct.evaluate_mixed(old, None, new, h, shares=[1.5])
    with pytest.raises(ValueError, match="shares: expected at least one share of the gallery, got none"):
        fct.evaluate_mixed(old, None, new, h, shares=[])
    with pytest.raises(ValueError, match=r"new: expected \(120, 8\) to match old, got \(119, 8\)"):
        fct.evaluate_mixed(old, None, new[:-1], h)
    with pytest.raises(ValueError, match="old: expected at least 2 rows, got 1"):
        fct.evaluate_mixed(old[:1], None, new[:1], h)
