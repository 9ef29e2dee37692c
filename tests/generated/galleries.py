"""Galleries as people have them: rows as Python lists, and the libraries that write and read them."""

from __future__ import annotations

import importlib.util
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.ipc
import pyarrow.parquet as pq

__all__ = [
    "DESTINATIONS",
    "D_OLD",
    "D_SIDE",
    "READERS",
    "WRITERS",
    "Drawn",
    "catalog_of",
    "partitioned_table",
    "plain_rows",
    "rows_of",
    "table_of",
    "write_gallery",
]

D_OLD, D_SIDE, D_NEW = 8, 4, 6
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Drawn:
    """One example. bad, null: rows whose vector holds a NaN, or is none. fault: what happens to the gallery on its way.

    side: "none", "column", "gallery" or "turned": a gallery of its own whose rows stand in another order.
    """

    writer: str = "pyarrow"
    layout: str = "flat"  # flat, nested, equal names, hive
    ids: str = "int64"
    payload: tuple[str, ...] = ("text",)
    spelling: str = "fixed"  # of lists: fixed, list, large
    rows: int = 30
    bad: tuple[int, ...] = ()
    null: tuple[int, ...] = ()
    side: str = "none"
    fault: str = "none"  # none, killed, sigkill, appended, lost output, deleted rows
    format: str = "auto"
    to: str = "files"  # or a new place of another kind: of DESTINATIONS
    export: str = "none"
    shard_rows: int = 7
    batch_rows: int = 4


# ---- rows ----
IDS: dict[str, tuple[str, pa.DataType, Callable[[int], Any]]] = {
    "int64": ("id", pa.int64(), lambda i: 10 * i - 50),
    "int32": ("pk", pa.int32(), lambda i: i + 7),
    "uint64": ("uid", pa.uint64(), lambda i: 2**63 + 3 * i),
    "text": ("_id", pa.string(), lambda i: f"item/{i}é"),
    "uuid": ("key", pa.string(), lambda i: str(uuid.UUID(int=i + 2**100))),
}
_STRUCT = pa.struct([("a", pa.int64()), ("b", pa.list_(pa.string()))])
PAYLOAD: dict[str, tuple[str, pa.DataType, Callable[[int], Any]]] = {
    "text": ("note", pa.string(), lambda i: None if i % 5 == 3 else f"text {i}"),
    "category": ("label", pa.dictionary(pa.int32(), pa.string()), lambda i: ("red", "blue", "a b")[i % 3]),
    "time": ("when", pa.timestamp("us"), lambda i: 1_600_000_000_123_456 + i),
    "old time": (
        "then",
        pa.timestamp("us"),
        lambda i: -14_830_974_000_000_000 - i,
    ),  # the year 1500: beyond nanoseconds
    "nested": ("nested", _STRUCT, lambda i: None if i % 7 == 2 else {"a": i, "b": ["x"] * (i % 3)}),
    "named vector": ("vector", pa.string(), lambda i: f"my vector {i}"),
    "large number": ("big", pa.uint64(), lambda i: 2**64 - 1 - i),
    "flag": ("flag", pa.bool_(), lambda i: i % 2 == 0),
}
FOLDERS: tuple[Any, ...] = ("de", "a b/c", None)


def rows_of(drawn: Drawn) -> Rows:
    """The gallery as Python lists: what every step is held against."""
    draw, rows = np.random.default_rng(7), []
    for i in range(drawn.rows):
        old = [float(x) for x in draw.integers(-64, 64, D_OLD) / 64]
        if i in drawn.bad:
            old[i % D_OLD] = float("nan")
        row: dict[str, Any] = {}
        for name, _, value in _columns(drawn):
            row[name] = value(i)
        if drawn.layout == "hive":
            row["lang"] = FOLDERS[i % 3]
        row["old"] = None if i in drawn.null else old
        row["side"] = [float(x) for x in draw.integers(-64, 64, D_SIDE) / 64]
        rows.append(row)
    return rows


def _columns(drawn: Drawn) -> list[tuple[str, pa.DataType, Callable[[int], Any]]]:
    if drawn.writer == "numpy":
        return []
    ids = [IDS[drawn.ids]] if drawn.ids != "none" else []
    return ids + [PAYLOAD[kind] for kind in drawn.payload]


