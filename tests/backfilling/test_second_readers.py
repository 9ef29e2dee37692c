"""verify reads every kind of source a second time, by its own library: a reader of fct that loses, doubles or swaps a
row is found, in the backfill and in verify alike, and a gallery that was read well is proven."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.gallery import open_source
from tests.gallery import test_tables as tables

D, N = 8, 40
QUICK: dict[str, Any] = {
    "old_model": "random-old", "progress": False, "shard_rows": 15, "batch_rows": 8, "precision": "fp32", "threads": 1,
    "format": "parquet",
}  # fmt: skip


@pytest.fixture(scope="module")
def h() -> fct.Transformation:
    return fct.Transformation.random(D, D, 4, inner=16, side_info=False)


def table(n: int = N, first: int = 0) -> pa.Table:
    """Ids, vectors, payload of several kinds, nulls among it."""
    rows = range(first, first + n)
    vectors = np.random.default_rng(first).standard_normal((n, D), dtype=np.float32)
    return pa.table(
        {
            "id": pa.array([f"item {i}" for i in rows]),
            "embedding": pa.array(list(vectors), pa.list_(pa.float32())),
            "number": pa.array([None if i % 7 == 3 else i for i in rows], pa.int64()),
            "when": pa.array([1_600_000_000_123_456 + i for i in rows], pa.timestamp("us")),
            "tags": pa.array([None if i % 5 == 4 else ["a", f"b{i}"][: i % 3] for i in rows], pa.list_(pa.string())),
        }
    )


def vectors() -> Any:
    return np.random.default_rng(1).standard_normal((N, D), dtype=np.float32)


# ---- galleries ----
def delta(folder: Path) -> Any:
    deltalake = pytest.importorskip("deltalake")
    where = str(folder / "t")
    deltalake.write_deltalake(where, table(25), partition_by=None)
    deltalake.write_deltalake(where, table(25, 25), mode="append")
    deltalake.DeltaTable(where).delete("number >= 45 OR number = 2")
    return where


def delta_with_deletion_vectors(folder: Path) -> Any:
    pytest.importorskip("deltalake")
    names = ["deletionVectors"]
    features = {"readerFeatures": names, "writerFeatures": names}
    protocol = {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **features}}
    root = folder / "t"
    root.mkdir()
    fields = [tables.field("id", "string"), tables.field("embedding", tables.FLOATS), tables.field("number", "long")]
    actions = [protocol, tables.metadata(fields)]
    for number, gone in enumerate([[1, 5], [0, 24]]):
        some = table(25, 25 * number).select(["id", "embedding", "number"])
        actions.append(tables.add(root, some, f"f{number}.parquet", deletionVector=tables.deletion_vector(gone)))
    tables.write_log(root, actions)
    return str(root)


def iceberg(folder: Path) -> Any:
    sql = pytest.importorskip("pyiceberg.catalog.sql", exc_type=ImportError)
    catalog = sql.SqlCatalog("c", uri=f"sqlite:///{folder}/c.db", warehouse=f"file://{folder}/w")
    catalog.create_namespace("n")
    made = catalog.create_table("n.t", schema=table(1).schema)
    made.append(table(25))
    made.append(table(25, 25))
    made.delete("number >= 45")
    return made.location().removeprefix("file://")


def saved(folder: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset(table()).save_to_disk(str(folder / "d"), num_shards=2)
    return str(folder / "d")


def saved_with_indices(folder: Path) -> Any:
    where = Path(saved(folder))
    indices = pa.table({"indices": pa.array(np.random.default_rng(0).permutation(N)[:30], pa.uint64())})
    with pa.ipc.new_stream(where / "indices.arrow", indices.schema) as out:
        out.write_table(indices)
    state = json.loads((where / "state.json").read_text())
    (where / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    return str(where)


def lance(folder: Path) -> Any:
    library = pytest.importorskip("lance")
    library.write_dataset(table(), str(folder / "d.lance"), max_rows_per_file=25)
    return str(folder / "d.lance")


def npz(folder: Path) -> Any:
    np.savez(folder / "a.npz", rows=vectors(), ids=np.arange(N))
    return f"{folder}/a.npz:rows"


def npz_compressed(folder: Path) -> Any:
    np.savez_compressed(folder / "a.npz", rows=vectors(), ids=np.arange(N))
    return f"{folder}/a.npz"


def hdf5(folder: Path) -> Any:
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "a.hdf5", "w") as file:
        file.create_dataset("deep/rows", data=vectors(), chunks=(7, 5))
    return f"{folder}/a.hdf5:/deep/rows"


def hdf5_of_codes(folder: Path) -> Any:
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "a.h5", "w") as file:
        rows = file.create_dataset("rows", data=(vectors() * 30).astype(np.int16))
        rows.attrs.update(scale_factor=np.float32(1 / 30), add_offset=0.25, _FillValue=np.int16(-3000))
        rows[4, 2] = -3000
    return f"{folder}/a.h5:rows"


def zarr(folder: Path) -> Any:
    library = pytest.importorskip("zarr")
    array = library.open_group(f"{folder}/a.zarr", mode="w").create_array(
        "rows", shape=(N, D), chunks=(7, 5), dtype="f4"
    )
    array[:] = vectors()
    return f"{folder}/a.zarr:/rows"


def clip(folder: Path) -> Any:
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / "c" / name).mkdir(parents=True)
    for number, rows in enumerate((25, 15)):
        some = table(rows, 25 * number)
        for name in ("img_emb", "text_emb"):
            np.save(folder / f"c/{name}/{name}_{number}.npy", np.stack(some["embedding"].to_numpy()) * (number + 1))
        pq.write_table(some.drop_columns(["embedding"]), folder / f"c/metadata/metadata_{number}.parquet")
    return str(folder / "c")


def stream(folder: Path) -> Any:
    return table()


def parquet(folder: Path) -> Any:
    (folder / "p/lang=de").mkdir(parents=True)
    pq.write_table(table(), folder / "p/lang=de/a.parquet", row_group_size=9)
    return str(folder / "p")


def npy(folder: Path) -> Any:
    np.save(folder / "a.npy", np.asfortranarray(vectors()))
    return str(folder / "a.npy")


def fbin(folder: Path) -> Any:
    (folder / "a.fbin").write_bytes(np.array([N, D], "<u4").tobytes() + vectors().tobytes())
    return str(folder / "a.fbin")


def vortex(folder: Path) -> Any:
    library = pytest.importorskip("vortex")
    library.io.write(table(), str(folder / "a.vortex"))
    return str(folder / "a.vortex")


KINDS: dict[str, Callable[[Path], Any]] = {
    "Delta": delta, "Delta with deletion vectors": delta_with_deletion_vectors, "Iceberg": iceberg,
    "saved dataset": saved, "saved dataset with indices": saved_with_indices, "Lance": lance, ".npz": npz,
    "compressed .npz": npz_compressed, "HDF5": hdf5, "HDF5 of codes": hdf5_of_codes, "Zarr": zarr,
    "clip-retrieval": clip, "Arrow stream": stream, "Parquet": parquet, ".npy": npy, ".fbin": fbin, "Vortex": vortex,
}  # fmt: skip
each_kind = pytest.mark.parametrize("kind", KINDS)


# ---- faults of fct's readers ----
def lost(rows: list[int]) -> list[int]:
    return rows[1:]


def doubled(rows: list[int]) -> list[int]:
    return [*rows[:2], rows[1], *rows[3:]]


def swapped(rows: list[int]) -> list[int]:
    return [*rows[:2], rows[3], rows[2], *rows[4:]]


def plant(patch: pytest.MonkeyPatch, where: Any, change: Callable[[list[int]], list[int]], column: str = "") -> None:
    """fct's reader of this kind of gallery gives other rows of each piece; of one column alone where it is named."""
    kind = type(open_source(where))
    pieces, read = kind.pieces, kind.read

    def fewer(self: Any) -> Any:
        return [replace(p, rows=len(change(list(range(p.rows)))), groups=()) for p in pieces(self)]

    def other(self: Any, piece: Any, start: int, rows: int, batch_rows: int) -> Any:
        whole = next(p for p in pieces(self) if p.name == piece.name)
        batches = list(read(self, whole, 0, whole.rows, 1000))
        plain = pa.Table.from_batches(batches).combine_chunks()
        taken = plain.take(change(list(range(whole.rows))))
        if column:
            place = plain.schema.get_field_index(column)
            taken = plain.set_column(place, plain.schema.field(place), taken.column(place))
        yield from taken.slice(start, rows).combine_chunks().to_batches(max_chunksize=batch_rows)

    patch.setattr(kind, "pieces", fewer)
    patch.setattr(kind, "read", other)


