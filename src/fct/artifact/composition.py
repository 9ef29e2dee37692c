"""Two transformations as one: v1 -> v2 and v2 -> v3 become v1 -> v3, with nothing fitted anew.

What a ReLU would cut off goes through it as two halves, since x = relu(x) - relu(-x). Everything else is products of
matrices, in float64: the composed h gives what the two give in turn, to float32's rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fct.artifact.layers import Layer, Network
from fct.errors import SpaceMismatchError
from fct.spaces import EmbeddingSpace
from fct.types import JsonDict

__all__ = ["composed_fields"]

Floats = npt.NDArray[np.float64]


class Part(Network, Protocol):
    """What is read of a transformation here; :class:`fct.Transformation` is one."""

    @property
    def old_space(self) -> EmbeddingSpace: ...
    @property
    def new_space(self) -> EmbeddingSpace: ...
    @property
    def info(self) -> Mapping[str, object]: ...
    @property
    def side_model(self) -> str | None: ...
    @property
    def d_old(self) -> int: ...
    @property
    def d_side(self) -> int: ...


@dataclass(frozen=True, eq=False, slots=True)
class _Signal:
    """A vector that is ``weight @ state + bias``; positive: no value of it can be below 0."""

    weight: Floats
    bias: Floats
    positive: bool = False

    def then(self, layer: Layer) -> _Signal:
        weight = layer.weight.astype(np.float64)
        return _Signal(weight @ self.weight, weight @ self.bias + layer.bias.astype(np.float64))

    def plus(self, other: _Signal) -> _Signal:
        return _Signal(self.weight + other.weight, self.bias + other.bias)


class _Chain:
    """Layers that grow while signals pass through them together, each by a ReLU layer of its own or as it is."""

    def __init__(self, width: int) -> None:
        self.layers: list[Layer] = []
        self.width = width

    def input(self, begin: int, end: int) -> _Signal:
        return _Signal(np.eye(self.width)[begin:end], np.zeros(end - begin))

    def step(self, signals: Mapping[str, _Signal], by: Mapping[str, Layer]) -> dict[str, _Signal]:
        """One layer with a ReLU: what ``by`` names goes through that layer, everything else arrives as it was."""
        rows, kinds = [], {}
        for name, signal in signals.items():
            if name in by:
                rows.append(signal.then(by[name]))
            else:
                rows.append(signal)
                if not signal.positive:
                    rows.append(_Signal(-signal.weight, -signal.bias))
            kinds[name] = name in by or signal.positive
        made = Layer(np.concatenate([r.weight for r in rows]), np.concatenate([r.bias for r in rows]), relu=True)
        self.layers.append(made)
        self.width = made.d_out
        found, at = {}, 0
        identity = np.eye(self.width)
        for name, signal in signals.items():
            size = len(by[name].bias) if name in by else len(signal.bias)
            weight = identity[at : at + size]
            if not kinds[name]:
                weight = weight - identity[at + size : at + 2 * size]
            at += size if kinds[name] else 2 * size
            found[name] = _Signal(weight, np.zeros(size), kinds[name])
        return found

    def run(self, signals: Mapping[str, _Signal], chains: Mapping[str, tuple[Layer, ...]]) -> dict[str, _Signal]:
        """The signals after whole chains, side by side; one without a chain, or with a shorter one, waits."""
        left = {name: list(chain) for name, chain in chains.items()}
        now = dict(signals)
        while any(left.values()):
            for name, chain in left.items():
                while chain and not chain[0].relu:  # no ReLU: a product of matrices, and no layer of its own
                    now[name] = now[name].then(chain.pop(0))
            by = {name: chain.pop(0) for name, chain in left.items() if chain}
            if by:
                now = self.step(now, by)
        return now


def composed_fields(first: Part, second: Part) -> JsonDict:
    """What :class:`fct.Transformation` takes for ``second`` after ``first``.

    Raises:
        SpaceMismatchError: second does not read what first gives. ValueError: first brings its output to unit length,
            and that cannot be undone or put off.
    """
    _check(first, second)
    sides = [h.side_model for h in (first, second) if h.uses_side_info]
    shared = first.uses_side_info and first.side_model == second.side_model
    if shared and first.d_side != second.d_side:
        raise ValueError(
            f"second: expected {first.d_side} columns of side-information from {first.side_model!r}, as first reads, "
            f"got {second.d_side}"
        )
    width = first.d_side if shared else sum(h.d_side for h in (first, second) if h.uses_side_info)
    begins = {1: 0, 2: first.d_side if first.uses_side_info and not shared else 0}
    old, old_layers = _old_branch(first, second)
    side, side_layers = _side_branch(first, second, width, begins)
    mixer = _Chain(old_layers[-1].d_out + side_layers[-1].d_out)
    out = _mixed(first, second, _joined(old, side), mixer)
    return {
        "old": old_layers,
        "side": side_layers,
        "mixer": (*mixer.layers, Layer(out.weight, out.bias, relu=False)),
        "skip": _skip(first, second, width, begins),
        "side_model": None if not sides else sides[0] if shared else " + ".join(str(s) for s in sides),
        "old_space": first.old_space,
        "new_space": second.new_space,
        "normalise": second.normalise,
        "length": second.length,
        "info": {"composed": [{"fingerprint": h.fingerprint, "info": dict(h.info)} for h in (first, second)]},
    }


def _check(first: Part, second: Part) -> None:
    if first.new_space != second.old_space:
        raise SpaceMismatchError(
            f"second: expected a transformation of what first gives, {first.new_space}, got one of {second.old_space}"
        )
    if not first.normalise:
        return
    layers = [*second.old, *second.side, *second.mixer, *([] if second.skip is None else [second.skip])]
    forgets = second.normalise and not second.uses_side_info and not any(np.any(layer.bias) for layer in layers)
    if not forgets:
        raise ValueError(
            "first: expected a transformation that does not normalise its output, or a second one to which length "
            "means nothing (normalised, no biases, no side-information), got one that normalises: no layers of h can "
            "divide by a length. Map with the two in turn, or fit v1 -> v3 on pairs of its own"
        )


def _old_branch(first: Part, second: Part) -> tuple[dict[str, _Signal], tuple[Layer, ...]]:
    """What the mixer needs of the old embedding alone."""
    chain = _Chain(first.d_old)
    whole = chain.input(0, first.d_old)
    signals = {} if first.skip is None else {"old": whole}
    signals["a"], chains = whole, {"a": first.old}  # beside the other branch's: what reads both reads one run of inputs
    if not first.uses_side_info and second.uses_side_info:
        signals["b"], chains["b"] = whole, first.side
    return _settled(chain, chain.run(signals, chains))


def _side_branch(
    first: Part, second: Part, width: int, begins: Mapping[int, int]
) -> tuple[dict[str, _Signal], tuple[Layer, ...]]:
    """What the mixer needs of the side-information alone; of the old embedding again where there is none."""
    chain = _Chain(width or first.d_old)
    signals: dict[str, _Signal] = {}
    chains: dict[str, tuple[Layer, ...]] = {}
    if first.uses_side_info or not second.uses_side_info:
        signals["b"] = chain.input(begins[1], begins[1] + first.d_side)
        chains["b"] = first.side
    if first.uses_side_info and first.skip is not None:
        signals["side"] = signals["b"]
    if second.uses_side_info:
        signals["c"] = chain.input(begins[2], begins[2] + second.d_side)
        chains["c"] = second.side
    return _settled(chain, chain.run(signals, chains))


def _settled(chain: _Chain, signals: dict[str, _Signal]) -> tuple[dict[str, _Signal], tuple[Layer, ...]]:
    """A branch is one layer at least: the signals pass one where all of them were products of matrices."""
    return (signals if chain.layers else chain.step(signals, {})), tuple(chain.layers)


def _joined(old: dict[str, _Signal], side: dict[str, _Signal]) -> dict[str, _Signal]:
    """The two branches' signals over both outputs side by side, as the mixer reads them."""
    widths = [next(iter(part.values())).weight.shape[1] for part in (old, side)]
    found = {}
    for part, before, after in ((old, 0, widths[1]), (side, widths[0], 0)):
        for name, s in part.items():
            found[name] = _Signal(np.pad(s.weight, ((0, 0), (before, after))), s.bias, s.positive)
    return found


