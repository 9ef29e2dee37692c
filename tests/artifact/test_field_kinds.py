"""What a transformation, a space, a correction and an untrained h are made of is looked at where they are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct.artifact.transformation import PrecisionEffect
from fct.atomic_files import write_bytes
from fct.checks import check_number, check_positive, check_share
from fct.mixed_gallery import MixedCorrection

H = fct.Transformation.random(4, 3, 5, inner=8)
HUGE = 10**400  # more than a float holds


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("old_space", "old", "old_space: expected an fct.EmbeddingSpace, got str"),
        ("new_space", None, "new_space: expected an fct.EmbeddingSpace, got NoneType"),
        ("calibration", [1], "calibration: expected a mapping, got list"),
        ("precisions", (), "precisions: expected a mapping, got tuple"),
        ("precisions", {"int8": 0.9}, "precisions['int8']: expected a PrecisionEffect, got float"),
        ("precisions", {"int8": PrecisionEffect}, "precisions['int8']: expected a PrecisionEffect, got type"),
        ("info", "none", "info: expected a mapping, got str"),
        ("tolerance", 0.99, "tolerance: expected a Tolerance, got float"),
        ("normalise", 1, "normalise: expected True or False, got 1"),
        ("normalise", "yes", "normalise: expected True or False, got 'yes'"),
        ("side_model", 7, "side_model: expected the id of a model, or None, got 7"),
        ("side_model", b"m", "side_model: expected the id of a model, or None, got b'm'"),
        ("length", HUGE, "length: expected a positive number, got "),
    ],
)
def test_a_field_of_a_transformation(field: str, value: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        H.with_(**{field: value})
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (("shorter", 0.9), "correction.kind: expected one of length, coordinate, got 'shorter'"),
        ((None, 0.9), "correction.kind: expected one of length, coordinate, got None"),
        (("length", 0), "correction.value: expected a positive number, got 0"),
        (("length", -0.5), "correction.value: expected a positive number, got -0.5"),
        (("length", float("nan")), "correction.value: expected a positive number, got nan"),
        (("length", "0.9"), "correction.value: expected a positive number, got '0.9'"),
        (("length", True), "correction.value: expected a positive number, got True"),
        (("length", HUGE), "correction.value: expected a positive number, got "),
        (("coordinate", 1.01), "correction.value: expected a coordinate of at most 1, got 1.01"),
        (("length", 0.9, -1), "correction.rows: expected a whole number of at least 0, got -1"),
        (("length", 0.9, 10.0), "correction.rows: expected a whole number of at least 0, got 10.0"),
        (("length", 0.9, True), "correction.rows: expected a whole number of at least 0, got True"),
        (("length", 0.9, 10, -0.1), "correction.fade: expected a finite number of at least 0, got -0.1"),
        (("length", 0.9, 10, float("inf")), "correction.fade: expected a finite number of at least 0, got inf"),
        (("length", 0.9, 10, HUGE), "correction.fade: expected a finite number of at least 0, got "),
    ],
)
def test_a_field_of_a_correction(fields: tuple[Any, ...], says: str) -> None:
    with pytest.raises(ValueError, match=r"^correction\.") as error:
        MixedCorrection(*fields)
    assert str(error.value).startswith(says)


def test_a_correction_of_numpys_numbers() -> None:
    how = MixedCorrection("length", np.float32(0.5), np.int64(3), np.float64(0.1))  # type: ignore[arg-type]
    assert how.at(3).value == pytest.approx(0.5)


@pytest.mark.parametrize("dim", [0, -1, True, 3.0, "3", None, HUGE])
def test_a_space_of_no_dimension(dim: Any) -> None:
    with pytest.raises(ValueError, match=r"^dim: expected a whole number from 1 to \d+, got "):
        fct.EmbeddingSpace("m", dim)


@pytest.mark.parametrize("value", [None, 3, "text"])
def test_a_space_of_no_mapping(value: Any) -> None:
    with pytest.raises(TypeError, match="space: expected a mapping of model_id, dim, metric and normalised, got "):
        fct.EmbeddingSpace.from_dict(value)


def test_numpys_scalars_are_written_to_an_artifact(tmp_path: Path) -> None:
    space = fct.EmbeddingSpace("m", np.int64(5), normalised=np.bool_(True), mapped_length=np.float32(0.5))  # type: ignore[arg-type]
    h = H.with_(new_space=space, normalise=np.bool_(True))
    h.save(tmp_path / "h.safetensors")
    assert fct.Transformation.load(tmp_path / "h.safetensors").new_space == space
    assert (space.to_dict()["dim"], space.to_dict()["mapped_length"]) == (5, 0.5)


@pytest.mark.parametrize("name", ["d_old", "d_side", "d_new", "inner", "branch", "blocks"])
@pytest.mark.parametrize("value", [HUGE, 1e30, 2**63, 10**9, -1, True, "8", np.nan])
def test_an_untrained_h_of_impossible_sizes(name: str, value: Any) -> None:
    sizes: dict[str, Any] = {"d_old": 3, "d_side": 3, "d_new": 3, "inner": 4, name: value}
    with pytest.raises(ValueError, match=rf"^{name}: expected a whole number from [01] to \d+, got "):
        fct.Transformation.random(**sizes)


def test_an_untrained_h_of_more_weights_than_memory_holds() -> None:
    with pytest.raises(ValueError, match=r"expected an h of at most 2,147,483,648 weights, got [\d,]+; choose smaller"):
        fct.Transformation.random(2**20, 3, 2**20)


@pytest.mark.parametrize("skip", [None, "no", 1, []])
def test_skip_is_no_truth_of_something_else(skip: Any) -> None:
    with pytest.raises(ValueError, match="skip: expected True or False, got "):
        fct.Transformation.random(3, 3, 3, inner=4, skip=skip)


@pytest.mark.parametrize("value", [HUGE, -HUGE])
def test_numbers_that_no_float_holds(value: int) -> None:
    checks: tuple[Any, ...] = (check_positive, check_share, lambda v, name: check_number(v, name, 0))
    for check in checks:
        with pytest.raises(ValueError, match="rate: expected a"):
            check(value, "rate")


@pytest.mark.parametrize("what", ["an artifact", "bytes"])
def test_a_folder_where_a_file_is_to_go(tmp_path: Path, what: str) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(IsADirectoryError, match=r"path: expected the path of a file to write, got the folder .*there"):
        H.save(tmp_path / "there") if what == "an artifact" else write_bytes(tmp_path / "there", b"x")
    assert [p.name for p in tmp_path.rglob("*")] == ["there"], "nothing half written is left"


@pytest.mark.parametrize("rows", [True, -1, 2.5, float("nan"), "many"])
def test_a_correction_for_no_number_of_rows(rows: Any) -> None:
    with pytest.raises(ValueError, match="rows: expected a whole number of at least 0"):
        MixedCorrection("length", 0.8, rows=500, fade=0.04).at(rows)


def test_a_correction_holds_plain_numbers() -> None:
    correction = MixedCorrection("length", np.float32(0.5), rows=np.int64(500), fade=np.float32(0.25))  # type: ignore[arg-type]
    assert json.dumps([correction.value, correction.rows, correction.fade]) == "[0.5, 500, 0.25]"
