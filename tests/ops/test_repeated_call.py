"""A call of transform_batch as it was made before: the same answers, the same refusals, and no check made twice."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct import ref
from fct import transform as module
from fct.artifact.transformation import Transformation
from fct.fit.precision_choice import calibrate
from fct.ops.isa import using_isa
from fct.ops.transform import repeated

Floats = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture
def h(rng: np.random.Generator) -> Transformation:
    h = Transformation.random(24, 9, 17, branch=16, blocks=1, inner=40, skip=True)
    return calibrate(h, *rows(rng, 300))


def rows(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
    return rng.standard_normal((n, 24), dtype=np.float32), rng.standard_normal((n, 9), dtype=np.float32)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a call is checked as a first one is."""
    seen: list[int] = []
    whole = module.check_inputs

    def check(*args: Any, **keywords: Any) -> Any:
        seen.append(1)
        return whole(*args, **keywords)

    monkeypatch.setattr(module, "check_inputs", check)
    return seen


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_second_call_gives_the_first_one_s_bits(
    h: Transformation, precision: str, dtype: str, checks: list[int], rng: np.random.Generator
) -> None:
    for n in (1, 5, 8, 64, 300):
        old, side = (x.astype(dtype) for x in rows(rng, n))
        with using_isa("portable"):  # another level, whose calls stand apart
            fct.transform_batch(old, side, h, precision=precision)
        repeated._calls.pop(h)
        first = fct.transform_batch(old, side, h, precision=precision)
        checks.clear()
        second = fct.transform_batch(old, side, h, precision=precision)
        out = np.full((n, 17), np.nan, np.float32)
        assert fct.transform_batch(old, side, h, precision=precision, out=out) is out
        assert not checks, "a call as before was checked from the beginning"
        assert type(second) is np.ndarray
        assert second.dtype == np.float32
        assert all((second.flags.owndata, second.flags.writeable, second.flags.c_contiguous))
        np.testing.assert_array_equal(second, first)
        np.testing.assert_array_equal(out, first)


def test_without_side_info(checks: list[int], rng: np.random.Generator) -> None:
    h = Transformation.random(24, 24, 17, inner=40, side_info=False)
    old = rng.standard_normal((7, 24), dtype=np.float32)
    first = fct.transform_batch(old, None, h)
    np.testing.assert_array_equal(fct.transform_batch(old, None, h), first)
    assert len(checks) == 1
    np.testing.assert_allclose(first, ref.transform(old, old, h), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"side_info: expected None, since .* got an array"):
        fct.transform_batch(old, old, h)


def overlapping(old: Floats, side: Floats) -> dict[str, Any]:
    whole = np.zeros(6 * 24 + 6 * 17, np.float32)
    return {"old": whole[: 6 * 24].reshape(6, 24), "out": whole[6 * 24 - 1 :][: 6 * 17].reshape(6, 17)}


def spoilt(old: Floats, value: float, row: int) -> Floats:
    old = old.copy()
    old[row, -1] = value
    return old


def read_only() -> Floats:
    out = np.zeros((6, 17), np.float32)
    out.flags.writeable = False
    return out


