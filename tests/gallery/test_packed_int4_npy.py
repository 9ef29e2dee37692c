"""A packed .npy of 4-bit rows: numpy writes and reads it, fits, maps, backfills and commands take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct.errors import FctError
from fct.gallery import load_labels, load_vectors
from fct.packed_int4 import PackedInt4, pack_int4


@pytest.fixture(params=[6, 7])
def packed(request: pytest.FixtureRequest, rng: np.random.Generator, tmp_path: Path) -> tuple[Any, Path]:
    codes = rng.integers(-8, 8, (90, request.param))
    np.save(tmp_path / "side.npy", pack_int4(codes).records)
    return codes, tmp_path / "side.npy"


def test_numpy_alone_writes_and_reads_the_layout(packed: tuple[Any, Path]) -> None:
    codes, file = packed
    d, width = codes.shape[1], (codes.shape[1] + 1) // 2
    records = np.load(file)
    assert records.dtype.descr == [(f"int4x{d}", "|u1", (width,))]
    assert file.stat().st_size == 128 + 90 * width
    low, high = records[f"int4x{d}"] & 15, records[f"int4x{d}"] >> 4
    by_hand = np.stack([low, high], axis=2).reshape(90, -1)[:, :d].astype(int)
    np.testing.assert_array_equal(np.where(by_hand > 7, by_hand - 16, by_hand), codes)
    np.testing.assert_array_equal(PackedInt4.of_records(records).codes(), codes)
    assert pack_int4(codes[:0]).records.shape == (0,)


def test_every_way_reads_it_as_the_codes(packed: tuple[Any, Path], rng: np.random.Generator, tmp_path: Path) -> None:
    codes, file = packed
    d = codes.shape[1]
    plain = codes.astype(np.float32)
    h = fct.Transformation.random(5, d, 4, inner=8)
    old, new = (rng.standard_normal((90, n), dtype=np.float32) for n in (5, 4))
    want = fct.transform_batch(old, plain, h)
    for side in (np.load(file), np.load(file, mmap_mode="r")):
        np.testing.assert_array_equal(fct.transform_batch(old, side, h), want)
    np.testing.assert_array_equal(fct.transform_batch(old[3:8], np.load(file)[3:8], h), want[3:8])
    np.testing.assert_array_equal(load_vectors(file), plain)
    np.save(tmp_path / "old.npy", old)
    fct.backfill(tmp_path / "old.npy", tmp_path / "out", h, side_source=file, old_model="random-old", progress=False)
    np.testing.assert_array_equal(load_vectors(tmp_path / "out"), want)
    from fct.baselines import fit_ridge  # the pairs' gate is the fits' own
    from fct.fit.pairs import check_pairs

    np.testing.assert_array_equal(check_pairs(old, np.load(file), new).loaded()[1], plain)
    assert fit_ridge(old, new).d_new == 4


def test_the_commands_take_it(packed: tuple[Any, Path], rng: np.random.Generator, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fct.cli.app import app

    codes, file = packed
    h = fct.Transformation.random(5, codes.shape[1], 4, inner=8)
    h.save(tmp_path / "h.safetensors")
    old = rng.standard_normal((90, 5), dtype=np.float32)
    np.save(tmp_path / "old.npy", old)
    words = ["transform", tmp_path / "old.npy", tmp_path / "new.npy", "-t", tmp_path / "h.safetensors"]
    words += ["--side-source", file, "--old-model", "random-old"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    want = fct.transform_batch(old, codes.astype(np.float32), h)
    np.testing.assert_array_equal(np.load(tmp_path / "new.npy"), want)


def test_another_number_of_codes_is_refused(packed: tuple[Any, Path], rng: np.random.Generator, tmp_path: Path) -> None:
    """6 and 5 codes lie in three bytes each: the file says which, where a binary column cannot."""
    codes, file = packed
    h = fct.Transformation.random(5, codes.shape[1] - 1, 4, inner=8)
    old = rng.standard_normal((90, 5), dtype=np.float32)
    with pytest.raises(ValueError, match=rf"side_info: expected \(90, {h.d_side}\) to match the transformation, got"):
        fct.transform_batch(old, np.load(file), h)
    np.save(tmp_path / "old.npy", old)
    with pytest.raises(FctError, match=rf"{h.d_side}.*got {h.d_side + 1}-d vectors"):
        fct.backfill(
            tmp_path / "old.npy", tmp_path / "out", h, side_source=file, old_model="random-old", progress=False
        )


def test_other_records_and_damage_are_refused_by_name(packed: tuple[Any, Path], tmp_path: Path) -> None:
    _, file = packed
    whole = file.read_bytes()
    (tmp_path / "short.npy").write_bytes(whole[:-1])
    with pytest.raises(FctError, match=r"short\.npy is truncated"):
        load_vectors(tmp_path / "short.npy")
    for field, kind in (("int4x9", "3u1"), ("int4x0", "3u1"), ("int4x6", "3i1"), ("x", "3u1"), ("int4x6", "u1")):
        np.save(tmp_path / "other.npy", np.zeros(4, [(field, kind)]))
        with pytest.raises(FctError, match=rf"expected \(n, d\) rows in .*other.npy, got \(4,\) \[\('{field}'"):
            load_vectors(tmp_path / "other.npy")
        with pytest.raises(ValueError, match=r"side_info: expected \(n,\) records of one field int4xD"):
            fct.transform_batch(
                np.ones((4, 5), np.float32),
                np.load(tmp_path / "other.npy"),
                fct.Transformation.random(5, 6, 4, inner=8),
            )
    with pytest.raises(ValueError, match="labels: expected a column"):
        load_labels(file)
