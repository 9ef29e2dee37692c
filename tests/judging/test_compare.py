"""Alternatives on the same pairs: train and held-out apart, each figure by another way."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct.baselines import fit_residual, fit_ridge
from fct.judging import alternatives
from fct.judging.learning_curve import extrapolate
from fct.judging.pair_coverage import neighbour_means, recalls_at_10, unlike_pairs


def made(rng: np.random.Generator, n: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    z = rng.standard_normal((n, 6)).astype(np.float32)
    labels = (z[:, 0] > 0).astype(int)
    return z[:, :4].copy(), z[:, 3:].copy(), np.tanh(z @ rng.standard_normal((6, 8)).astype(np.float32)), labels


def by_hand(queries: np.ndarray, gallery: np.ndarray, truth: np.ndarray) -> np.ndarray:
    def ten(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        d = ((a[:, None].astype(float) - b[None].astype(float)) ** 2).sum(axis=2)
        np.fill_diagonal(d, np.inf)
        return np.argsort(d, axis=1)[:, :10]

    pairs = zip(ten(queries, gallery), ten(truth, truth), strict=True)
    return np.array([len({*a} & {*b}) / 10 for a, b in pairs])


def test_recall_is_that_of_all_distances(rng: np.random.Generator) -> None:
    old, _, new, _ = made(rng, 60)
    found = recalls_at_10(old, old, new, gallery_metric="l2", metric="l2")
    np.testing.assert_allclose(found, by_hand(old, old, new), atol=1e-6)


def test_k_nn_regression_is_scikit_learns(rng: np.random.Generator) -> None:
    neighbours = pytest.importorskip("sklearn.neighbors")
    old, _, new, _ = made(rng, 80)
    peer = neighbours.KNeighborsRegressor(3).fit(old[:60], new[:60]).predict(old[60:])
    np.testing.assert_allclose(neighbour_means(old[:60], new[:60], old[60:], 3), peer, atol=1e-5)


def test_a_power_law_is_continued_and_noise_widens_its_error() -> None:
    sizes = [100, 200, 400, 800]
    exact = [np.full(50, 1 - 3 * n**-0.3) for n in sizes]
    curve = extrapolate(sizes, exact)
    assert [p.pairs for p in curve] == [*sizes, 1600, 3200]
    assert [p.measured for p in curve] == [True] * 4 + [False] * 2
    for point in curve:
        assert point.recall == pytest.approx(1 - 3 * point.pairs**-0.3, abs=1e-6)
        assert point.error < 1e-6
    noise = np.random.default_rng(0).normal(0, 0.1, (4, 50))
    assert extrapolate(sizes, list(np.array(exact) + noise))[-1].error > 0.01
    with pytest.raises(ValueError, match="pairs: expected at least two numbers"):
        extrapolate([5], exact[:1])


def test_pairs_that_are_not_the_gallerys_are_seen(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2000, 4)).astype(np.float32)
    assert unlike_pairs(x[:1000], x[1000:]) < 0.04
    half = np.concatenate([x[1000:1500], x[1500:] + 50])
    assert unlike_pairs(x[:1000], half) == pytest.approx(0.5, abs=0.03)


def test_equal_old_vectors_stay_on_one_side(rng: np.random.Generator) -> None:
    old = np.repeat(rng.standard_normal((50, 3)).astype(np.float32), 4, axis=0)
    train, held = alternatives.split_apart(old, 0.2, 0)
    assert sorted([*train, *held]) == list(range(200))
    assert len(held) == 40
    assert not {r.tobytes() for r in old[train]} & {r.tobytes() for r in old[held]}


def test_low_rank_is_reduced_rank_regression(rng: np.random.Generator) -> None:
    x = rng.standard_normal((300, 6)).astype(np.float32)
    y = (x @ rng.standard_normal((6, 2)) @ rng.standard_normal((2, 5)) + 1).astype(np.float32)
    h = alternatives.fit_low_rank(x, y, rank=2)
    np.testing.assert_allclose(
        fct.transform_batch(x, None, h, precision="fp32"),
        fct.transform_batch(x, None, fit_ridge(x, y), precision="fp32"),
        atol=1e-3,
    )
    one = fct.transform_batch(x, None, alternatives.fit_low_rank(x, y, rank=1), precision="fp32")
    assert np.linalg.matrix_rank(one - one.mean(axis=0), tol=1e-2) == 1


def test_a_comparison_says_what_each_map_does_on_held_out_pairs(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(alternatives, "fit_transformation", lambda o, s, n, **how: fit_ridge(o, n))
    old, _, new, labels = made(rng)
    found = fct.compare_alternatives(
        old, None, new, labels=labels, gallery=old, curve="ridge", rows=7200.0, price_per_hour=3.0, measure_seconds=0.01
    )
    train, held = alternatives.split_apart(old, 0.2, 0)
    by_name = {row.name: row for row in found.alternatives}
    assert list(by_name) == [
        "nothing",
        "procrustes",
        "ridge",
        "low-rank 1",
        "residual MLP",
        "residual MLP, queries to old",
        "auto",
    ]
    assert (found.train_pairs, found.held_out_pairs) == (len(train), len(held)) == (320, 80)
    h = fit_ridge(old[train], new[train])
    mapped = fct.transform_batch(old[held], None, h)
    ridge = by_name["ridge"]
    assert ridge.recall_at_10 == pytest.approx(by_hand(new[held], mapped, new[held]).mean(), abs=0.01)
    measured = fct.evaluate(new[held], mapped, labels[held], same_items=True, bootstrap=0)
    assert (ridge.cmc1, ridge.map) == pytest.approx((measured.cmc1, measured.map), abs=0.01)
    assert by_name["nothing"].recall_at_10 == pytest.approx(by_hand(old[held], old[held], new[held]).mean(), abs=1e-6)
    assert ridge.rows_per_s is not None
    assert ridge.hours == pytest.approx(2 / ridge.rows_per_s)
    assert ridge.cost == pytest.approx(3 * ridge.hours)
    assert ridge.bytes_per_row == 32
    assert ridge.mflop_per_row == h.flop_per_row / 1e6
    back = by_name["residual MLP, queries to old"]
    asked = fct.transform_batch(new[held], None, fit_residual(new[train], old[train], progress=False))
    assert back.recall_at_10 == pytest.approx(by_hand(asked, old[held], new[held]).mean(), abs=0.02)
    assert (back.hours, back.cost, back.bytes_per_row) == (0, 0, 16), "the gallery stays as it is"
    assert [p.pairs for p in found.curve] == [40, 80, 160, 320, 640, 1280]
    assert found.curve[3].recall == pytest.approx(ridge.recall_at_10)
    assert found.unlike_gallery == 0.0
    assert set(found.ceiling) == {"old"}
    assert json.loads(found.to_json())["alternatives"][0]["name"] == "nothing"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(alternatives, "fit_transformation", lambda o, s, n, **how: fit_ridge(o, n))
    monkeypatch.setattr(alternatives, "fit_residual", lambda o, n, **how: fit_ridge(o, n))


def compared(old: np.ndarray, new: np.ndarray, **how: Any) -> fct.Comparison:
    return fct.compare_alternatives(old, None, new, curve="none", measure_seconds=0.001, progress=False, **how)


def test_few_pairs_are_measured_on_fifty_and_chance_is_told(rng: np.random.Generator, quick: None) -> None:
    old, _, new, labels = made(rng, 100)
    found = compared(old, new, labels=labels, gallery=old)
    assert (found.train_pairs, found.held_out_pairs) == (50, 50)
    assert found.notes == ("50 held-out pairs are few: ten rows drawn by lot would have a recall@10 of 20 % already",)
    noise = rng.standard_normal(new.shape).astype(np.float32)
    lot = recalls_at_10(noise[:50], noise[:50], new[:50], gallery_metric="l2", metric="l2").mean()
    assert lot == pytest.approx(10 / 49, abs=0.05), "what the note says of chance"


def test_copies_count_once_and_are_told(rng: np.random.Generator, quick: None) -> None:
    old, _, new, _ = made(rng, 300)
    found = compared(np.repeat(old, 3, axis=0), np.repeat(new, 3, axis=0))
    assert found.held_out_pairs == 60
    assert found.notes[0] == "120 held-out pairs are copies of others and were left out"
    conflicting = compared(np.repeat(old, 3, axis=0), rng.standard_normal((900, 8)).astype(np.float32))
    assert conflicting.held_out_pairs == 180, "one old vector with three new ones is no copy"
    with pytest.raises(ValueError, match=r"old: expected at least 12 different pairs held out: .*, got \d and"):
        compared(np.repeat(old[:12], 20, axis=0), np.repeat(new[:12], 20, axis=0))


def test_labels_that_say_nothing_are_told(rng: np.random.Generator, quick: None) -> None:
    old, _, new, labels = made(rng, 600)
    assert compared(old, new, labels=labels).notes == ()
    one, none = (compared(old, new, labels=given).notes for given in (np.zeros(600, int), np.arange(600)))
    assert one == ("all held-out pairs are of one class: CMC and mAP are 100 % whatever is done",)
    assert none == ("no held-out pair has another of its class: there is no CMC and no mAP",)


def test_a_gallery_of_something_else_is_told(rng: np.random.Generator, quick: None) -> None:
    old, _, new, _ = made(rng, 600)
    (note,) = compared(old, new, gallery=np.concatenate([old[:300], old[300:] + 50])).notes
    assert note.startswith("50 % of the gallery resembles no pair (1 % is usual)")
    assert note.endswith("draw the pairs from the gallery")


def test_the_parts_of_the_curve_do_not_repeat_the_warnings(
    rng: np.random.Generator, quick: None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def warning(o: np.ndarray, s: None, n: np.ndarray, **how: object) -> fct.Transformation:
        warnings.warn(f"{len(o)} pairs", fct.FctWarning, stacklevel=2)
        return fit_ridge(o, n)

    monkeypatch.setattr(alternatives, "fit_transformation", warning)
    old, _, new, _ = made(rng)
    fct.compare_alternatives(old, None, new, measure_seconds=0.001, progress=False)
    assert [str(w.message) for w in recwarn if w.category is fct.FctWarning] == ["320 pairs"]


def test_bad_input_is_named(rng: np.random.Generator) -> None:
    old, side, new, _ = made(rng)
    with pytest.raises(ValueError, match=r"new: .*400"):
        fct.compare_alternatives(old, None, new[:-1])
    with pytest.raises(ValueError, match="old: expected at least 100 pairs, half of them to measure on, got 99"):
        fct.compare_alternatives(old[:99], side[:99], new[:99])
    with pytest.raises(ValueError, match="extra: expected one of paper, best"):
        fct.compare_alternatives(old, side, new, extra=["all"])
    with pytest.raises(ValueError, match="old: expected different vectors"):
        fct.compare_alternatives(np.ones_like(old), side, new)
    new[3, 1] = np.nan
    with pytest.raises(ValueError, match="new: expected finite values, got NaN or infinity in row 3"):
        fct.compare_alternatives(old, side, new)


def test_the_command_prints_and_writes_the_figures(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from fct.cli.app import main

    monkeypatch.setattr(alternatives, "fit_transformation", lambda o, s, n, **how: fit_ridge(o, n))
    old, _, new, _ = made(rng)
    np.savez(tmp_path / "pairs.npz", old=old, new=new)
    asked = ["compare", str(tmp_path / "pairs.npz"), "--curve", "ridge", "--markdown", "--no-progress"]
    with pytest.raises(SystemExit) as ended:
        main([*asked, "--out", str(tmp_path / "c.json")])
    shown = capsys.readouterr().out
    assert not ended.value.code
    assert "| ridge | " in shown, shown
    assert "mAP" not in shown, "no column without a figure"
    assert "money" not in shown
    assert "extrapolated" in shown, shown
    assert json.loads((tmp_path / "c.json").read_text())["train_pairs"] == 320


def test_the_table_is_whole_on_a_terminal_of_eighty_columns(
    rng: np.random.Generator,
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fct.cli.app import main

    monkeypatch.setenv("COLUMNS", "80")
    old, _, new, labels = made(rng)
    np.savez(tmp_path / "pairs.npz", old=old, new=new)
    np.save(tmp_path / "y.npy", labels)
    words = ["compare", str(tmp_path / "pairs.npz"), "--curve", "none", "--no-progress", "--rows", "1e12"]
    for more in ([], ["--labels", str(tmp_path / "y.npy"), "--price-per-hour", "99"]):
        with pytest.raises(SystemExit):
            main([*words, *more])
        shown = capsys.readouterr().out
        assert "…" not in shown, shown
        assert "procrustes" in shown
        rows = [line.split() for line in shown.splitlines() if line.startswith(("procrustes", "ridge", "auto"))]
        assert len(rows) == 3
        for row in rows:  # hours in 1e12 rows, then money to the cent: whole to the last digit
            hours = float(row[-2 if more else -1].replace(",", ""))
            assert hours > 1
            if more:
                assert float(row[-1].replace(",", "")) == pytest.approx(99 * hours, rel=0.05)
                assert row[-1][-3] == "."
