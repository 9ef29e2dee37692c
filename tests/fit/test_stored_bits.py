"""benchmarks/quality/stored_bits.py: each kind of side-information takes the bytes that the table says it does."""

from __future__ import annotations

import numpy as np

import fct
from benchmarks.quality.stored_bits import cases


def test_each_kind_takes_the_bytes_that_it_says(rng: np.random.Generator) -> None:
    names = [f"{name}_{part}" for name in ("layer", "second") for part in ("train", "test")]
    file = {name: rng.standard_normal((300, 144), dtype=np.float32) for name in names}
    found = {words: (size, train, test) for words, size, train, test in cases(file, "layer", "second")}
    assert found.pop("none") == (0, None, None)
    assert {words: size for words, (size, *_) in found.items()} == {
        "a second model, 16-d float32": 64,
        "a second model, 64-d float32": 256,
        "the layer, 16-d float32": 64,
        "the layer, 64-d int8": 64,
        "the layer, 128-d int4": 64,
        "the layer, 128-d float32": 512,
    }
    for size, train, test in found.values():
        assert train.shape == test.shape
        assert np.asarray(getattr(train, "values", train)).nbytes == 300 * size
    assert isinstance(found["the layer, 128-d int4"][1], fct.PackedInt4)
