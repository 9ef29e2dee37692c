"""Activation ranges for int8, the measured effect of each precision on retrieval, and what ``auto`` makes of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct import ref
from fct.artifact.transformation import Layer, PrecisionEffect, Tolerance
from fct.errors import BackendError
from fct.fit import precision_choice as module
from fct.fit.precision_choice import calibrate, measure_precisions
from fct.ops.registry import pick_transform


@pytest.fixture
def h() -> fct.Transformation:
    return fct.Transformation.random(12, 6, 10, inner=48)


@pytest.fixture
def inputs(rng: np.random.Generator) -> tuple[Any, Any]:
    return rng.standard_normal((400, 12), dtype=np.float32), rng.standard_normal((400, 6), dtype=np.float32)


def layer_inputs(h: fct.Transformation, old: Any, side: Any) -> dict[str, Any]:
    """What each layer is given, in float64."""
    found: dict[str, Any] = {}

    def chain(branch: str, x: Any) -> Any:
        for i, layer in enumerate(getattr(h, branch)):
            found[f"{branch}.{i}"] = x
            x = x @ layer.weight.T.astype(np.float64) + layer.bias
            x = np.maximum(x, 0) if layer.relu else x
        return x

    ends = [chain("old", old.astype(np.float64)), chain("side", side.astype(np.float64))]
    chain("mixer", np.concatenate(ends, axis=1))
    return found


@pytest.mark.parametrize("chunk", [1024, 96])
def test_ranges_are_each_channels_lowest_and_highest(
    h: fct.Transformation, inputs: tuple[Any, Any], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    found = calibrate(h, *inputs).calibration
    want = layer_inputs(h, *inputs)
    assert set(found) == set(want)
    for name, x in want.items():
        np.testing.assert_allclose(found[name], [x.min(axis=0), x.max(axis=0)], rtol=1e-4, atol=1e-5)


def test_many_rows_are_sampled_evenly(
    h: fct.Transformation, inputs: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_ROWS", 100)
    monkeypatch.setattr(module, "_CHUNK", 7)
    sampled = calibrate(h, *inputs).calibration
    every_fourth = calibrate(h, *(x[::4] for x in inputs)).calibration
    for name, ranges in every_fourth.items():
        np.testing.assert_allclose(sampled[name], ranges, rtol=1e-5, atol=1e-6)


def test_without_side_information_and_from_narrow_rows(inputs: tuple[Any, Any]) -> None:
    h = fct.Transformation.random(12, 12, 10, inner=16, side_info=False)
    old = inputs[0].astype(np.float16)
    found = calibrate(h, old, None).calibration
    np.testing.assert_array_equal(found["old.0"], found["side.0"])
    np.testing.assert_allclose(found["old.0"], [old.min(axis=0), old.max(axis=0)])


def test_new_ranges_drop_what_was_measured_on_the_old(h: fct.Transformation, inputs: tuple[Any, Any]) -> None:
    effect = PrecisionEffect(1.0, 0.0, 0.0)
    measured = h.with_(precisions={"bf16": effect, "int8": effect})
    assert set(calibrate(measured, *inputs).precisions) == {"bf16"}


def test_calibrated_int8_is_near_the_reference(h: fct.Transformation, inputs: tuple[Any, Any]) -> None:
    with pytest.raises(BackendError, match="activation ranges"):
        fct.transform_batch(*inputs, h, precision="int8")
    want = ref.transform(*inputs, h)
    right = fct.transform_batch(*inputs, calibrate(h, *inputs), precision="int8")
    narrow = fct.transform_batch(*inputs, calibrate(h, *(x / 10 for x in inputs)), precision="int8")
    error, cut = (np.sqrt(np.mean((got - want) ** 2) / want.var()) for got in (right, narrow))
    assert error < 0.05
    assert cut > 4 * error, "ranges that are too narrow cut the activations, which must show"


def retrieval(h: fct.Transformation, old: Any, side: Any, new: Any, precision: str) -> tuple[Any, Any]:
    gallery = fct.transform_batch(old, side, h, precision=precision)
    return ref.topk(new, gallery, 10, "l2")[1], gallery


@pytest.mark.parametrize("labelled", [False, True])
def test_effects_are_what_the_reference_finds(
    h: fct.Transformation, inputs: tuple[Any, Any], labelled: bool, rng: np.random.Generator
) -> None:
    h = calibrate(h, *inputs)
    new = (ref.transform(*inputs, h) + rng.standard_normal((400, 10))).astype(np.float32)
    labels = rng.integers(0, 8, 400) if labelled else None
    measured = measure_precisions(h, *inputs, new, labels)
    assert set(measured.precisions) == {"bf16", "int8"}
    base, exact = retrieval(h, *inputs, new, "fp32")
    codes = np.arange(400) if labels is None else labels
    before = ref.evaluate(new, exact, codes, codes, "l2", labelled)
    for name, effect in measured.precisions.items():
        found, gallery = retrieval(h, *inputs, new, name)
        kept = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(base.tolist(), found.tolist(), strict=True)])
        after = ref.evaluate(new, gallery, codes, codes, "l2", labelled)
        assert effect.top10_kept == pytest.approx(kept, abs=1e-3)
        assert effect.map_change == pytest.approx(np.nanmean(after[1]) - np.nanmean(before[1]), abs=1e-4)
        assert effect.cmc1_change == pytest.approx(np.mean(after[0] == 0) - np.mean(before[0] == 0), abs=3e-3)
    assert measured.precisions["bf16"].top10_kept > 0.95


def test_a_precision_that_hurts_shows(h: fct.Transformation, inputs: tuple[Any, Any]) -> None:
    ruined = calibrate(h, *(x / 1000 for x in inputs))
    new = ref.transform(*inputs, h).astype(np.float32)
    effect = measure_precisions(ruined, *inputs, new, precisions=["int8"]).precisions["int8"]
    assert effect.top10_kept < 0.9
    assert effect.map_change < -0.05
    assert not Tolerance().allows(effect)


def test_what_can_not_run_is_left_out_and_what_was_there_stays(h: fct.Transformation, inputs: tuple[Any, Any]) -> None:
    new = ref.transform(*inputs, h).astype(np.float32)
    measured = measure_precisions(h, *inputs, new)
    assert set(measured.precisions) == {"bf16"}, "int8 is not calibrated"
    effect = PrecisionEffect(0.5, -0.5, 0.0)
    again = measure_precisions(h.with_(precisions={"int8": effect}), *inputs, new, precisions=["bf16"])
    assert again.precisions["int8"] == effect


def test_one_row_and_labels_without_a_pair(h: fct.Transformation, inputs: tuple[Any, Any]) -> None:
    old, side = (x[:1] for x in inputs)
    new = ref.transform(old, side, h).astype(np.float32)
    assert measure_precisions(h, old, side, new, precisions=["bf16"]).precisions["bf16"].top10_kept == 1.0
    alone = measure_precisions(h, inputs[0][:20], inputs[1][:20], np.ones((20, 10), np.float32), np.arange(20))
    assert alone.precisions["bf16"].map_change == 0.0, "no query has a match: nothing can change"


@pytest.mark.parametrize(
    ("top10", "drop", "allowed"),
    [(0.99, -0.001, True), (0.9899, 0.0, False), (1.0, -0.0011, False), (1.0, 0.2, True)],
)
def test_auto_takes_the_fastest_inside_the_tolerance(
    h: fct.Transformation, inputs: tuple[Any, Any], top10: float, drop: float, allowed: bool, tmp_path: Path
) -> None:
    fastest = pick_transform(calibrated := calibrate(h, *inputs), "auto", "cpu")[0].fastest_first("cpu")[0]
    assert pick_transform(calibrated, "auto", "cpu")[1] == "fp32", "nobody measured"
    measured = calibrated.with_(precisions={p: PrecisionEffect(top10, drop, 0.0) for p in ("bf16", "int8")})
    loaded = fct.Transformation.load(measured.save(tmp_path / "h.safetensors"))
    for candidate in (measured, loaded):
        assert pick_transform(candidate, "auto", "cpu")[1] == (fastest if allowed else "fp32")
    got = fct.transform_batch(*inputs, loaded)
    np.testing.assert_array_equal(got, fct.transform_batch(*inputs, loaded, precision=fastest if allowed else "fp32"))


def test_a_wider_tolerance_allows_more(h: fct.Transformation) -> None:
    effect = PrecisionEffect(0.9, -0.01, 0.0)
    h = h.with_(precisions={"bf16": effect})
    assert not h.allows("bf16")
    assert h.with_(tolerance=replace(h.tolerance, map_drop=0.02, top10_kept=0.85)).allows("bf16")
    assert h.allows("fp32")
    assert not h.allows("int8"), "not measured"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, a, b: calibrate(h, a[:0], b[:0]), r"old: expected at least one row to calibrate on, got \(0, 12\)"),
        (lambda h, a, b: calibrate(h, a, None), r"side_info: expected \(400, 6\)"),
        (lambda h, a, b: measure_precisions(h, a, b, a[:, :10], precisions=["fp7"]), "precisions: expected some of"),
        (lambda h, a, b: measure_precisions(h, a, b, a), r"queries_new: expected \(400, 10\) to match"),
        (lambda h, a, b: measure_precisions(h, a, b, a[:9, :10]), r"queries_new: expected \(400, 10\)"),
        (lambda h, a, b: measure_precisions(h, a[:0], b[:0], a[:0, :10]), "queries_new: expected at least one row"),
        (lambda h, a, b: measure_precisions(h, a, b, a[:, :10], np.arange(3)), "labels: expected"),
    ],
)
def test_bad_input(h: fct.Transformation, inputs: tuple[Any, Any], call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(h, *inputs)


@pytest.mark.parametrize("factor", [1e-4, 300.0])
def test_a_skip_reads_side_information_in_quite_other_units(
    inputs: tuple[Any, Any], factor: float, rng: np.random.Generator
) -> None:
    old, side = inputs[0], inputs[1] * np.float32(factor)
    h = fct.Transformation.random(12, 6, 10, inner=48)
    scaled = Layer(h.side[0].weight / factor, h.side[0].bias, True)
    weight = np.concatenate([rng.standard_normal((10, 12)), rng.standard_normal((10, 6)) / factor], axis=1)
    h = h.with_(side=(scaled, *h.side[1:]), skip=Layer(weight, np.zeros(10), relu=False))
    want = ref.transform(old, side, h)
    got = fct.transform_batch(old, side, calibrate(h, old, side), precision="int8")
    assert np.sqrt(np.mean((got - want) ** 2) / want.var()) < 0.05