BAD: dict[str, Callable[[Floats, Floats], dict[str, Any]]] = {
    "NaN": lambda old, side: {"old": spoilt(old, np.nan, 5)},
    "infinite half": lambda old, side: {"old": spoilt(old, np.inf, 0).astype(np.float16)},
    "infinite side": lambda old, side: {"side_info": spoilt(side, -np.inf, 3)},
    "columns": lambda old, side: {"old": np.ascontiguousarray(old[:, :-1])},
    "side's columns": lambda old, side: {"side_info": np.zeros((6, 8), np.float32)},
    "rows": lambda old, side: {"side_info": side[:-1]},
    "no side": lambda old, side: {"side_info": None},
    "rank": lambda old, side: {"old": old[0]},
    "float64": lambda old, side: {"old": old.astype(np.float64)},
    "bare int8": lambda old, side: {"old": old.astype(np.int8)},
    "list": lambda old, side: {"old": old.tolist()},
    "masked": lambda old, side: {"old": np.ma.masked_array(old, mask=old > 0)},
    "out's columns": lambda old, side: {"out": np.zeros((6, 16), np.float32)},
    "out's rows": lambda old, side: {"out": np.zeros((7, 17), np.float32)},
    "out read-only": lambda old, side: {"out": read_only()},
    "out strided": lambda old, side: {"out": np.zeros((17, 6), np.float32).T},
    "out overlaps": overlapping,
    "precision": lambda old, side: {"precision": "fp64"},
    "precision a list": lambda old, side: {"precision": ["int8"]},
    "threads": lambda old, side: {"threads": 0},
    "threads true": lambda old, side: {"threads": True},
    "progress": lambda old, side: {"progress": 1},
    "device": lambda old, side: {"device": "tpu"},
    "backend": lambda old, side: {"backend": "none"},
    "no h": lambda old, side: {"transformation": "h"},
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_repeated_call_is_refused_in_the_same_words(name: str, h: Transformation, rng: np.random.Generator) -> None:
    old, side = rows(rng, 6)
    call: dict[str, Any] = {"old": old, "side_info": side, "transformation": h} | BAD[name](old, side)
    said = []
    for _ in range(2):  # as a first call, and as a repeated one
        before = None if not isinstance(call.get("out"), np.ndarray) else call["out"].copy()
        with pytest.raises((TypeError, ValueError, fct.BackendError)) as refused:
            fct.transform_batch(**call)
        said.append(f"{type(refused.value).__name__}: {refused.value}")
        if before is not None:
            np.testing.assert_array_equal(call["out"], before)
        for threads in (None, 1):
            fct.transform_batch(old, side, h, threads=threads)
            fct.transform_batch(old, side, h, threads=threads, precision="int8")
    assert said[0] == said[1]
    assert name.partition("'")[0] != "NaN" or said[0] == (
        "ValueError: old: expected finite values, got NaN or infinity in row 5"
    )


def test_a_bad_row_in_any_place_of_a_large_batch_is_found(h: Transformation, rng: np.random.Generator) -> None:
    old, side = rows(rng, 3000)
    fct.transform_batch(old, side, h)
    for row in (0, 255, 256, 1499, 1500, 2999):
        for name, bad in (("old", spoilt(old, np.nan, row)), ("side_info", spoilt(side, np.inf, row))):
            call: dict[str, Any] = {"old": old, "side_info": side} | {name: bad}
            with pytest.raises(ValueError, match=f"^{name}: expected finite values, got NaN or infinity in row {row}$"):
                fct.transform_batch(**call, transformation=h)


def test_a_file_that_was_cut_short_is_refused(h: Transformation, tmp_path: Path, rng: np.random.Generator) -> None:
    old, side = rows(rng, 2000)
    np.save(tmp_path / "old.npy", old)
    mapped = np.load(tmp_path / "old.npy", mmap_mode="r")
    first = fct.transform_batch(old, side, h)
    for view in (mapped, np.asarray(mapped)):
        np.testing.assert_array_equal(fct.transform_batch(view, side, h), first)
    os.truncate(tmp_path / "old.npy", 4096)
    for view in (mapped, np.asarray(mapped)):
        with pytest.raises(ValueError, match="old: expected a mapped file of at least"):
            fct.transform_batch(view, side, h)


def test_what_is_not_plain_is_checked_as_a_first_call(
    h: Transformation, checks: list[int], rng: np.random.Generator
) -> None:
    old, side = rows(rng, 40)
    want = fct.transform_batch(old, side, h)
    wide = np.zeros((40, 30), np.float32)
    wide[:, 3:27] = old
    swapped = old.astype(">f4")
    for other in (wide[:, 3:27], np.asfortranarray(old), swapped, old.view(np.recarray)):
        checks.clear()
        np.testing.assert_array_equal(fct.transform_batch(other, side, h), want)
        assert len(checks) == 1
    checks.clear()
    np.testing.assert_array_equal(fct.transform_batch(old[::-1][::-1], side, h), want)
    assert not checks, "rows of a plain array are plain"
    half = np.empty((40, 17), np.float16)
    fct.transform_batch(old, side, h, out=half)
    np.testing.assert_allclose(half, want, atol=1e-2)


def test_the_environment_is_asked_in_every_call(
    h: Transformation, checks: list[int], monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    old, side = rows(rng, 4)
    ours = fct.transform_batch(old, side, h)
    for _ in range(2):
        monkeypatch.setenv("FCT_BACKEND", "ref")
        checks.clear()
        exact = fct.transform_batch(old, side, h)
        assert len(checks) == 1
        np.testing.assert_allclose(exact, ref.transform(old, side, h), rtol=1e-6, atol=1e-6)
        monkeypatch.setenv("FCT_BACKEND", "nobody")
        with pytest.raises(ValueError, match=r"backend: expected one of .*, got 'nobody'"):
            fct.transform_batch(old, side, h)
        monkeypatch.delenv("FCT_BACKEND")
        np.testing.assert_array_equal(fct.transform_batch(old, side, h), ours)
    monkeypatch.setenv("FCT_NUM_THREADS", "none")
    with pytest.raises(ValueError, match="FCT_NUM_THREADS: expected a whole number"):
        fct.transform_batch(old, side, h)
    monkeypatch.setenv("FCT_NUM_THREADS", "1")
    fct.transform_batch(old, side, h)
    checks.clear()
    np.testing.assert_array_equal(fct.transform_batch(old, side, h), ours)
    assert not checks, "the new environment is the known one from its second call on"


def test_nothing_keeps_an_h_alive(rng: np.random.Generator) -> None:
    h = Transformation.random(24, 9, 17, inner=40)
    for _ in range(2):
        fct.transform_batch(*rows(rng, 3), h)
    gone = weakref.ref(h)
    assert h in repeated._calls
    del h
    gc.collect()
    assert gone() is None
