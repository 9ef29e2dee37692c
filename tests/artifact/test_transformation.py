"""The artifact: one file that is whole or refused, copies that carry no caches, shapes that fit together."""

from __future__ import annotations

import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct.artifact.transformation import Layer, PrecisionEffect, Tolerance
from fct.errors import ArtifactError


@pytest.fixture
def h() -> fct.Transformation:
    plain = fct.Transformation.random(6, 4, 5, inner=9, normalise=True)
    ranges = {name: np.stack([-np.ones(layer.d_in), np.ones(layer.d_in)]) for name, layer in plain.layers()}
    effects = {"bf16": PrecisionEffect(0.999, 0.0, 0.0), "int8": PrecisionEffect(0.97, -0.0001, 0.0)}
    return plain.with_(calibration=ranges, precisions=effects, info={"pairs": 3, "note": "ü"})


def test_saved_and_loaded_is_the_same(h: fct.Transformation, tmp_path: Path) -> None:
    back = fct.Transformation.load(h.save(tmp_path / "h.safetensors"))
    assert back.fingerprint == h.fingerprint
    assert (back.old_space, back.new_space, back.side_model, back.normalise) == (
        h.old_space,
        h.new_space,
        h.side_model,
        h.normalise,
    )
    assert back.info == h.info
    assert back.precisions == h.precisions
    for name, ranges in h.calibration.items():
        np.testing.assert_array_equal(back.calibration[name], ranges)
    for (_, a), (_, b) in zip(h.layers(), back.layers(), strict=True):
        np.testing.assert_array_equal(a.weight, b.weight)
        np.testing.assert_array_equal(a.bias, b.bias)


def test_fingerprint_follows_the_meaning_alone(h: fct.Transformation) -> None:
    assert h.with_(info={}, precisions={}, calibration={}).fingerprint == h.fingerprint
    weight = h.old[0].weight.copy()
    weight[0, 0] = np.nextafter(weight[0, 0], 9)
    changed = h.with_(old=(Layer(weight, h.old[0].bias), *h.old[1:]))
    assert changed.fingerprint != h.fingerprint
    assert h.with_(normalise=False).fingerprint != h.fingerprint
    assert h.with_(new_space=fct.EmbeddingSpace("other", 5)).fingerprint != h.fingerprint


def test_auto_takes_what_the_tolerance_allows(h: fct.Transformation) -> None:
    assert h.allows("fp32")
    assert h.allows("bf16")
    assert not h.allows("int8")  # keeps 97 % of the top-10, 99 % are wanted
    assert h.with_(tolerance=Tolerance(top10_kept=0.95)).allows("int8")
    assert not h.with_(precisions={}).allows("bf16")  # nobody measured


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_files_are_refused(h: fct.Transformation, tmp_path: Path, keep: int) -> None:
    file = h.save(tmp_path / "h.safetensors")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"transformation: expected a whole \.safetensors file"):
        fct.Transformation.load(file)


def test_changed_weights_are_refused(h: fct.Transformation, tmp_path: Path) -> None:
    file = h.save(tmp_path / "h.safetensors")
    data = bytearray(file.read_bytes())
    at = data.find(h.mixer[0].weight.tobytes())
    data[at] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="do not match its fingerprint"):
        fct.Transformation.load(file)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3, np.float32)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(ArtifactError, match="not one of fct's"):
        fct.Transformation.load(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_text("a text")
    with pytest.raises(ArtifactError, match="expected a whole"):
        fct.Transformation.load(tmp_path / "y.safetensors")
    with pytest.raises(FileNotFoundError, match="found none at"):
        fct.Transformation.load(tmp_path / "none.safetensors")


def test_packed_weights_neither_travel_nor_outlive_h(rng: np.random.Generator) -> None:
    h = fct.Transformation.random(6, 4, 5, inner=9)
    old, side = rng.standard_normal((3, 6), dtype=np.float32), rng.standard_normal((3, 4), dtype=np.float32)
    want = fct.transform_batch(old, side, h)
    size = len(pickle.dumps(h))
    assert size < 4 * h.parameters + 4096
    copy = pickle.loads(pickle.dumps(h))
    np.testing.assert_array_equal(fct.transform_batch(old, side, copy), want)
    watch = weakref.ref(h)
    del h
    gc.collect()
    assert watch() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old": ()}, "old: expected at least one layer, got none"),
        ({"old_space": fct.EmbeddingSpace("m", 7)}, "old_space: expected dim 6 to match the layers"),
        ({"new_space": fct.EmbeddingSpace("m", 7)}, "new_space: expected dim 5 to match the layers"),
        ({"side_model": None}, "side: expected 6 inputs, since the old embedding takes"),
        ({"calibration": {"old.9": np.zeros((2, 6))}}, r"calibration\['old.9'\]: expected the name of a layer"),
        ({"calibration": {"old.0": np.zeros((2, 5))}}, r"calibration\['old.0'\]: expected \(2, 6\)"),
    ],
)
def test_parts_that_do_not_fit_are_named(h: fct.Transformation, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        h.with_(**change)


def test_layers_are_checked() -> None:
    with pytest.raises(ValueError, match=r"bias: expected \(3,\) to match the weight, got shape \(4,\)"):
        Layer(np.zeros((3, 2)), np.zeros(4))
    with pytest.raises(ValueError, match="expected finite values, got NaN"):
        Layer(np.full((3, 2), np.nan), np.zeros(3))
    with pytest.raises(ValueError, match="inner: expected a whole number of at least 1, got 0"):
        fct.Transformation.random(2, 2, 2, inner=0)