def made(where: Any, new: Path, h: fct.Transformation) -> Any:
    options = QUICK | ({"vector_column": "img_emb"} if "img_emb" in open_source(where).schema.names else {})
    fct.backfill(where, new, h, **options)
    return fct.verify_gallery(new, source=where, progress=False)


@each_kind
def test_a_gallery_that_was_read_well_is_proven(kind: str, h: fct.Transformation, tmp_path: Path) -> None:
    where = KINDS[kind](tmp_path)
    report = made(where, tmp_path / "new", h)
    assert report.proven, (report.problems, report.unproven)
    rows = sum(p.rows for p in open_source(where).pieces())
    assert (report.source_rows, report.read_alike, report.rows_in) == (rows, rows, rows)
    assert rows == {"Delta": 45, "Delta with deletion vectors": 46, "Iceberg": 46}.get(kind, rows)


@each_kind
@pytest.mark.parametrize("fault", [lost, doubled, swapped])
def test_a_reader_that_gives_other_rows_is_found(
    kind: str, fault: Any, h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = KINDS[kind](tmp_path)
    if fault is swapped and kind.startswith("Delta"):
        plant(monkeypatch, where, fault, "embedding")  # a table's rows have no order, but belong together
    else:
        plant(monkeypatch, where, fault)
    report = made(where, tmp_path / "new", h)
    assert not report.ok
    assert report.spot_checked == 0, "found by h alone"


@pytest.mark.parametrize("kind", [".npz", "Zarr", "Iceberg"])
def test_what_a_reader_did_once_is_found_when_it_does_so_no_longer(
    kind: str, h: fct.Transformation, tmp_path: Path
) -> None:
    where = KINDS[kind](tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, where, swapped, "" if kind != "Iceberg" else "embedding")
        fct.backfill(where, tmp_path / "new", h, **QUICK)
    (problem, *_) = fct.verify_gallery(tmp_path / "new", source=where, spot_check=0).problems
    assert "was made of other rows than" in problem
    assert problem.startswith("shard 0 (rows 0 to 14 of the source)") or kind == "Iceberg"


def test_side_information_is_read_a_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h = fct.Transformation.random(D, D, 4, inner=16)
    (tmp_path / "side").mkdir()
    np.save(tmp_path / "a.npy", vectors())
    side = npz(tmp_path / "side")
    options = {k: v for k, v in QUICK.items() if k != "format"} | {"side_source": side}
    fct.backfill(tmp_path / "a.npy", tmp_path / "new", h, **options)
    report = fct.verify_gallery(tmp_path / "new", source=tmp_path / "a.npy", side_source=side)
    assert report.proven, report
    plant(monkeypatch, side, swapped)
    fct.backfill(tmp_path / "a.npy", tmp_path / "other", h, **options)
    report = fct.verify_gallery(tmp_path / "other", source=tmp_path / "a.npy", side_source=side)
    assert any("was made of other rows than numpy reads" in p for p in report.problems), report.problems


@pytest.mark.parametrize(("kind", "package"), [("saved dataset", "datasets"), ("HDF5", "h5py"), ("Delta", "deltalake")])
def test_without_its_package_a_gallery_is_not_proven_and_it_says_how(
    kind: str, package: str, h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = KINDS[kind](tmp_path)
    assert made(where, tmp_path / "new", h).proven
    monkeypatch.setitem(sys.modules, package, None)
    report = fct.verify_gallery(tmp_path / "new", source=where)
    assert (report.ok, report.proven, report.source_rows) == (True, False, None)
    assert any("not proven" in what and "pip install" in what and package in what for what in report.unproven), report


def test_a_source_of_ones_own_has_no_second_reader(h: fct.Transformation, tmp_path: Path) -> None:
    from fct.gallery.interfaces import Source

    inner = open_source(fbin(tmp_path))

    class Mine(Source):
        kind = "mine"
        url = "mine"
        schema = inner.schema
        pieces, read = inner.pieces, inner.read

    report = made(Mine(), tmp_path / "new", h)
    assert report.ok
    (why,) = report.unproven
    assert why.startswith(
        "not proven by a second reader: the rows of mine, which were counted and read by fct's own alone"
    )


def test_a_saved_dataset_whose_state_lost_a_file_is_found(h: fct.Transformation, tmp_path: Path) -> None:
    """The new gallery is what load_from_disk opens, not the files that lie there."""
    where = saved(tmp_path)
    fct.backfill(where, tmp_path / "new", h, **{k: v for k, v in QUICK.items() if k != "format"})
    assert fct.verify_gallery(tmp_path / "new", source=where).proven
    state = json.loads((tmp_path / "new/state.json").read_text())
    state["_data_files"][0], state["_data_files"][1] = state["_data_files"][1], state["_data_files"][0]
    (tmp_path / "new/state.json").write_text(json.dumps(state))
    assert any("differs from the source's" in p for p in fct.verify_gallery(tmp_path / "new", source=where).problems)


def test_a_new_delta_table_is_what_deltalake_reads(
    h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deltalake")
    source, new = parquet(tmp_path), tmp_path / "new"
    fct.backfill(source, f"delta://{new}", h, **{k: v for k, v in QUICK.items() if k != "format"})
    assert fct.verify_gallery(new, source=source).proven
    plant(monkeypatch, new, swapped, "number")
    problems = fct.verify_gallery(new, source=source).problems
    assert any("column 'number' differs" in p or "together in other rows" in p for p in problems), problems


def test_a_new_table_of_a_catalog_is_verified_by_its_named_journal(h: fct.Transformation, tmp_path: Path) -> None:
    pytest.importorskip("pyiceberg.catalog.sql", exc_type=ImportError)
    (tmp_path / "lake").mkdir()
    lake = {"type": "sql", "uri": f"sqlite:///{tmp_path}/c.db", "warehouse": str(tmp_path / "lake")}
    source, how = parquet(tmp_path), {k: v for k, v in QUICK.items() if k != "format"}

    def job(table: str) -> Any:
        to = f"iceberg://prod/shop.{table}"
        return fct.backfill(source, to, h, journal=tmp_path / "j", storage_options=lake, **how)

    job("items")
    where = tmp_path / "lake/shop/items"
    assert fct.verify_gallery(where, source=source, journal=tmp_path / "j").proven
    with pytest.raises(fct.FctError, match=r"has no job\.json"):
        fct.verify_gallery(where, source=source)
    with pytest.raises(fct.FctError, match="destination: a URL with another path than it was begun with"):
        job("others")


def test_rows_in_any_order_are_one_multiset() -> None:
    from fct.backfilling.row_multiset import RowMultiset

    whole = table().append_column("label", pa.array(["x", None, "y z", "x"] * 10).dictionary_encode())
    whole = whole.append_column("flag", pa.array([True, None] * 20)).combine_chunks()

    def of(*parts: pa.Table) -> RowMultiset:
        found = RowMultiset()
        for part in parts:
            for batch in part.combine_chunks().to_batches():
                found.add(batch)
        return found

    one = of(whole)
    assert one.differences(of(whole.slice(20), whole.slice(3, 17), whole.slice(0, 3))) == []
    assert one.differences(of(whole.slice(1))) == ["40 rows, 39"]
    for name in whole.schema.names:
        place = whole.schema.get_field_index(name)
        turned = whole.set_column(place, whole.schema.field(place), whole.column(place).take(list(range(40))[::-1]))
        said = one.differences(of(turned))
        assert said == ["the same values, together in other rows"], (name, said)
        twice = whole.column(place).take([0, 1, 1, *range(3, 40)])
        assert one.differences(of(whole.set_column(place, whole.schema.field(place), twice))), name