def table_of(drawn: Drawn, rows: Rows) -> pa.Table:
    """The rows as Arrow, vectors in the drawn spelling; the folder's column left to the writer."""
    columns = {name: pa.array([r[name] for r in rows], kind) for name, kind, _ in _columns(drawn)}
    if drawn.layout == "hive":
        columns["lang"] = pa.array([r["lang"] for r in rows], pa.string())
    vectors = [("old", D_OLD)] + ([("side", D_SIDE)] if drawn.side == "column" else [])
    for name, d in vectors:
        fixed = pa.list_(pa.float32(), d)
        kind = {"fixed": fixed, "list": pa.list_(pa.float32()), "large": pa.large_list(pa.float32())}[drawn.spelling]
        columns[name] = pa.array([r[name] for r in rows], kind)
    return pa.table(columns)


# ---- writing ----
def _pandas(table: pa.Table, path: Path) -> None:
    import pandas as pd

    table.to_pandas(types_mapper=pd.ArrowDtype).to_parquet(path, index=False)


def _polars(table: pa.Table, path: Path) -> None:
    import polars as pl

    pl.from_arrow(table).write_parquet(path)  # type: ignore[union-attr]  # a table is a DataFrame


def _duckdb(table: pa.Table, path: Path) -> None:
    import duckdb

    with duckdb.connect() as connection:
        connection.register("t", table)
        connection.execute(f"COPY t TO '{path}' (FORMAT parquet)")


def _arrow(table: pa.Table, path: Path) -> None:
    table = table.unify_dictionaries()
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def _stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def _numpy(table: pa.Table, path: Path) -> None:
    np.save(path, np.array(table["old"].to_pylist(), np.float32))


FILES: dict[str, tuple[str, Callable[[pa.Table, Path], None]]] = {
    "pyarrow": (".parquet", lambda table, path: pq.write_table(table, path, row_group_size=6)),
    "pandas": (".parquet", _pandas),
    "polars": (".parquet", _polars),
    "duckdb": (".parquet", _duckdb),
    "arrow": (".arrow", _arrow),
    "stream": (".arrow", _stream),
    "numpy": (".npy", _numpy),
}
_POLARS = importlib.util.find_spec("polars") is not None  # in no extra: it is asked where it is installed
if not _POLARS:
    del FILES["polars"]
TABLES = ("lance", "deltalake", "iceberg", "datasets")
DESTINATIONS = ("files", "iceberg", "iceberg by id", "iceberg by text", "qdrant")
WRITERS = (*FILES, *TABLES)
_PLACES = {
    "flat": ("part-1{s}", "part-2{s}", "part-10{s}"),
    "nested": ("a/x{s}", "a/b/y{s}", "z{s}"),
    "equal": ("d1/emb{s}", "d2/emb{s}", "d10/emb{s}"),
}


