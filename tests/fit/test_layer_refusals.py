"""Models, items and functions of the user's that fail while side-information is read from a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fct

ITEMS = np.random.default_rng(0).random((40, 1, 8, 8), dtype=np.float32)


class Layer(nn.Module):
    """Answers what it was made with."""

    def __init__(self, answer: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: torch.Tensor) -> Any:
        return self.answer(x)


def raises(*_: object) -> Any:
    raise KeyError("weights")


def network(answer: Callable[[torch.Tensor], Any]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), Layer(answer))


def side_of(model: object, **how: Any) -> Any:
    given: dict[str, Any] = {"items": ITEMS, "layer": "1", "dim": 4, "batch_size": 32, "progress": False, **how}
    return fct.side_info_from(model, **given)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"batch": 7}, "batch: expected a function or None, got int"),
        ({"pool": "mean"}, "pool: expected a function or None, got str"),
        ({"batch": raises}, "batch: expected a function that makes .*, got KeyError: 'weights'"),
        ({"pool": raises}, "pool: expected a function of the layer's output and the model's input, got KeyError: 'wei"),
        ({"pool": lambda out, x: None}, r"pool: expected an \(n, f\) tensor, got NoneType"),
        ({"pool": lambda out, x: out.flatten()}, r"pool: expected an \(n, f\) tensor, got \(4608,\)"),
        ({"pool": lambda out, x: out.flatten(1).numpy()}, r"pool: expected an \(n, f\) tensor, got ndarray"),
        ({"pool": lambda out, x: torch.ones(len(out), len(out))}, "layer: expected as many features .*, got 32 and 8;"),
        ({"pool": lambda out, x: out.flatten(1)[1:]}, "items: expected 40 rows from the layer, got 38"),
        ({"items": 5}, "items: expected an array, a tensor or a sequence, got int; list"),
        ({"items": None}, "items: expected an array, a tensor or a sequence, got NoneType"),
        ({"items": (x for x in ITEMS)}, r"items: .*sequence, got generator; list\(...\) it"),
        ({"items": {1, 2}}, "items: expected an array, a tensor or a sequence, got set"),
        ({"items": {"x": ITEMS}}, "items: expected an array, a tensor or a sequence of items, got dict"),
        ({"items": "a text"}, "items: expected an array, a tensor or a sequence of items, got str"),
        (
            {"items": ITEMS.astype(object)},
            r"items: expected \(n, ...\) numbers, or a list with batch=.*, got object of",
        ),
        ({"items": np.ones(())}, r"items: expected \(n, ...\) numbers, .* of shape \(\)"),
        (
            {"items": ITEMS.astype(np.float64)},
            r"items: expected what the model takes \(or batch= .*\), got RuntimeError: ",
        ),
        ({"items": ITEMS[:, :, 0]}, "items: expected what the model takes .*, got RuntimeError: "),
    ],
)
def test_what_a_layer_cannot_be_read_from(how: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{says}"):
        side_of(network(lambda x: x), **how)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (raises, "items: expected what the model takes .*, got KeyError: 'weights'"),
        (lambda x: (), "layer: expected .* from '1', got tuple; name pool="),
        (lambda x: {}, "layer: expected .* from '1', got NoneType; name pool="),
        (lambda x: None, "layer: expected .* from '1', got NoneType; name pool="),
        (lambda x: x * torch.nan, "layer: expected finite outputs, got NaN or infinity from '1'"),
    ],
)
def test_what_a_layer_says_that_cannot_be_stored(answer: Callable[[torch.Tensor], Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        side_of(network(answer))


@pytest.mark.parametrize("answer", [lambda x: (x, x), lambda x: [x], lambda x: {"maps": x}])
def test_a_layer_of_several_answers_gives_the_first(answer: Callable[[torch.Tensor], Any]) -> None:
    assert side_of(network(answer)).encode(ITEMS, progress=False).shape == (40, 4)
