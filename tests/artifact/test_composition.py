"""One h for two: the same vectors as the two in turn, whatever their shapes; refused where that cannot be."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct.artifact.transformation import Layer, Transformation
from fct.baselines import fit_procrustes, fit_ridge
from fct.errors import SpaceMismatchError

MIDDLE = fct.EmbeddingSpace("v2", 5)
SHAPES: dict[str, dict[str, Any]] = {
    "paper's": {"inner": 9},
    "small, with a skip": {"inner": 7, "branch": 6, "blocks": 1, "skip": True},
    "no block in the mixer": {"inner": 7, "branch": 3, "blocks": 0},
    "no block in the mixer, a skip": {"inner": 7, "branch": 3, "blocks": 0, "skip": True},
}


def two(shapes: tuple[str, str], sides: tuple[bool, bool], **second: Any) -> tuple[Transformation, Transformation]:
    first = Transformation.random(6, 4 if sides[0] else 6, 5, side_info=sides[0], seed=1, **SHAPES[shapes[0]])
    then = Transformation.random(5, 3 if sides[1] else 5, 8, side_info=sides[1], seed=2, **SHAPES[shapes[1]], **second)
    names = [name if has else None for name, has in zip("ab", sides, strict=True)]
    return (
        first.with_(new_space=MIDDLE, side_model=names[0]),
        then.with_(old_space=MIDDLE, side_model=names[1]),
    )


def assert_same(first: Transformation, second: Transformation, one: Any, other: Any) -> Transformation:
    old = np.random.default_rng(0).standard_normal((50, first.d_old), dtype=np.float32)
    composed = Transformation.compose(first, second)
    sides = [side for side in (one, other) if side is not None]
    if one is other:
        sides = sides[:1]
    both = np.concatenate(sides, axis=1) if sides else None
    middle = fct.transform_batch(old, one, first, precision="fp32")
    want = fct.transform_batch(middle, other, second, precision="fp32")
    got = fct.transform_batch(old, both, composed, precision="fp32")
    assert np.abs(want).mean() > 0.01
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * float(np.abs(want).max()))
    return composed


@pytest.mark.parametrize("sides", [*itertools.product([True, False], repeat=2)], ids=str)
@pytest.mark.parametrize("shapes", [*itertools.product(SHAPES, repeat=2)], ids=" then ".join)
def test_one_gives_what_the_two_give_in_turn(shapes: tuple[str, str], sides: tuple[bool, bool]) -> None:
    first, second = two(shapes, sides, normalise=True)
    rng = np.random.default_rng(3)
    one, other = (
        rng.standard_normal((50, d), dtype=np.float32) if has else None for d, has in zip((4, 3), sides, strict=True)
    )
    composed = assert_same(first, second, one, other)
    assert composed.side_model == {0: None, 1: "a" if sides[0] else "b", 2: "a + b"}[sum(sides)]
    assert (composed.old_space, composed.new_space) == (first.old_space, second.new_space)


def test_side_information_of_one_model_is_read_once(tmp_path: Path) -> None:
    first, second = two(("paper's", "small, with a skip"), (True, False))
    second = Transformation.random(5, 4, 8, inner=6, branch=3, skip=True).with_(old_space=MIDDLE, side_model="a")
    side = np.random.default_rng(4).standard_normal((50, 4), dtype=np.float32)
    composed = assert_same(first, second, side, side)
    assert (composed.d_side, composed.side_model) == (4, "a")
    assert Transformation.load(composed.save(tmp_path / "h.safetensors")).fingerprint == composed.fingerprint
    assert [h["fingerprint"] for h in composed.info["composed"]] == [first.fingerprint, second.fingerprint]
    other = Transformation.random(5, 3, 8, inner=6).with_(old_space=MIDDLE, side_model="a")
    with pytest.raises(
        ValueError, match="second: expected 4 columns of side-information from 'a', as first reads, got 3"
    ):
        Transformation.compose(first, other)


def test_three_upgrades_and_linear_maps() -> None:
    rng = np.random.default_rng(5)
    v = [rng.standard_normal((80, d), dtype=np.float32) for d in (6, 5, 7, 4)]
    spaces = [fct.EmbeddingSpace(f"v{i + 1}", x.shape[1]) for i, x in enumerate(v)]
    maps = [
        fit(v[i], v[i + 1], old_space=spaces[i], new_space=spaces[i + 1])
        for i, fit in enumerate((fit_ridge, fit_procrustes, fit_ridge))
    ]
    once = assert_same(maps[0], maps[1], None, None)
    assert_same(once, maps[2], None, None)


def test_layers_without_a_relu_at_a_branch_s_end() -> None:
    first, second = two(("paper's", "paper's"), (True, True))
    first, second = (
        h.with_(side=(*h.side[:-1], Layer(h.side[-1].weight, h.side[-1].bias, relu=False))) for h in (first, second)
    )
    rng = np.random.default_rng(6)
    one, other = (rng.standard_normal((50, d), dtype=np.float32) for d in (4, 3))
    assert_same(first, second, one, other)


def test_a_first_that_normalises_is_refused_but_where_length_means_nothing() -> None:
    first, second = two(("paper's", "paper's"), (False, False), normalise=True)
    unit = first.with_(normalise=True)
    with pytest.raises(
        ValueError, match=r"first: expected .* does not normalise .* Map with the two in turn, or fit v1"
    ):
        Transformation.compose(unit, second)

    def without_bias(chain: tuple[Layer, ...]) -> tuple[Layer, ...]:
        return tuple(Layer(layer.weight, np.zeros_like(layer.bias), layer.relu) for layer in chain)

    free = second.with_(**{name: without_bias(getattr(second, name)) for name in ("old", "side", "mixer")})
    assert_same(unit, free, None, None)
    with pytest.raises(ValueError, match="first: expected"):
        Transformation.compose(unit, free.with_(normalise=False))


def test_spaces_that_do_not_meet_are_refused() -> None:
    first, second = two(("paper's", "paper's"), (False, False))
    with pytest.raises(SpaceMismatchError, match="second: expected a transformation of what first gives, 'v2'"):
        Transformation.compose(first, second.with_(old_space=fct.EmbeddingSpace("v7", 5)))
