"""Galleries as real tools write them by their ordinary calls: mapped bit for bit, ids and payload in their rows.

A tool that is not among the test extras is skipped by name; what it writes is spelled out in test_vector_columns.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.errors import FctError
from fct.gallery import open_source

N, D = 300, 16
EMB = np.random.default_rng(7).standard_normal((N, D), dtype=np.float32)
TEXT = [f"row {i} ü\n" for i in range(N)]
IDS = list(range(N))
LISTS = pa.ListArray.from_arrays(pa.array(np.arange(0, N * D + 1, D, dtype=np.int32)), pa.array(EMB.ravel()))
TABLE = pa.table({"id": IDS, "text": TEXT, "embedding": LISTS})
COLUMNS = "id, text, cast(embedding as Array(%s)) as embedding"


def chdb(kind: str, form: str, suffix: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        tool = pytest.importorskip("chdb", reason="ClickHouse (chdb) is not among the test extras: 160 MB")
        pq.write_table(TABLE, folder / "_in.parquet")
        out = folder / f"a.{suffix}"
        tool.query(
            f"select {COLUMNS % kind} from file('{folder}/_in.parquet') order by id into outfile '{out}' format {form}"
        )
        return str(folder)

    return write


def datafusion(folder: Path) -> str:
    tool = pytest.importorskip("datafusion", reason="DataFusion is not installed")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(EMB.ravel()), D)
    tool.SessionContext().from_arrow(TABLE.set_column(2, "embedding", vectors)).write_parquet(str(folder / "a.parquet"))
    return str(folder)


def fastparquet(folder: Path) -> str:
    tool = pytest.importorskip("fastparquet", reason="fastparquet is not installed")
    import pandas as pd

    frame = pd.DataFrame({"id": IDS, "text": TEXT, "embedding": [row.tobytes() for row in EMB]})
    spelled = {"text": "utf8", "embedding": "bytes"}
    tool.write(str(folder), frame, object_encoding=spelled, file_scheme="hive", row_group_offsets=100)
    return str(folder)


def daft(kind: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        tool = pytest.importorskip("daft", reason="daft 0.7 wants pyarrow below 26, so it is not among the test extras")
        if kind == "tensor":
            frame = tool.from_pydict({"id": IDS, "text": TEXT, "embedding": list(EMB)})
        else:
            vectors = tool.col("embedding").cast(tool.DataType.embedding(tool.DataType.float32(), D))
            frame = tool.from_arrow(TABLE).with_column("embedding", vectors)
        frame.write_parquet(str(folder))
        return str(folder)

    return write


def polars(folder: Path) -> str:
    tool = pytest.importorskip("polars", reason="polars is not installed")
    frame = tool.from_arrow(TABLE).with_columns(tool.col("text").cast(tool.Categorical))
    frame.write_ipc(folder / "a.arrow")
    return str(folder)


def dask(folder: Path) -> str:
    frames = pytest.importorskip("dask.dataframe")
    import pandas as pd

    frame = TABLE.to_pandas(types_mapper=pd.ArrowDtype)
    frames.from_pandas(frame, npartitions=3).to_parquet(str(folder))
    return str(folder)


def hdf5(dtype: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        tool = pytest.importorskip("h5py")
        with tool.File(folder / "a.hdf5", "w") as file:
            file.create_dataset("train", data=EMB.astype(dtype), chunks=(90, 8), compression="gzip")
        return f"{folder}/a.hdf5:/train"

    return write


def zarr(version: int) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        tool = pytest.importorskip("zarr")
        group = tool.open_group(str(folder / "a.zarr"), mode="w", zarr_format=version)
        group.create_array("emb", shape=EMB.shape, chunks=(70, 8), dtype="f4")[:] = EMB
        return f"{folder}/a.zarr:/emb"

    return write


def vortex(kind: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        tool = pytest.importorskip("vortex", reason="vortex-data is not installed")
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(EMB.ravel()), D)
        tool.io.write(TABLE if kind == "list" else TABLE.set_column(2, "embedding", vectors), str(folder / "a.vortex"))
        return str(folder)

    return write


WRITERS: dict[str, Callable[[Path], str]] = {
    "ClickHouse, Parquet": chdb("Float32", "Parquet", "parquet"),
    "ClickHouse, doubles": chdb("Float64", "Parquet", "parquet"),
    "ClickHouse, Arrow": chdb("Float32", "Arrow", "arrow"),
    "ClickHouse, Arrow stream": chdb("Float32", "ArrowStream", "arrow"),
    "DataFusion": datafusion,
    "fastparquet": fastparquet,
    "daft, embedding": daft("embedding"),
    "daft, tensor": daft("tensor"),
    "polars, Categorical": polars,
    "Dask": dask,
    "h5py": hdf5("f4"),
    "h5py, big-endian doubles": hdf5(">f8"),
    "zarr 2": zarr(2),
    "zarr 3": zarr(3),
    "Vortex, fixed size": vortex("fixed size"),
    "Vortex, list": vortex("list"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_tool_writes_is_mapped(writer: str, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    where = WRITERS[writer](tmp_path / "old")
    h = fct.Transformation.random(D, D, 12, inner=32, side_info=False)
    how: dict[str, Any] = {"old_model": "random-old", "progress": False, "precision": "fp32", "shard_rows": 110}
    fct.backfill(where, tmp_path / "new", h, format="parquet", batch_rows=40, **how)
    assert fct.verify_gallery(tmp_path / "new", source=where).problems == ()
    new = pq.read_table(tmp_path / "new")
    vector = next(n for n in new.column_names if n in ("embedding", "vector"))
    kinds = new.schema.field(vector).type
    got = (
        np.frombuffer(b"".join(new[vector].to_pylist()), np.float32).reshape(N, -1)
        if pa.types.is_binary(kinds) or pa.types.is_fixed_size_binary(kinds)
        else np.array(new[vector].to_pylist(), np.float32).reshape(N, -1)
    )
    want = fct.transform_batch(EMB, None, h, precision="fp32", progress=False)
    if "id" in new.column_names:
        assert sorted(new["id"].to_pylist()) == IDS
        assert new["text"].to_pylist() == [TEXT[i] for i in new["id"].to_pylist()]
        want = want[new["id"].to_pylist()]
    assert np.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_vortex_file_is_read_from_any_row(tmp_path: Path) -> None:
    source = open_source(vortex("fixed size")(tmp_path))
    (piece,) = source.pieces()
    for start, rows in ((0, N), (0, 1), (17, 3), (N - 1, 1), (99, 102)):
        batches = list(source.read(piece, start, rows, 50))
        assert [i for b in batches for i in b.column(0).to_pylist()] == IDS[start : start + rows]
        assert max(b.num_rows for b in batches) <= 50


def test_what_is_no_vortex_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("vortex", reason="vortex-data is not installed")
    (tmp_path / "a.vortex").write_bytes(b"VTXF" + bytes(100))
    with pytest.raises(FctError, match=r"source: expected a whole Vortex file, .*a\.vortex is not"):
        open_source(tmp_path).pieces()