def write_gallery(drawn: Drawn, rows: Rows, folder: Path) -> str:
    """Writes the rows with the drawn library. Returns what names the gallery."""
    if drawn.writer in TABLES:
        return _write_table(drawn, rows, folder)
    suffix, write = FILES[drawn.writer]
    if drawn.layout == "hive":
        for i, value in enumerate(FOLDERS):
            part = [r for r in rows if r["lang"] == value]
            name = "__HIVE_DEFAULT_PARTITION__" if value is None else quote(value, safe="")
            place = folder / f"lang={name}/data-{i}{suffix}"
            place.parent.mkdir(parents=True)
            write(table_of(drawn, part).drop_columns(["lang"]), place)
        return str(folder)
    third = -(-len(rows) // 3)
    for i, name in enumerate(_PLACES[drawn.layout]):
        path = folder / name.format(s=suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(table_of(drawn, rows[third * i : third * (i + 1)]), path)
    return str(folder)


def append_file(drawn: Drawn, rows: Rows, folder: Path) -> None:
    suffix, write = FILES[drawn.writer]
    write(table_of(drawn, rows), folder / f"part-99{suffix}")


def _write_table(drawn: Drawn, rows: Rows, folder: Path) -> str:
    """A table that had two rows more, the last of which were deleted, or a dataset with a cache beside its rows."""
    half, gone = len(rows) // 2, drawn.fault == "deleted rows"
    more = table_of(drawn, rows[:2])
    first, second = table_of(drawn, rows[:half]), table_of(drawn, rows[half:])
    if drawn.writer == "datasets":
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset(table_of(drawn, rows)).save_to_disk(str(folder), num_shards=2)
        if gone:
            shutil.copy(next(folder.glob("data-*.arrow")), folder / "cache-1234567890abcdef.arrow")
        return str(folder)
    extra = more.append_column("gone", pa.array([1, 1], pa.int64())) if gone else None
    if gone:
        first, second = (t.append_column("gone", pa.array([0] * len(t), pa.int64())) for t in (first, second))
    if drawn.writer == "lance":
        import lance

        place = str(folder / "d.lance")
        lance.write_dataset(first, place, max_rows_per_file=9)
        made = lance.write_dataset(second, place, mode="append")
        if extra is not None:
            lance.write_dataset(extra, place, mode="append").delete("gone = 1")
        del made
        return place
    if drawn.writer == "iceberg":
        return _write_iceberg(drawn, first, second, extra, folder)
    from deltalake import DeltaTable, write_deltalake

    by: dict[str, Any] = {"partition_by": ["lang"]} if drawn.layout == "hive" else {}
    write_deltalake(str(folder), first, **by)
    write_deltalake(str(folder), second, mode="append", **by)
    if extra is not None:
        write_deltalake(str(folder), extra, mode="append", **by)
        DeltaTable(str(folder)).delete("gone = 1")
    return str(folder)


def catalog_of(folder: Path) -> dict[str, str]:
    """Properties of a catalog in SQLite."""
    return {"type": "sql", "uri": f"sqlite:///{folder}/catalog.db", "warehouse": f"file://{folder}/lake"}


def _write_iceberg(drawn: Drawn, first: pa.Table, second: pa.Table, extra: pa.Table | None, folder: Path) -> str:
    from pyiceberg.catalog.sql import SqlCatalog

    catalog = SqlCatalog("c", **catalog_of(folder))
    catalog.create_namespace("n")
    made = catalog.create_table("n.t", schema=first.schema)
    if drawn.layout == "hive":
        with made.update_spec() as spec:
            spec.add_identity("lang")
    for table in (first, second) if extra is None else (first, extra, second):
        made.append(table)
    if extra is not None:
        made.delete("gone = 1")
    return str(made.location()).removeprefix("file://")


def partitioned_table(drawn: Drawn, rows: Rows, folder: Path) -> None:
    """The table ``n.new`` that rows are to be appended to, partitioned as drawn."""
    from pyiceberg.catalog.sql import SqlCatalog
    from pyiceberg.transforms import BucketTransform, TruncateTransform

    catalog = SqlCatalog("c", **catalog_of(folder))
    catalog.create_namespace("n")
    table = table_of(drawn, rows)
    if drawn.layout == "hive" and "lang" not in table.schema.names:
        table = table.append_column("lang", pa.array([r["lang"] for r in rows]))
    if drawn.fault == "deleted rows" and drawn.writer in ("lance", "deltalake", "iceberg"):
        table = table.append_column("gone", pa.array([0] * len(table), pa.int64()))  # as its rows were told apart
    table = table.drop_columns([name for name in ("side",) if name in table.schema.names])
    made = catalog.create_table("n.new", schema=table.schema)
    with made.update_spec() as spec:
        if drawn.to == "iceberg by id":
            spec.add_field(IDS[drawn.ids][0], BucketTransform(3), "p")
        else:
            spec.add_field("note", TruncateTransform(6), "p")


# ---- reading ----
def _read_pandas(files: list[str]) -> pa.Table:
    import pandas as pd

    frames = [pd.read_parquet(f, dtype_backend="pyarrow", partitioning=None) for f in files]
    return pa.Table.from_pandas(pd.concat(frames, ignore_index=True), preserve_index=False)


def _read_polars(files: list[str]) -> pa.Table:
    import polars as pl

    return pl.read_parquet(files, hive_partitioning=False).to_arrow()


def _read_duckdb(files: list[str]) -> pa.Table:
    import duckdb

    with duckdb.connect() as connection:
        return connection.read_parquet(files, hive_partitioning=False).to_arrow_table()


READERS: dict[str, Callable[[list[str]], pa.Table]] = {
    "pandas": _read_pandas,
    "polars": _read_polars,
    "duckdb": _read_duckdb,
    "pyarrow": lambda files: ds.dataset(files, format="parquet").to_table(),
}


if not _POLARS:
    del READERS["polars"]


def plain_rows(table: pa.Table) -> Rows:
    """Rows as Python has them, whatever library read them: labels decoded, times as microseconds."""
    columns = {name: _plain(table[name].combine_chunks()) for name in table.schema.names}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _plain(column: Any) -> list[Any]:
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) and column.num_chunks == 1 else column
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_timestamp(column.type):
        scale = {"s": 10**6, "ms": 10**3, "us": 1, "ns": 1}[column.type.unit]
        values = [None if v is None else v * scale for v in column.cast(pa.int64()).to_pylist()]
        return [None if v is None else v // 1000 for v in values] if column.type.unit == "ns" else values
    return list(column.to_pylist())
