"""Pairs as they come: in other units, all of one class, contradictory, constant, fewer than dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fct
import fct.fit.auto_plan as auto_plan
import fct.fit.transformation_fit as transformation_fit
from fct.errors import FctWarning

Arrays = tuple[Any, Any, Any]
D_OLD, D_SIDE, D_NEW = 10, 6, 12


def unit(x: Any) -> Any:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def made(n: int, seed: int = 0) -> Arrays:
    """Old and side-information tell the most of new, which has unit length."""
    fixed = np.random.default_rng(3)
    maps = [fixed.standard_normal((12, d)) / 12**0.5 for d in (D_OLD, D_SIDE, D_NEW)]
    latent = np.random.default_rng([seed, n]).standard_normal((n, 12))
    old, side, new = (np.tanh(latent @ m).astype(np.float32) for m in maps)
    return old, side, unit(new)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One small shape and few steps: nothing here asks how good h is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto_plan, "_FEW_STEPS", 60)
        patch.setattr(auto_plan, "_SHAPES", ((32, 64),))
        patch.setattr(transformation_fit, "_MEASURED_PAIRS", 64)
        yield


def fit(pairs: Arrays, **how: Any) -> fct.Transformation:
    return fct.fit_transformation(*pairs, progress=False, **how)


def found(h: fct.Transformation, rows: Arrays, scales: tuple[float, float, float], **how: Any) -> Any:
    """What each of the new embeddings finds among the rows that h maps, all of them in the units that h knows."""
    old, side, new = (x * np.float32(s) for x, s in zip(rows, scales, strict=True))
    mapped = fct.transform_batch(old, side, h, **how)
    assert np.isfinite(mapped).all()
    return fct.topk(new, mapped, 10, metric=h.new_space.metric, same_items=True, progress=False).indices


@pytest.fixture(scope="module")
def in_their_own_units() -> tuple[fct.Transformation, Any]:
    h = fit(made(160))
    return h, found(h, made(400, seed=1), (1, 1, 1), precision="fp32")


@pytest.mark.parametrize(
    "scales",
    [(0.01, 0.01, 0.01), (100, 100, 100), (100, 0.01, 1)],
    ids=["a hundredth", "a hundred times", "each its own"],
)
def test_scaled_arrays_give_the_same_retrieval(
    in_their_own_units: tuple[fct.Transformation, Any], scales: tuple[float, float, float]
) -> None:
    plain, want = in_their_own_units
    h = fit(tuple(x * np.float32(s) for x, s in zip(made(160), scales, strict=True)))  # type: ignore[arg-type]
    for precision in ("fp32", "int8"):
        got = found(h, made(400, seed=1), scales, precision=precision)
        assert fct.metrics.recall_at_k(got, want) > 0.9
    ours, theirs = (x.info["mixed"]["correction"] for x in (h, plain))
    assert ours["value"] == pytest.approx(theirs["value"], rel=0.05), "a ratio of lengths has no units"
    assert h.info["validation"]["r2"] == pytest.approx(plain.info["validation"]["r2"], abs=0.05)


def test_a_space_said_to_be_of_unit_length_may_come_in_other_units(
    in_their_own_units: tuple[fct.Transformation, Any],
) -> None:
    plain, want = in_their_own_units
    old, side, new = made(160)
    h = fit((old, side, new * np.float32(0.01)), new_space=plain.new_space)
    assert h.length == plain.length == 1.0, "h writes what the space says"
    got = found(h, made(400, seed=1), (1, 1, 1), precision="fp32")
    assert fct.metrics.recall_at_k(got, want) > 0.9
    ours, theirs = (x.info["mixed"]["correction"] for x in (h, plain))
    assert ours["value"] == pytest.approx(theirs["value"], rel=0.05)
    assert h.info["validation"]["r2"] == pytest.approx(plain.info["validation"]["r2"], abs=0.05)


def test_one_class_only() -> None:
    rng = np.random.default_rng(0)
    old, side = (rng.standard_normal((1, d)) + 0.05 * rng.standard_normal((150, d)) for d in (D_OLD, D_SIDE))
    new = unit(rng.standard_normal((1, D_NEW)) + 0.05 * np.tanh(20 * old @ rng.standard_normal((D_OLD, D_NEW))))
    h = fit((old.astype(np.float32), side.astype(np.float32), new))
    figures = h.info["validation"]["recall_at_10"]
    assert figures["returned"] >= max(figures["ridge"], figures["procrustes"])
    assert figures["returned"] > 0.15, "items of one class are told apart: by chance it were 0.07"


def test_every_input_stands_there_twice_with_two_embeddings() -> None:
    old, side, new = made(100)
    other = np.roll(new, 1, axis=1)
    both = np.concatenate([old, old]), np.concatenate([side, side]), np.concatenate([new, other])
    with pytest.warns(FctWarning, match="pairs: 200 of 200 have inputs that stand there with another new embedding to"):
        h = fit(both)
    assert (h.info["conflicting_pairs"], h.info["repeated_pairs"]) == (200, 0)
    mapped = fct.transform_batch(old, side, h, precision="fp32")
    towards = [float((mapped * x).sum(axis=1).mean()) for x in (unit(new + other), new, other)]
    assert towards[0] == max(towards), "the mean of the two is learnt, neither of them"


@pytest.mark.parametrize("which", ["old", "side_info", "new", "all but one row of new"])
def test_an_array_whose_rows_are_all_alike(which: str) -> None:
    """A broken column: it is learnt from as far as it goes, and what comes out is finite."""
    pairs = dict(zip(("old", "side_info", "new"), made(120), strict=True))
    if which == "all but one row of new":
        pairs["new"][1:] = pairs["new"][:1]
    else:
        pairs[which][:] = pairs[which][:1]
    h = fct.fit_transformation(**pairs, progress=False)
    for precision in ("fp32", "int8"):
        mapped = fct.transform_batch(pairs["old"], pairs["side_info"], h, precision=precision)
        np.testing.assert_allclose(np.linalg.norm(mapped, axis=1), 1, atol=1e-3)
    if which == "new":
        np.testing.assert_allclose(mapped, pairs["new"], atol=0.05)


def test_dimensions_that_are_constant_in_every_array() -> None:
    old, side, new = made(120)
    old[:, 0], side[:, 1], new[:, 2:5] = 7.0, 0.0, 0.0
    h = fit((old, side, unit(new)))
    for precision in ("fp32", "int8"):
        mapped = fct.transform_batch(old, side, h, precision=precision)
        assert np.abs(mapped[:, 2:5]).max() < 0.02, "a dimension of zeros stays one"


def test_fewer_pairs_than_dimensions() -> None:
    rng = np.random.default_rng(0)
    old = rng.standard_normal((30, 200)).astype(np.float32)
    new = unit(old @ rng.standard_normal((200, 90)))
    h = fct.fit_transformation(old, None, new, progress=False)
    figures = h.info["validation"]["recall_at_10"]
    assert figures["returned"] >= max(figures["ridge"], figures["procrustes"])
    assert np.isfinite(fct.transform_batch(old, None, h)).all()
