"""Blocks of zeros, of which a composed h's layers mostly are: neither read nor multiplied, and no bit the worse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fct
from fct import _C, ref
from fct.artifact.transformation import Layer, Transformation
from fct.ops.isa import isa as level
from fct.ops.isa import using_isa
from fct.ops.transform.cpu_backend import Packed
from fct.rows import rows_of

ISAS = _C.isa_names[: _C.detected_isa() + 1]
BLOCK = 128  # columns that share a band, on the widest set of instructions


def run(h: Transformation, old: Any, precision: str, threads: int) -> Any:
    """Unlike transform_batch, for outputs that are not finite."""
    out = np.empty((len(old), h.d_new), np.float32)
    views = rows_of(old, "old"), rows_of(old, "side"), rows_of(out, "out", finite=False)
    Packed(h, precision, level()).run(*views, threads=threads)
    return out


def blocks(rng: np.random.Generator, sizes: list[tuple[int, int, int]], d_in: int) -> Any:
    """(outputs, d_in): of each (count, begin, end) that many outputs, which read inputs begin to end."""
    weight = np.zeros((sum(count for count, _, _ in sizes), d_in), np.float32)
    row = 0
    for count, begin, end in sizes:
        weight[row : row + count, begin:end] = rng.standard_normal((count, end - begin)) / np.sqrt(max(1, end - begin))
        row += count
    return weight


def of_blocks(rng: np.random.Generator, **more: Any) -> Transformation:
    """Layers of unlike blocks, whose ends fall inside panels, runs and chunks; some outputs read nothing."""
    widths = [(130, 0, 60), (70, 33, 100), (300, 90, 100)], [(200, 0, 210), (9, 0, 0), (400, 300, 1000)]
    first = Layer(blocks(rng, widths[0], 100), rng.standard_normal(500))
    mixed = Layer(blocks(rng, widths[1], 1000), rng.standard_normal(609))
    last = Layer(blocks(rng, [(50, 200, 300), (90, 0, 0), (40, 0, 609)], 609), rng.standard_normal(180), False)
    return fct.Transformation.random(100, 100, 180, inner=8, side_info=False).with_(
        old=(first,), side=(Layer(first.weight[::-1], first.bias),), mixer=(mixed, last), **more
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_right_and_the_same_bits_for_any_batch(isa: str, precision: str, rng: np.random.Generator) -> None:
    h = of_blocks(rng)
    x = rng.standard_normal((131, 100), dtype=np.float32)
    want = ref.transform(x, x, h)
    with using_isa(isa):
        whole = run(h, x, precision, 1)
        error = np.abs(whole - want).max() / np.sqrt((want**2).mean())
        assert error < (2e-6 if precision == "fp32" else 4e-2)
        for threads in (2, 5):
            np.testing.assert_array_equal(run(h, x, precision, threads), whole)
        for start, count in ((0, 1), (3, 2), (9, 3), (11, 5), (31, 13), (40, 15), (9, 64), (130, 1)):
            part = slice(start, start + count)
            for threads in (1, 3):
                np.testing.assert_array_equal(run(h, x[part], precision, threads), whole[part])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("n", [1, 3, 40])
def test_what_only_zeros_multiply_is_not_read(isa: str, precision: str, n: int, rng: np.random.Generator) -> None:
    """Infinity times zero is no number: outputs whose weights end before the infinite inputs stay as they are."""
    huge = Layer(np.concatenate([np.ones((96, 4)), np.full((96, 4), 3e38)]), np.zeros(192))
    last = Layer(
        blocks(rng, [(BLOCK, 0, 96), (BLOCK, 96, 192), (BLOCK, 192, 384), (BLOCK, 0, 0)], 384),
        np.ones(4 * BLOCK),
        False,
    )
    side = Layer(np.ones((192, 4)), np.zeros(192))
    h = fct.Transformation.random(4, 4, 4 * BLOCK, inner=8, side_info=False)
    h = h.with_(old=(huge,), side=(side,), mixer=(last,))
    with using_isa(isa):
        first, infinite, third, nothing = np.split(run(h, np.full((n, 4), 10, np.float32), precision, 1), 4, axis=1)
    assert np.isfinite(first).all()
    assert not np.isfinite(infinite).any()
    assert np.isfinite(third).all()
    assert (nothing == 1).all()


SMALL = {"inner": 512, "branch": 128, "blocks": 1, "skip": True}


@pytest.mark.parametrize("how, times", [({"inner": 512}, (1.8, 1.11)), (SMALL, (3.9, 2.07))])
def test_a_composed_h_costs_about_what_the_two_do(how: dict[str, Any], times: tuple[float, float]) -> None:
    """In weights that are read, by chunks of 16 inputs and groups of 128 outputs: KERNELS.md's figures."""
    middle = fct.EmbeddingSpace("v2", 128)
    first = Transformation.random(128, 64, 128, seed=1, **how).with_(new_space=middle)
    second = Transformation.random(128, 64, 128, seed=2, **how).with_(old_space=middle)
    composed = Transformation.compose(first, second)
    read = sum(_read(layer.weight) for _, layer in composed.layers())
    in_turn = sum(layer.weight.size for h in (first, second) for _, layer in h.layers())
    whole = sum(layer.weight.size for _, layer in composed.layers())
    assert (round(whole / in_turn, 1), round(read / in_turn, 2)) == times


def _read(weight: Any) -> int:
    total = 0
    for row in range(0, len(weight), BLOCK):
        used = np.flatnonzero(weight[row : row + BLOCK].any(axis=0)) // 16
        total += min(BLOCK, len(weight) - row) * 16 * int(used[-1] - used[0] + 1) if used.size else 0
    return total
