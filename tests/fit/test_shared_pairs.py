"""Rows of the validation pairs that stand among the training pairs too: said, or refused where all do."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import fct
from fct.errors import FctWarning
from fct.fit.pairs import check_pairs
from fct.fit.recipes import FitConfig
from fct.fit.shared_pairs import require_apart

Arrays = tuple[Any, Any, Any]


def made(n: int, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    old, side, new = (rng.standard_normal((n, d)).astype(np.float32) for d in (6, 3, 5))
    return old, side, new


def joined(*parts: Arrays) -> Arrays:
    old, side, new = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return old, side, new


def part(pairs: Arrays, rows: slice) -> Arrays:
    old, side, new = pairs
    return old[rows], side[rows], new[rows]


TRAIN, OTHERS = made(9_000, 0), made(40, 1)  # more rows than are looked at together
FEW = FitConfig(inner=8, epochs=1, batch_size=64)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(8_995, 9_000), slice(5, 6)])
def test_rows_of_both_are_counted(rows: slice) -> None:
    shared = part(TRAIN, rows)
    held = check_pairs(*joined(OTHERS, shared, OTHERS))
    count = len(shared[0])
    with pytest.warns(
        FctWarning,
        match=rf"validation: expected rows apart from the training pairs, got {count} of {80 + count} whose old vector "
        "and side_info stand there too: the figures flatter h",
    ):
        assert require_apart(check_pairs(*TRAIN), held) is held


def test_a_row_twice_in_validation_counts_twice() -> None:
    shared = part(TRAIN, slice(0, 1))
    with pytest.warns(FctWarning, match="got 2 of 42 whose"):
        require_apart(check_pairs(*TRAIN), check_pairs(*joined(shared, OTHERS, shared)))


@pytest.mark.parametrize(
    "kind", ["without side_info", "zeros of either sign", "float16 beside float32", "a new of its own"]
)
def test_equal_inputs_are_found(kind: str) -> None:
    old, side, new = (x.copy() for x in part(TRAIN, slice(0, 20)))
    train: tuple[Any, Any, Any] = old, side, new
    same = old.copy(), side.copy(), new.copy()
    held: tuple[Any, Any, Any] = joined(part(same, slice(0, 1)), OTHERS)
    if kind == "without side_info":
        train, held = (old, None, new), (held[0], None, held[2])
    elif kind == "zeros of either sign":
        train[0][0, 0], held[0][0, 0] = 0.0, -0.0
    elif kind == "float16 beside float32":
        train = old.astype(np.float16).astype(np.float32), side, new
        held = held[0].astype(np.float16), held[1], held[2]
    else:
        held[2][0] += 1
    with pytest.warns(FctWarning, match="got 1 of 41 whose old vector"):
        require_apart(check_pairs(*train), check_pairs(*held))


def test_the_same_old_vector_with_other_side_information_is_another_item() -> None:
    old, side, new = part(TRAIN, slice(0, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_apart(check_pairs(*TRAIN), check_pairs(old, side + 1, new))


def test_validation_that_is_the_training_pairs_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"validation: expected rows apart from the training pairs, got 60 of 60 whose old vector and side_info "
        r"stand there too; hold other items out, or give a share of the pairs \(validation=0.05\)",
    ):
        fct.fit_transformation(*part(TRAIN, slice(0, 60)), validation=part(TRAIN, slice(0, 60)), config=FEW)


def test_the_fit_says_it_where_it_was_called() -> None:
    train = part(TRAIN, slice(0, 60))
    with pytest.warns(FctWarning, match="validation: expected rows apart") as said:
        h = fct.fit_transformation(
            *train, validation=joined(OTHERS, part(train, slice(0, 2))), config=FEW, progress=False
        )
    assert [w.filename for w in said] == [__file__]
    assert h.info["validation_pairs"] == 42
