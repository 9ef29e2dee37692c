"""config="auto" and "best": the plan follows from the pairs, floors hold, units and bad pairs do not matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
import fct.fit.auto_plan as auto_plan
from fct.baselines import fit_procrustes, fit_ridge
from fct.errors import ArtifactError, FctWarning
from fct.fit.auto_plan import FitPlan, flop_of, nominal_seconds, plan_fit
from fct.fit.linear_map import PENALTIES, RidgePath, procrustes_map
from fct.fit.neighbours import NeighbourTest
from fct.fit.pairs import check_pairs
from fct.fit.repeated_pairs import find_repeated

Arrays = tuple[Any, Any, Any]


def made(n: int, seed: int = 0, d: int = 24, classes: int = 40, noise: float = 0.3) -> Arrays:
    """Pairs from one latent vector by two random networks, the old one forgetful; new embeddings of unit length."""
    fixed = np.random.default_rng(7)
    first, second = (fixed.standard_normal((d, 2 * d)).astype(np.float32) / d**0.5 for _ in range(2))
    out, few = fixed.standard_normal((2 * d, d)).astype(np.float32), fixed.standard_normal((2 * d, d // 2))
    side_map = fixed.standard_normal((d, d // 3)).astype(np.float32)
    centres = fixed.standard_normal((classes, d)).astype(np.float32)
    rng = np.random.default_rng([seed, n])
    latent = centres[rng.integers(0, classes, n)] + noise * rng.standard_normal((n, d)).astype(np.float32)
    new = np.tanh(latent @ first) @ out
    old = (np.tanh(latent @ second) @ few.astype(np.float32)).astype(np.float32)
    return old, latent @ side_map, new / np.linalg.norm(new, axis=1, keepdims=True)


def recall(h: fct.Transformation, rows: Arrays) -> float:
    test = NeighbourTest.of(rows[2], h.new_space.metric, normalise=h.normalise, length=h.length)
    return test.recall(fct.transform_batch(rows[0], rows[1] if h.uses_side_info else None, h, precision="fp32"))


def plan(pairs: int, dims: tuple[int, int, int], **how: Any) -> FitPlan:
    return plan_fit(pairs, dims, **({"two_inputs": True, "own_validation": False, "seconds": None} | how))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the steps, for tests that ask nothing of h's quality."""
    monkeypatch.setattr(auto_plan, "_FEW_STEPS", 60)
    monkeypatch.setattr(auto_plan, "_LEAST_EPOCHS", 4)


# ---- the plan ----


