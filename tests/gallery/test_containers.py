"""One array of a container: members of .npz, HDF5 datasets, Zarr arrays of format 2 and 3; clip-retrieval's folders."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

import fct
from fct.gallery import load_labels, load_vectors, open_source

D = 16
Array = np.ndarray[Any, Any]


def _npz(folder: Path, values: Array) -> str:
    np.savez(folder / "a.npz", rows=values, ids=np.arange(len(values)))
    return f"{folder}/a.npz:rows"


def _npz_compressed(folder: Path, values: Array) -> str:
    np.savez_compressed(folder / "a.npz", rows=values, ids=np.arange(len(values)))
    return f"{folder}/a.npz:rows"


def _hdf5(folder: Path, values: Array) -> str:
    with h5py.File(folder / "a.hdf5", "w") as file:
        file["train"] = values
        file["test"] = values[:3]
        file["neighbors"] = np.zeros((3, 10), np.int32)
    return f"{folder}/a.hdf5:/train"


def _hdf5_chunked(folder: Path, values: Array) -> str:
    with h5py.File(folder / "a.h5", "w") as file:
        chunks = (min(97, len(values)), 5)
        file.create_dataset("deep/rows", data=values, chunks=chunks, compression="gzip", shuffle=True)
    return f"{folder}/a.h5:deep/rows"


def _zarr(version: int) -> Callable[[Path, Array], str]:
    def write(folder: Path, values: Array) -> str:
        group = zarr.open_group(f"{folder}/a.zarr", mode="w", zarr_format=version)  # type: ignore[arg-type]  # 2 or 3, to zarr a Literal
        array = group.create_array("deep/rows", shape=values.shape, chunks=(97, 5), dtype=values.dtype)
        array[:] = values
        group.create_array("labels", shape=(4,), dtype="i8")
        return f"{folder}/a.zarr:/deep/rows"

    return write


WRITERS = [_npz, _npz_compressed, _hdf5, _hdf5_chunked, _zarr(2), _zarr(3)]
each_writer = pytest.mark.parametrize(
    "write", WRITERS, ids=["npz", "npz-deflated", "hdf5", "h5-chunked", "zarr2", "zarr3"]
)


@each_writer
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "i1", "u1"])
def test_an_array_is_read_as_its_library_reads_it(
    write: Callable[[Path, Array], str], dtype: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    values = (rng.standard_normal((500, D)) * 30 + 60).clip(0, 120).astype(dtype)
    where = write(tmp_path, values)
    np.testing.assert_array_equal(load_vectors(where), values.astype(np.float16 if dtype == "<f2" else np.float32))
    source = pickle.loads(pickle.dumps(open_source(where)))
    (piece,) = source.pieces()
    assert piece.rows == 500
    for start, rows in ((4, 300), (400, 100), (0, 500), (130, 1)):  # forwards, back, and on from where one stopped
        batches = list(source.read(piece, start, rows, 70))
        assert max(b.num_rows for b in batches) <= 70
        got = np.concatenate([np.array(b.column(0).to_pylist()) for b in batches])
        np.testing.assert_array_equal(got, values[start : start + rows].astype(got.dtype))


@each_writer
def test_an_array_is_mapped_verified_fitted_and_searched(
    write: Callable[[Path, Array], str], tmp_path: Path, rng: np.random.Generator
) -> None:
    values = rng.standard_normal((700, D), dtype=np.float32)
    values[5, 2] = np.nan
    where = write(tmp_path, values)
    h = fct.Transformation.random(D, D, 8, inner=32, side_info=False)
    assert fct.plan_backfill(where, tmp_path / "new", h, old_model="random-old", measure_seconds=0.01).rows == 700
    report = fct.backfill(
        where, tmp_path / "new", h, old_model="random-old", progress=False, precision="fp32", shard_rows=200
    )
    assert (report.rows_out, report.rejects) == (699, 1)
    want = fct.transform_batch(np.delete(values, 5, 0), None, h, precision="fp32")
    np.testing.assert_array_equal(load_vectors(tmp_path / "new"), want)
    assert fct.verify_gallery(tmp_path / "new").ok


@each_writer
def test_what_is_not_there_or_no_rows_is_refused_by_what_is(
    write: Callable[[Path, Array], str], tmp_path: Path, rng: np.random.Generator
) -> None:
    where = write(tmp_path, rng.standard_normal((40, D), dtype=np.float32))
    container, _, _ = where.rpartition(":")
    with pytest.raises(fct.FctError, match=r"expected an array of .*\(40, 16\) float32.*, got 'none'"):
        open_source(f"{container}:none").pieces()
    (tmp_path / "two").mkdir()
    two = write(tmp_path / "two", np.zeros((40, D), np.int64))
    with pytest.raises(fct.FctError, match=r"expected floats of 16 to 64 bits or 8-bit integers in .*, got int64"):
        _ = open_source(two).schema
    (tmp_path / "three").mkdir()
    three = write(tmp_path / "three", np.zeros((40, D), np.complex64))
    with pytest.raises(fct.FctError, match="got complex64"):
        _ = open_source(three).schema


def test_the_only_matrix_of_a_container_needs_no_name(tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.standard_normal((40, D), dtype=np.float32)
    np.savez(tmp_path / "a.npz", rows=values, ids=np.arange(40))
    np.testing.assert_array_equal(load_vectors(tmp_path / "a.npz"), values)
    np.savez(tmp_path / "b.npz", old=values, new=values)
    with pytest.raises(
        fct.FctError, match=r"b\.npz holds old \(40, 16\) float32, new .*; name .* such as .*b\.npz:old"
    ):
        open_source(tmp_path / "b.npz").pieces()


def test_several_archives_are_one_gallery(tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.standard_normal((40, D), dtype=np.float32)
    for i in range(4):
        np.savez(tmp_path / f"part-{i}.npz", rows=values[i * 10 : i * 10 + 10], more=values)
    np.testing.assert_array_equal(load_vectors(f"{tmp_path}/part-*.npz:rows"), values)


def test_a_member_column_by_column(tmp_path: Path, rng: np.random.Generator) -> None:
    values = np.asfortranarray(rng.standard_normal((40, D)), ">f8")
    np.savez(tmp_path / "a.npz", rows=values)
    np.testing.assert_array_equal(load_vectors(tmp_path / "a.npz"), values.astype(np.float32))
    np.savez_compressed(tmp_path / "b.npz", rows=values)
    with pytest.raises(fct.FctError, match="expected rows in C order in a compressed archive"):
        open_source(tmp_path / "b.npz").pieces()


def test_a_damaged_archive_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    np.savez_compressed(tmp_path / "a.npz", rows=rng.standard_normal((4000, D)))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[:-20])
    with pytest.raises(fct.FctError, match=r"expected a whole \.npz file, .*a\.npz is not"):
        open_source(tmp_path / "a.npz").pieces()
    (tmp_path / "a.npz").write_bytes(whole[:9000] + bytes(50) + whole[9050:])
    with pytest.raises(fct.FctError, match=r"a\.npz is damaged"):
        load_vectors(tmp_path / "a.npz")


def test_a_damaged_hdf5_file_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    where = _hdf5(tmp_path, rng.standard_normal((4000, D)))
    whole = (tmp_path / "a.hdf5").read_bytes()
    (tmp_path / "a.hdf5").write_bytes(whole[:5000])
    with pytest.raises(fct.FctError, match=r"expected a whole HDF5 file, .*a\.hdf5 is not"):
        open_source(where).pieces()


def test_an_array_that_lies_in_another_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(4 * D * 10))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("rows", (10, D), "f4", external=[(str(tmp_path / "other"), 0, h5py.h5f.UNLIMITED)])
    with pytest.raises(fct.FctError, match="lies in other files, which are not opened"):
        open_source(f"{tmp_path}/a.h5:rows").pieces()


@pytest.mark.parametrize("name", [".zarray", "0.0"])
def test_a_pipe_in_a_store_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    zarr.save_array(str(tmp_path / "a.zarr"), np.ones((10, D), np.float32), zarr_format=2)  # type: ignore[arg-type]  # 2 or 3, to zarr a Literal
    (tmp_path / "a.zarr" / name).unlink()
    os.mkfifo(tmp_path / "a.zarr" / name)
    with pytest.raises(fct.FctError, match=r"expected files, .*a\.zarr.* is none"):
        open_source(f"{tmp_path}/a.zarr").pieces()


@pytest.mark.parametrize("version", [2, 3])
def test_codes_that_say_what_they_stand_for_are_read_so(version: int, tmp_path: Path, rng: np.random.Generator) -> None:
    codes = rng.integers(-127, 127, (300, D)).astype(np.int8)
    codes[9, 3] = -128
    array = zarr.create_array(f"{tmp_path}/a.zarr", shape=codes.shape, dtype="i1", chunks=(50, D), zarr_format=version)  # type: ignore[arg-type]  # 2 or 3, to zarr a Literal
    array[:] = codes
    array.attrs.update({"scale_factor": 0.01, "add_offset": -0.3, "_FillValue": -128})
    want = (codes * 0.01 - 0.3).astype(np.float32)
    h = fct.Transformation.random(D, D, 8, inner=32, side_info=False)
    plan = fct.plan_backfill(f"{tmp_path}/a.zarr", tmp_path / "new", h, old_model="random-old", measure_seconds=0.01)
    assert any("code * scale_factor + add_offset" in note for note in plan.notes)
    report = fct.backfill(
        f"{tmp_path}/a.zarr", tmp_path / "new", h, old_model="random-old", progress=False, precision="fp32"
    )
    assert report.rejects == 1
    mapped = fct.transform_batch(np.delete(want, 9, 0), None, h, precision="fp32")
    np.testing.assert_array_equal(load_vectors(tmp_path / "new"), mapped)


def test_netcdf_codes_in_hdf5(tmp_path: Path, rng: np.random.Generator) -> None:
    codes = rng.integers(-128, 128, (30, D)).astype(np.int8)
    scale = np.linspace(0.1, 1.0, D)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["rows"] = codes
        file["rows"].attrs.update({"scale_factor": scale, "add_offset": np.float32(2), "_Unsigned": "true"})
        file["bad"] = codes
        file["bad"].attrs.update({"scale_factor": "wide"})
    np.testing.assert_array_equal(
        load_vectors(f"{tmp_path}/a.h5:rows"), (codes.view("u1") * scale + 2).astype(np.float32)
    )
    with pytest.raises(fct.FctError, match=r"expected a finite number .* as scale_factor of .*bad, got 'wide'"):
        open_source(f"{tmp_path}/a.h5:bad").pieces()


def test_a_zarr_store_whose_chunks_are_not_all_there_is_said(tmp_path: Path, rng: np.random.Generator) -> None:
    array = zarr.create_array(f"{tmp_path}/a.zarr", shape=(300, D), dtype="f4", chunks=(50, D))
    array[:200] = rng.standard_normal((200, D))
    assert any(note.startswith("source: 2 chunks of") for note in open_source(f"{tmp_path}/a.zarr").notes)


def test_a_zarr_store_that_changed_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    where = _zarr(3)(tmp_path, rng.standard_normal((300, D)))
    source = open_source(where)
    (piece,) = source.pieces()
    zarr.open_array(f"{tmp_path}/a.zarr/deep/rows", mode="r+")[:50] = 0
    with pytest.raises(fct.FctError, match="changed: it had"):
        list(source.read(piece, 0, 300, 100))


def test_containers_over_a_network(tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.standard_normal((300, D), dtype=np.float32)
    memory = fsspec.filesystem("memory")
    for write in WRITERS:
        folder = tmp_path / f"{WRITERS.index(write)}"
        folder.mkdir()
        where = write(folder, values)
        memory.put(f"{folder}/", f"/containers{folder}", recursive=True)
        np.testing.assert_array_equal(load_vectors(f"memory://containers{where}"), values)


# ---- clip-retrieval ----
def _clip(folder: Path, rng: np.random.Generator, *, rows: tuple[int, ...] = (30, 20, 25)) -> Array:
    parts = []
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for i, n in enumerate(rows):
        image = rng.standard_normal((n, D)).astype(np.float16)
        np.save(folder / f"img_emb/img_emb_{i}.npy", image)
        np.save(folder / f"text_emb/text_emb_{i}.npy", rng.standard_normal((n, D)).astype(np.float16))
        keys = [f"{i:05d}{j:04d}" for j in range(n)]
        pq.write_table(pa.table({"key": keys, "caption": ["a"] * n}), folder / f"metadata/metadata_{i}.parquet")
        parts.append(image)
    return np.concatenate(parts)


def test_a_clip_retrieval_folder_is_one_gallery(tmp_path: Path, rng: np.random.Generator) -> None:
    image = _clip(tmp_path / "old", rng, rows=(30, 20, 5, 4, 3, 2, 6, 7, 8, 9, 10, 11))  # shard 10 comes behind 2
    h = fct.Transformation.random(D, D, 8, inner=32, side_info=False)
    with pytest.raises(ValueError, match="several could be meant: img_emb, text_emb"):
        fct.plan_backfill(tmp_path / "old", tmp_path / "new", h, old_model="random-old")
    fct.backfill(
        tmp_path / "old", tmp_path / "new", h, vector_column="img_emb", old_model="random-old", progress=False,
        precision="fp32", dtype="float32", batch_rows=7,
    )  # fmt: skip
    new = pq.read_table(tmp_path / "new")
    assert new.column_names == ["img_emb", "text_emb", "key", "caption"]
    assert new["key"].to_pylist() == pq.read_table(tmp_path / "new")["key"].to_pylist()
    assert new["key"].to_pylist()[:31] == [*(f"00000{j:04d}" for j in range(30)), "000010000"]
    want = fct.transform_batch(image, None, h, precision="fp32")
    np.testing.assert_array_equal(np.array(new["img_emb"].to_pylist(), np.float32), want)
    assert fct.verify_gallery(tmp_path / "new").ok


def test_the_texts_of_a_clip_retrieval_folder_as_side_information(tmp_path: Path, rng: np.random.Generator) -> None:
    _clip(tmp_path / "old", rng)
    h = fct.Transformation.random(D, D, 8, inner=32)
    report = fct.backfill(
        tmp_path / "old", tmp_path / "new", h, vector_column="img_emb", side_column="text_emb", old_model="random-old",
        progress=False,
    )  # fmt: skip
    assert report.rows_out == 75


def test_a_clip_retrieval_folder_that_does_not_fit_together_is_refused(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    _clip(tmp_path / "old", rng)
    pq.write_table(pa.table({"key": ["a"], "caption": ["b"]}), tmp_path / "old/metadata/metadata_1.parquet")
    with pytest.raises(fct.FctError, match=r"as many rows in all files of shard 1 .*img_emb_1\.npy: 20.*parquet: 1"):
        open_source(tmp_path / "old").pieces()
    (tmp_path / "old/metadata/metadata_1.parquet").unlink()
    with pytest.raises(fct.FctError, match=r"has no metadata of shard 1, which img_emb_1\.npy, text_emb_1\.npy is of"):
        open_source(tmp_path / "old").pieces()
    (tmp_path / "old/img_emb/extra.npy").write_bytes(b"")
    with pytest.raises(fct.FctError, match=r"expected img_emb_0\.npy, img_emb_1\.npy, .*, got extra\.npy"):
        open_source(tmp_path / "old").pieces()


@pytest.mark.parametrize("write", [_npz, _npz_compressed], ids=["npz", "npz-deflated"])
def test_labels_of_an_archive(write: Callable[[Path, Array], str], tmp_path: Path) -> None:
    where = write(tmp_path, np.zeros((40, D), np.float32)).replace(":rows", ":ids")
    assert load_labels(where).tolist() == list(range(40))
    np.savez(tmp_path / "text.npz", names=np.array(["shoe", "bag"]))
    assert load_labels(f"{tmp_path}/text.npz:names").tolist() == ["shoe", "bag"]
    with pytest.raises(fct.FctError, match=r"expected \(n,\) integers or text in .*rows, got \(40, 16\) float32"):
        load_labels(where.replace(":ids", ":rows"))


@pytest.mark.parametrize("version", [2, 3])
def test_labels_of_hdf5_and_zarr(version: int, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["labels"] = np.arange(5, dtype=">i4")
        file["train"] = np.zeros((5, D))
    group = zarr.open_group(f"{tmp_path}/a.zarr", mode="w", zarr_format=version)  # type: ignore[arg-type]  # 2 or 3, to zarr a Literal
    group.create_array("labels", shape=(5,), dtype="i4")[:] = np.arange(5)
    for where in (f"{tmp_path}/a.h5:labels", f"{tmp_path}/a.zarr:/labels"):
        assert load_labels(where).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(fct.FctError, match=r"expected \(n,\) integers in .*train, got \(5, 16\) float64"):
        load_labels(f"{tmp_path}/a.h5:/train")
