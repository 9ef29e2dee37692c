"""The layers of a transformation that was never trained, for benchmarks and tests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from fct.artifact.layers import Layer
from fct.checks import check_flag, check_seed, check_whole
from fct.types import JsonDict

__all__ = ["untrained_fields"]

_WIDEST, _MOST_BLOCKS = 1 << 20, 64
_MOST_WEIGHTS = 1 << 31  # 8 GiB


def untrained_fields(
    d_old: int,
    d_side: int,
    d_new: int,
    *,
    inner: int,
    seed: int,
    side_info: bool,
    branch: int | None,
    blocks: int,
    skip: bool,
) -> JsonDict:
    """The branches, mixer and skip of an h of this shape, and what it says of itself; arguments as
    :meth:`fct.Transformation.random` has them."""
    for name, value in (("d_old", d_old), ("d_side", d_side), ("d_new", d_new), ("inner", inner)):
        check_whole(value, name, 1, _WIDEST)
    check_whole(blocks, "blocks", 0, _MOST_BLOCKS)
    d_old, d_side, d_new, inner = (int(value) for value in (d_old, d_side, d_new, inner))
    widths: tuple[tuple[int, ...], ...] = ((2 * d_old, 2 * d_new), (2 * d_side, 2 * d_new))
    if branch is not None:
        widths = ((check_whole(branch, "branch", 1, _WIDEST),),) * 2
    check_seed(seed)
    check_flag(side_info, "side_info")
    check_flag(skip, "skip")
    if not side_info and d_side != d_old:
        raise ValueError(f"d_side: expected {d_old}, the old embedding's width, without side-information, got {d_side}")
    mixed = (widths[0][-1] + widths[1][-1], *blocks * (inner,), d_new)
    plan = [(d_old, *widths[0]), (d_side, *widths[1]), mixed, (d_old + d_side, d_new)]
    weights = sum(a * b for chain in plan for a, b in itertools.pairwise(chain))
    if weights > _MOST_WEIGHTS:
        raise ValueError(
            f"d_old, d_side, d_new, inner, branch, blocks: expected an h of at most {_MOST_WEIGHTS:,} weights, got "
            f"{weights:,}; choose smaller ones"
        )
    rng = np.random.default_rng(seed)
    old, side = (_chain(rng, (d, *w), True) for d, w in zip((d_old, d_side), widths, strict=True))
    mixer = _chain(rng, mixed, False)
    return {
        "old": old,
        "side": side,
        "mixer": mixer,
        "side_model": "random-side" if side_info else None,
        "info": {"untrained": True, "seed": seed},
        "skip": _chain(rng, (d_old + (d_side if side_info else 0), d_new), False)[0] if skip else None,
    }


def _chain(rng: np.random.Generator, widths: Sequence[int], last_relu: bool) -> tuple[Layer, ...]:
    """Random layers between the given widths, under which activations keep about unit variance."""
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        weight = rng.standard_normal((b, a), dtype=np.float32) * np.float32(np.sqrt(2 / a))
        bias = rng.standard_normal(b, dtype=np.float32) * np.float32(0.1)
        layers.append(Layer(weight, bias, last_relu or i + 2 < len(widths)))
    return tuple(layers)