@pytest.mark.parametrize("pairs", [100, 500, 2_000])
def test_few_pairs_get_many_small_blended_steps_and_cross_fitting(pairs: int) -> None:
    found = plan(pairs, (128, 64, 128))
    for config in found.rungs:
        steps = config.epochs * -(-pairs // config.batch_size)
        assert steps >= 600
        assert config.batch_size <= 64
        assert config.mixup == 1.0
        assert config.warm_average
        assert config.average == pytest.approx(min(0.99, 1 - 10 / steps))
        assert config.skip == "learned"
    assert found.folds == 4


def test_more_pairs_get_larger_batches_fewer_epochs_and_no_blending() -> None:
    twelve, hundred = (plan(n, (128, 64, 128), seconds=1e6) for n in (12_000, 100_000))
    for found in (twelve, hundred):
        assert {(c.batch_size, c.mixup, c.lr) for c in found.rungs} == {(256, 0.0, 4e-3)}
        assert found.folds == 0
        assert found.pilot_epochs is None, "with that much time every shape is trained in full"
    assert twelve.rungs[0].epochs == 48
    assert hundred.rungs[0].epochs == 16


@pytest.mark.parametrize(
    ("pairs", "dims", "two", "most"),
    [
        (100_000, (128, 128, 128), True, 40),
        (5_000, (1536, 1536, 3072), False, 60),
        (20_000, (1536, 1536, 3072), False, 120),
        (10_000_000, (128, 128, 128), True, 1_800),
    ],
)
def test_the_plan_stays_inside_its_budget(pairs: int, dims: tuple[int, int, int], two: bool, most: float) -> None:
    found = plan(pairs, dims, two_inputs=two)
    assert found.seconds <= most + 1e-6
    spent = 0.0
    if found.pilot_epochs:
        from dataclasses import replace

        short = [replace(c, epochs=found.pilot_epochs) for c in found.rungs]
        spent += sum(nominal_seconds(c, found.pilot_pairs, dims, two) for c in short)
        spent += nominal_seconds(found.rungs[-1], pairs, dims, two)
    else:
        spent += sum(nominal_seconds(c, pairs, dims, two) for c in found.rungs)
    assert spent <= 0.8 * found.seconds
    for config in found.rungs:
        weights = flop_of(config, dims, two) // 2
        assert 4 * weights <= 40e6, "the file of the widest stays under 40 MB"


def test_more_time_is_used() -> None:
    short, long = (plan(100_000, (128, 128, 128), seconds=s) for s in (20.0, 200.0))
    assert short.rungs[-1].epochs < long.rungs[-1].epochs


def test_a_linear_path_too_wide_to_train_is_solved_for() -> None:
    assert {c.skip for c in plan(5_000, (1536, 1536, 3072), two_inputs=False).rungs} == {"ridge"}


# ---- what comes out ----


@pytest.mark.parametrize(
    ("pairs", "side"),
    [
        pytest.param(100, True, marks=pytest.mark.slow),
        pytest.param(100, False, marks=pytest.mark.slow),
        pytest.param(500, True, marks=pytest.mark.slow),
    ],
)
def test_never_under_ridge_and_procrustes(pairs: int, side: bool) -> None:
    old, side_info, new = made(pairs)
    fresh = made(3_000, seed=1)
    h = fct.fit_transformation(old, side_info if side else None, new, progress=False)
    reached = recall(h, fresh if side else (fresh[0], None, fresh[2]))
    spaces: dict[str, Any] = {"new_space": h.new_space}
    floors = [
        recall(f, (fresh[0], None, fresh[2]))
        for f in (fit_ridge(old, new, **spaces), fit_procrustes(old, new, **spaces))
    ]
    assert reached >= max(floors) - 0.01, f"{reached:.3f} against {floors}"
    figures = h.info["validation"]["recall_at_10"]
    assert figures["returned"] >= max(figures["ridge"], figures["procrustes"])
    assert h.info["validation_pairs"] == pairs, "cross-fitted: every pair judges, and every pair is learnt from"
    assert len(h.info["choices"]) >= 6


@pytest.mark.slow
def test_2000_pairs_are_far_over_the_floors() -> None:
    old, side_info, new = made(2_000)
    fresh = made(3_000, seed=1)
    h = fct.fit_transformation(old, side_info, new, progress=False)
    assert recall(h, fresh) > 1.1 * recall(fit_ridge(old, new, new_space=h.new_space), (fresh[0], None, fresh[2]))


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_where_the_truth_is_linear_the_linear_map_has_a_say() -> None:
    rng = np.random.default_rng(0)
    old = rng.standard_normal((150, 20)).astype(np.float32)
    new = (old @ rng.standard_normal((20, 30)) + 0.01 * rng.standard_normal((150, 30))).astype(np.float32)
    h = fct.fit_transformation(old, None, new, progress=False)
    assert h.info["share_of_h"] < 1
    assert "ridge" in h.info["choices"][-2]
    fresh = rng.standard_normal((500, 20)).astype(np.float32)
    got = fct.transform_batch(fresh, None, h, precision="fp32")
    want = fct.transform_batch(fresh, None, fit_ridge(old, new, strength=1e-4), precision="fp32")
    assert ((got - want) ** 2).mean() < 0.2 * want.var()


@pytest.mark.usefixtures("quick")
def test_same_seed_same_h_and_interrupted_too(tmp_path: Path) -> None:
    pairs = made(120, d=12)
    whole = fct.fit_transformation(*pairs, progress=False)
    file = tmp_path / "fit.safetensors"
    seen = 0

    def stop(_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 70:  # in the third training
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fct.fit_transformation(*pairs, progress=False, checkpoint=file, checkpoint_seconds=0.2, on_epoch=stop)
    assert file.exists()
    resumed = fct.fit_transformation(*pairs, progress=False, checkpoint=file)
    assert resumed.fingerprint == whole.fingerprint
    assert list(tmp_path.iterdir()) == []
    assert whole.info["choices"] == resumed.info["choices"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("factor", [0.01, pytest.param(100.0, marks=pytest.mark.slow)])
def test_units_do_not_matter(factor: float) -> None:
    old, side, new = made(200, d=12)
    fresh = made(400, seed=3, d=12)
    plain = fct.fit_transformation(old, side, new, progress=False)
    h = fct.fit_transformation(old * factor, side * factor, new * np.float32(factor), progress=False)
    assert h.normalise, "rows of one length are a unit-length space in other units"
    assert h.length == pytest.approx(factor, rel=1e-3)
    a = fct.transform_batch(fresh[0], fresh[1], plain, precision="fp32")
    b = fct.transform_batch(fresh[0] * factor, fresh[1] * factor, h, precision="fp32") / factor
    found, again = (fct.topk(fresh[2], x.astype(np.float32), 10).indices for x in (a, b))
    assert fct.metrics.recall_at_k(found, again) > 0.93


@pytest.mark.slow
def test_best_learns_from_unpaired_rows_and_says_whether_it_paid() -> None:
    old, side, new = made(400)
    gallery = made(3_000, seed=5)
    h = fct.fit_transformation(old, side, new, config="best", unpaired=gallery[:2], progress=False)
    lines = " ".join(h.info["choices"])
    assert "4 h averaged; a student learns from" in lines
    assert "3,000 rows without a target" in lines
    auto = fct.fit_transformation(old, side, new, progress=False)
    fresh = made(3_000, seed=1)
    assert recall(h, fresh) >= recall(auto, fresh) - 0.015


# ---- bad input ----


@pytest.mark.usefixtures("quick")
def test_repeated_pairs_are_set_aside_and_conflicting_ones_named() -> None:
    old, side, new = made(150, d=12)
    again = [np.concatenate([x, x[:30]]) for x in (old, side, new)]
    h = fct.fit_transformation(*again, progress=False)
    assert h.info["repeated_pairs"] == 30
    assert h.info["pairs"] == 150
    assert "30 pairs stood there more than once and were set aside" in h.info["choices"]
    other = new.copy()
    other[:10] = -other[:10]
    twice = [np.concatenate([old, old[:10]]), np.concatenate([side, side[:10]]), np.concatenate([new, other[:10]])]
    with pytest.warns(FctWarning, match="pairs: 20 of 160 have inputs that stand there with another new embedding too"):
        fct.fit_transformation(*twice, progress=False)


def test_repeated_pairs_are_found_whatever_the_sign_of_zero() -> None:
    x = np.array([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], np.float32)
    y = np.array([[1.0], [1.0], [1.0], [2.0]], np.float32)
    found = find_repeated(check_pairs(x, None, y), 0)
    assert list(found.first) == [0, 2, 3]
    assert (found.repeated, found.conflicting) == (1, 2)


@pytest.mark.usefixtures("quick")
def test_constant_dimensions_fewer_pairs_than_dimensions_and_one_class() -> None:
    old, side, new = made(60, d=48, classes=1)
    old[:, :5] = 3.0
    old[:, 5] = 0.0
    assert len(old) < old.shape[1] + side.shape[1] + new.shape[1]
    h = fct.fit_transformation(old, side, new, progress=False)
    out = fct.transform_batch(old, side, h)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1, atol=1e-3)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("n", [3, 5, 9, 25])
def test_a_handful_of_pairs(n: int) -> None:
    old, side, new = made(n, d=6)
    h = fct.fit_transformation(old, side, new, progress=False)
    assert np.isfinite(fct.transform_batch(old, side, h)).all()
    if n == 25:
        assert h.info["cross_fitted"]
        assert h.info["mixed"]["correction"]["rows"] == 6, "items of the four parts of a cross-fit do not meet"


def test_all_pairs_alike_are_refused() -> None:
    with pytest.raises(ValueError, match="old: expected at least 3 different pairs, got 1"):
        fct.fit_transformation(*(np.ones((40, 4), np.float32) for _ in range(3)), progress=False)


def test_every_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    from fct.fit.recipes import FitConfig

    pairs = made(80, d=8)
    config = FitConfig(inner=8, epochs=3, batch_size=16, average=0.9)
    file, seen = tmp_path / "fit.safetensors", 0

    def stop(_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise KeyboardInterrupt

    how: dict[str, Any] = {"config": config, "progress": False, "checkpoint": file}
    with pytest.raises(KeyboardInterrupt):
        fct.fit_transformation(*pairs, **how, checkpoint_seconds=0, on_epoch=stop)
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for where in [*rng.integers(8, len(whole), 60), *range(8, 2000, 97)]:
        damaged = bytearray(whole)
        damaged[where] ^= 1 << int(rng.integers(0, 8))
        file.write_bytes(bytes(damaged))
        with pytest.raises(ArtifactError, match="checkpoint: "):
            fct.fit_transformation(*pairs, **how)
    file.write_bytes(whole)
    assert fct.fit_transformation(*pairs, **how).d_new == 8


# ---- linear maps ----


def test_the_ridge_path_is_ridge_regression(rng: np.random.Generator) -> None:
    x = (rng.standard_normal((90, 7)) * [1, 2, 3, 4, 5, 1e-3, 1e3] + 50).astype(np.float32)
    y = rng.standard_normal((90, 4)).astype(np.float32) + 3
    path = RidgePath(check_pairs(x, None, y), 0)
    for penalty in PENALTIES[:4]:
        a = (x - x.mean(axis=0, dtype=np.float64)) / x.std(axis=0, dtype=np.float64)
        a[:, 5] = (x[:, 5] - x[:, 5].mean(dtype=np.float64)) / x.std(axis=0, dtype=np.float64).max()
        weight = np.linalg.solve(a.T @ a + penalty * 90 * np.eye(7), a.T @ (y - y.mean(axis=0)))
        want = a @ weight + y.mean(axis=0)
        np.testing.assert_allclose(path.at(penalty)(x, None), want, atol=2e-3)


def test_procrustes_is_the_baselines() -> None:
    old, side, new = made(300)
    got = procrustes_map(check_pairs(old, side, new), 0)(old, side)
    np.testing.assert_allclose(
        got, fct.transform_batch(old, None, fit_procrustes(old, new), precision="fp32"), atol=1e-4
    )
