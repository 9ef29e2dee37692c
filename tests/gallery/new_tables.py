"""New tables of Delta and Iceberg, the galleries that go into them, and what their own libraries say of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct

__all__ = [
    "COLUMNS",
    "D_NEW",
    "D_OLD",
    "QUICK",
    "ROWS",
    "Delta",
    "Iceberg",
    "Killed",
    "dies",
    "gallery",
    "made",
    "plain",
    "same",
    "vectors",
]

deltalake = pytest.importorskip("deltalake")
sql = pytest.importorskip("pyiceberg.catalog.sql", exc_type=ImportError)

D_OLD, D_NEW, ROWS = 8, 6, 1000
QUICK: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 100, "precision": "fp32"}


def gallery(where: Path, n: int = ROWS, *, first: int = 0, bad: tuple[int, ...] = (3, 555), **more: Any) -> Path:
    where.mkdir(exist_ok=True)
    values = np.random.default_rng(first).standard_normal((n, D_OLD), dtype=np.float32)
    values[[b for b in bad if b < n], 1] = np.nan
    table = pa.table(
        {
            "id": np.arange(first, first + n),
            "title": pa.array([None if i % 7 == 0 else f"item {i} ü" for i in range(n)]),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), D_OLD),
            **more,
        }
    )
    pq.write_table(table, where / f"part-{first}.parquet", row_group_size=100)
    return where


class Delta:
    """A Delta table in a folder, and what its own library says of it."""

    title = "delta"

    def __init__(self, folder: Path) -> None:
        self.where = folder / "new"
        self.to, self.how = f"delta://{self.where}", dict[str, Any]()

    def commits(self) -> int:
        return int(deltalake.DeltaTable(str(self.where)).version()) + 1

    def rows(self) -> pa.Table:
        return pa.table(deltalake.QueryBuilder().register("t", deltalake.DeltaTable(str(self.where))).execute(
            "select * from t order by id").read_all())  # fmt: skip

    def files(self) -> list[str]:
        return list(deltalake.DeltaTable(str(self.where)).file_uris())

    def properties(self) -> dict[str, str]:
        return dict(next(f.metadata for f in deltalake.DeltaTable(str(self.where)).schema().fields if f.metadata))

    def empty(self) -> bool:
        return not (self.where / "_delta_log").exists()


class Iceberg:
    """A table of a catalog in SQLite."""

    title = "iceberg"

    def __init__(self, folder: Path) -> None:
        (folder / "lake").mkdir()
        self.where = folder / "lake/shop/items"
        lake = folder / "lake"
        self.store = {"type": "sql", "uri": f"sqlite:///{lake / 'catalog.db'}", "warehouse": str(lake)}
        self.to = "iceberg://prod/shop.items"
        self.how: dict[str, Any] = {"storage_options": self.store}

    def catalog(self) -> Any:
        return sql.SqlCatalog("prod", **self.store)

    def table(self) -> Any:
        return self.catalog().load_table("shop.items")

    def commits(self) -> int:
        return len(self.table().snapshots())

    def rows(self) -> pa.Table:
        return self.table().scan().to_arrow().sort_by("id")

    def files(self) -> list[str]:
        return [task.file.file_path.removeprefix("file://") for task in self.table().scan().plan_files()]

    def properties(self) -> dict[str, str]:
        return dict(self.table().properties)

    def empty(self) -> bool:
        return not self.catalog().table_exists("shop.items") or not self.table().snapshots()


def plain(source: Path, h: fct.Transformation, **more: Any) -> pa.Table:
    """The same rows as plain Parquet."""
    where = source.parent / "plain"
    fct.backfill(source, where, h, format="parquet", **QUICK, **more)
    return pq.read_table(where).sort_by("id")


def vectors(table: pa.Table) -> Any:
    return np.array(table["embedding"].to_pylist(), np.float32)


def same(got: pa.Table, want: pa.Table) -> None:
    assert got["id"].to_pylist() == want["id"].to_pylist()
    assert got["title"].to_pylist() == want["title"].to_pylist()
    assert vectors(got).tobytes() == vectors(want).tobytes()


class Killed(BaseException):
    """Where the process ends."""


def dies(how: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """The function, and the process ends before it or after it."""

    def dying(*args: Any, **more: Any) -> Any:
        if how == "after":
            real(*args, **more)
        raise Killed

    return dying


def made(new: Iceberg, schema: pa.Schema, **properties: str) -> Any:
    catalog = new.catalog()
    catalog.create_namespace_if_not_exists("shop")
    return catalog.create_table("shop.items", schema=schema, properties=properties)


COLUMNS = pa.schema([("id", pa.int64()), ("title", pa.string()), ("embedding", pa.list_(pa.float32()))])
