"""The artifact: one file that is whole or refused, copies that carry no caches, shapes that fit together."""

from __future__ import annotations

import gc
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import fct
from fct import ref
from fct.artifact.transformation import Layer, PrecisionEffect, Tolerance
from fct.errors import ArtifactError
from fct.ops.numerics.rounding import SIGMAS, deviation


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


def small_h(**changes: Any) -> fct.Transformation:
    h = fct.Transformation.random(6, 4, 5, inner=9, normalise=True, branch=3, blocks=1, skip=True)
    return h.with_(length=0.97, **changes)


def test_a_skip_and_a_length_come_back_from_the_file(tmp_path: Path) -> None:
    h = small_h(calibration={"skip": np.stack([-np.ones(10), np.ones(10)])})
    back = fct.Transformation.load(h.save(tmp_path / "h.safetensors"))
    assert back.fingerprint == h.fingerprint
    assert back.length == 0.97
    assert h.skip is not None
    assert back.skip is not None
    np.testing.assert_array_equal(back.skip.weight, h.skip.weight)
    np.testing.assert_array_equal(back.calibration["skip"], h.calibration["skip"])
    assert [name for name, _ in back.layers()] == ["old.0", "side.0", "mixer.0", "mixer.1", "skip"]
    assert h.flop_per_row == 2 * (6 * 3 + 4 * 3 + 6 * 9 + 9 * 5 + 10 * 5)


def test_skip_and_length_change_the_fingerprint() -> None:
    h = small_h()
    assert h.skip is not None
    others = [h.with_(length=0.98), h.with_(skip=None), h.with_(skip=Layer(h.skip.weight, h.skip.bias + 1, False))]
    assert len({h.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_the_reference_adds_the_skip_before_it_normalises(rng: np.random.Generator) -> None:
    h = small_h()
    old, side = rng.standard_normal((7, 6)), rng.standard_normal((7, 4))
    bare = ref.transform(old, side, h.with_(skip=None, normalise=False, length=1.0))
    assert h.skip is not None
    added = bare + np.concatenate([old, side], axis=1) @ h.skip.weight.astype(np.float64).T + h.skip.bias
    want = 0.97 * added / np.linalg.norm(added, axis=1, keepdims=True)
    np.testing.assert_allclose(ref.transform(old, side, h), want, rtol=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("side_info", [True, False])
def test_torch_agrees_on_small_shapes(rng: np.random.Generator, precision: str, side_info: bool) -> None:
    d_side = 24 if side_info else 40
    h = fct.Transformation.random(
        40, d_side, 16, inner=64, normalise=True, side_info=side_info, branch=16, blocks=1, skip=True
    )
    h = h.with_(length=0.9)
    old = rng.standard_normal((33, 40), dtype=np.float32)
    side = rng.standard_normal((33, 24), dtype=np.float32) if side_info else None
    got = fct.transform_batch(old, side, h, backend="torch", precision=precision)
    want = ref.transform(old, side, h)
    assert deviation(got, want, old, old if side is None else side, h, precision, "torch") <= SIGMAS
    without = ref.transform(old, side, h.with_(skip=None))
    assert deviation(without, want, old, old if side is None else side, h, precision, "torch") > SIGMAS


# What version 0.1 wrote for this h. A running backfill knows its h by the fingerprint.
FINGERPRINT_OF_0_1 = "b13d039cf28a5e493ba58d870fd03c6a017f9ad8eee4697956f0bd853a8e44b9"


def test_files_without_new_fields_are_what_they_were(tmp_path: Path) -> None:
    h = fct.Transformation.random(6, 4, 5, inner=9, normalise=True)
    assert h.fingerprint == FINGERPRINT_OF_0_1
    assert header_of(h.save(tmp_path / "h.safetensors"))["version"] == 1
    assert header_of(small_h().save(tmp_path / "s.safetensors"))["version"] == 2
    assert header_of(h.with_(length=0.9).save(tmp_path / "l.safetensors"))["version"] == 2


def header_of(file: Path) -> Any:
    with safe_open(str(file), framework="numpy") as opened:
        return json.loads(opened.metadata()["fct"])


@pytest.mark.parametrize("version", [0, 3, "2", None, 1.5, True])
def test_a_version_unknown_here_is_refused_by_name(h: fct.Transformation, tmp_path: Path, version: Any) -> None:
    header = header_of(h.save(tmp_path / "h.safetensors")) | {"version": version}
    with safe_open(str(tmp_path / "h.safetensors"), framework="numpy") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, str(tmp_path / "other.safetensors"), metadata={"fct": json.dumps(header)})
    with pytest.raises(ArtifactError, match=f"expected fct-transformation version 1 to 2, .* version {version}"):
        fct.Transformation.load(tmp_path / "other.safetensors")


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
        ({"calibration": {"skip": np.zeros((2, 10))}}, r"calibration\['skip'\]: expected the name of a layer"),
        (
            {"skip": Layer(np.zeros((5, 6)), np.zeros(5), False)},
            r"skip: expected a weight of shape \(5, 10\), .*5, 6\)",
        ),
        ({"skip": Layer(np.zeros((5, 10)), np.zeros(5))}, "skip: expected a linear layer, got one with a ReLU"),
        ({"length": 0.9, "normalise": False}, "length: expected 1.0 for outputs that are not normalised, got 0.9"),
        ({"length": 0.0}, "length: expected a positive number, got 0.0"),
        ({"length": float("nan")}, "length: expected a positive number, got nan"),
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
    with pytest.raises(ValueError, match="inner: expected a whole number from 1 to 1048576, got 0"):
        fct.Transformation.random(2, 2, 2, inner=0)