def _beside(a: _Signal, b: _Signal) -> _Signal:
    return _Signal(np.concatenate([a.weight, b.weight]), np.concatenate([a.bias, b.bias]), a.positive and b.positive)


def _mixed(first: Part, second: Part, signals: dict[str, _Signal], chain: _Chain) -> _Signal:
    """Both mixers, and the second's branches between them: what h gives before its skip and its normalising."""
    signals["ab"] = _beside(signals.pop("a"), signals.pop("b"))
    signals = chain.run(signals, {"ab": first.mixer})
    middle = signals.pop("ab")
    if first.skip is not None:
        read = signals.pop("old")
        middle = middle.plus((_beside(read, signals.pop("side")) if "side" in signals else read).then(first.skip))
    signals["a"] = middle
    chains = {"a": second.old}
    if not second.uses_side_info:
        signals["c"], chains["c"] = middle, second.side
    if second.skip is not None:
        signals["middle"] = middle
    signals = chain.run(signals, chains)
    signals["ac"] = _beside(signals.pop("a"), signals.pop("c"))
    signals = chain.run(signals, {"ac": second.mixer})
    out = signals["ac"]
    if second.skip is not None:
        weight = second.skip.weight[:, : second.d_old]
        out = out.plus(signals["middle"].then(Layer(weight, second.skip.bias, relu=False)))
    return out


def _skip(first: Part, second: Part, width: int, begins: Mapping[int, int]) -> Layer | None:
    """What the second's skip reads of its side-information goes straight to the output."""
    if second.skip is None or not second.uses_side_info:
        return None
    weight = np.zeros((len(second.skip.bias), first.d_old + width))
    begin = first.d_old + begins[2]
    weight[:, begin : begin + second.d_side] = second.skip.weight[:, second.d_old :]
    return Layer(weight, np.zeros(len(weight)), relu=False)
