"""The files that each database imports: Milvus (Parquet), Qdrant (a matrix and JSON lines), pgvector (binary COPY)."""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fct.gallery import copy_binary
from fct.gallery.json_values import json_values, plain_array, text_of_times
from fct.gallery.matrix_files import npy_header
from fct.gallery.vectors import vector_array
from fct.types import Array

__all__ = ["WRITERS", "BulkWriter", "Names"]

_MILVUS_ROWS = 1 << 20


@dataclass(frozen=True, slots=True)
class Names:
    """What the id, the vector and the table are called at the other end."""

    id: str
    vector: str
    table: str


@dataclass
class BulkWriter(ABC):
    """Writes into a folder that nobody sees before it is whole.

    id_kind: "integer", "text" or "uuid". half: vectors as halfvec. files: in order, as they are to be called.
    hollow: floats by column that JSON has no number for.
    """

    folder: Path
    names: Names
    id_kind: str
    half: bool
    files: list[str] = field(default_factory=list)
    hollow: Counter[str] = field(default_factory=Counter)

    @abstractmethod
    def add(self, ids: pa.Array, values: Array, rest: pa.RecordBatch, first: int) -> None:
        """Rows: ids without nulls, (n, d) float32, other columns. first: number of the first row, for messages."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def abandon(self) -> None:
        """Lets go of what is open: the folder is removed."""

    def _new(self, name: str) -> Path:
        self.files.append(name)
        return self.folder / name

    def _require_free(self, names: list[str]) -> None:
        """fct's names never meet the user's."""
        for mine, option in ((self.names.id, "id_field"), (self.names.vector, "vector_field")):
            if mine in names:
                raise ValueError(
                    f"{option}: expected a name that no other column has, the gallery has a column {mine!r} beside its "
                    f"ids and vectors: choose another {option}, or leave that column out with columns"
                )


@dataclass
class Milvus(BulkWriter):
    """``part-….parquet`` of a million rows each."""

    _writer: pq.ParquetWriter | None = None
    _count = 0
    _arrays: dict[str, bool] = field(default_factory=dict)  # by column of lists: whether they are arrays there, or JSON

    def add(self, ids: pa.Array, values: Array, rest: pa.RecordBatch, first: int) -> None:
        self._require_free(rest.schema.names)
        columns = {self.names.id: ids, self.names.vector: vector_array(values, "list")}
        columns |= {n: self._column(c, n, first) for n, c in zip(rest.schema.names, rest.columns, strict=True)}
        table = pa.table(columns)
        if self._writer is None or self._count >= _MILVUS_ROWS:
            if self._writer is not None:
                self._writer.close()
            self._writer = pq.ParquetWriter(self._new(f"part-{len(self.files):05d}.parquet"), table.schema)
            self._count = 0
        self._writer.write_table(table)
        self._count += len(ids)

    def _column(self, column: pa.Array, name: str, first: int) -> pa.Array:
        """In a type that Milvus has: what is no number, text, truth or array of them becomes text, or JSON in text."""
        column = plain_array(column)
        kind, t = column.type, pa.types
        if kind == pa.uint64():
            large = pc.greater(column, pa.scalar(2**63 - 1, pa.uint64()))
            if pc.any(large).as_py():
                raise ValueError(
                    f"payload: column {name!r}: row {first + pc.index(large, True).as_py()} has an integer past 2^63, "
                    "which Milvus has no type for: leave the column out with columns"
                )
        if t.is_unsigned_integer(kind):
            return column.cast({8: pa.int16(), 16: pa.int32(), 32: pa.int64(), 64: pa.int64()}[kind.bit_width])
        if t.is_float16(kind):
            return column.cast(pa.float32())
        if t.is_boolean(kind) or t.is_integer(kind) or t.is_floating(kind) or t.is_string(kind):
            return column
        if t.is_date(kind) or t.is_time(kind) or t.is_timestamp(kind):
            return text_of_times(column, name, first)
        if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
            inner = plain_array(column.flatten())
            simple = t.is_boolean(inner.type) or t.is_signed_integer(inner.type) or t.is_string(inner.type)
            if simple or t.is_float32(inner.type) or t.is_float64(inner.type):
                as_array = self._arrays.setdefault(name, not inner.null_count)  # a file holds one type for all rows
                if as_array and inner.null_count:
                    raise ValueError(
                        f"payload: column {name!r}: rows {first} to {first + len(column) - 1} have a null inside a "
                        "list, which Milvus's arrays do not hold: leave the column out with columns"
                    )
                if as_array:
                    return _list_of(column, inner)
        values = json_values(column, name, first, self.hollow)
        nested = t.is_nested(kind)
        return pa.array([json.dumps(v) if nested and v is not None else v for v in values], pa.string())

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def abandon(self) -> None:
        self.close()


def _list_of(column: pa.Array, inner: pa.Array) -> pa.Array:
    """A list, large_list or fixed_size_list as list<inner's type>. inner: what ``column.flatten()`` holds, plainer."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_list(column.type):
        lengths = np.where(column.is_valid().to_numpy(zero_copy_only=False), lengths, 0)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(ends, inner, mask=column.is_null() if column.null_count else None)


class Qdrant(BulkWriter):
    """``vectors.npy`` and ``payload.jsonl``: row i and line i are one point."""

    _matrix: Any = None
    _lines: Any = None
    _shape = (0, 0)

    def add(self, ids: pa.Array, values: Array, rest: pa.RecordBatch, first: int) -> None:
        if self._matrix is None:
            self._matrix = open(self._new("vectors.npy"), "wb")  # noqa: SIM115 (closed by close and abandon)
            self._lines = open(self._new("payload.jsonl"), "w", encoding="utf-8")  # noqa: SIM115
            self._matrix.write(bytes(128))
        self._shape = (self._shape[0] + len(values), values.shape[1])
        self._matrix.write(np.ascontiguousarray(values).data.cast("B"))
        names = rest.schema.names
        columns = [json_values(c, n, first, self.hollow) for n, c in zip(names, rest.columns, strict=True)]
        payload = zip(*columns, strict=True) if columns else [()] * len(ids)
        for key, row in zip(ids.to_pylist(), payload, strict=True):
            line = {"id": key, "payload": dict(zip(names, row, strict=True))}
            self._lines.write(json.dumps(line, allow_nan=False) + "\n")

    def close(self) -> None:
        self._matrix.seek(0)
        self._matrix.write(npy_header(self._shape, np.dtype(np.float32)))
        self.abandon()

    def abandon(self) -> None:
        for file in (self._matrix, self._lines):
            if file is not None:
                file.close()


class Pgvector(BulkWriter):
    """``rows.bin`` for ``\\copy``, and ``table.sql``, which makes the table and loads it."""

    _file: Any = None
    _sql = ""

    def add(self, ids: pa.Array, values: Array, rest: pa.RecordBatch, first: int) -> None:
        d = values.shape[1]
        names = rest.schema.names
        if self._file is None:
            self._require_free(names)
            if d > 16000:
                raise ValueError(f"gallery: expected at most 16000 dimensions for pgvector, got {d}")
            types = [copy_binary.column_type_of(f.type, f.name) for f in rest.schema]
            self._sql = _table_sql(self.names, self.id_kind, "halfvec" if self.half else "vector", d, names, types)
            self._file = open(self._new("rows.bin"), "wb")  # noqa: SIM115
            self._file.write(copy_binary.HEADER)
        vectors = copy_binary.vectors_encoded(values, half=self.half)
        if self.half and not np.isfinite(vectors["v"]).all():
            row = first + int(np.flatnonzero(~np.isfinite(vectors["v"]).all(axis=1))[0])
            raise ValueError(f"halfvec: row {row} has values past 65,504, which halfvec cannot hold: export as vector")
        payload = [copy_binary.encoded(c, n, first, self.hollow) for n, c in zip(names, rest.columns, strict=True)]
        self._file.write(copy_binary.rows_of_fields(self._keys(ids), vectors, payload))

    def _keys(self, ids: pa.Array) -> list[bytes]:
        if self.id_kind == "integer":
            raw = ids.to_numpy(zero_copy_only=False).astype(">i8").tobytes()
            return [raw[i : i + 8] for i in range(0, len(raw), 8)]
        if self.id_kind == "uuid":
            return [uuid.UUID(value).bytes for value in ids.to_pylist()]
        return [value.encode() for value in ids.to_pylist()]

    def close(self) -> None:
        self._file.write(copy_binary.END)
        self._file.close()
        self._new("table.sql").write_text(self._sql, encoding="utf-8")

    def abandon(self) -> None:
        if self._file is not None:
            self._file.close()


def _table_sql(names: Names, id_kind: str, vector: str, d: int, payload: list[str], types: list[str]) -> str:
    def quoted(name: str) -> str:
        if not name.isprintable() or not name or len(name.encode()) > 63:
            raise ValueError(f"columns: expected printable names of 1 to 63 bytes for PostgreSQL, got {name!r}")
        return '"' + name.replace('"', '""') + '"'

    everything = [names.id, names.vector, *payload]
    if len(set(everything)) < len(everything):
        raise ValueError("columns: expected each name once")
    kinds = [
        f"{ {'integer': 'bigint', 'text': 'text', 'uuid': 'uuid'}[id_kind] } PRIMARY KEY",
        f"{vector}({d}) NOT NULL",
    ]
    lines = [f"  {quoted(n)} {kind}" for n, kind in zip(everything, [*kinds, *types], strict=True)]
    columns = ", ".join(map(quoted, everything))
    return (
        "-- psql -d DATABASE -v ON_ERROR_STOP=1 -f table.sql   (in the folder of rows.bin)\n"
        "CREATE EXTENSION IF NOT EXISTS vector;\n"
        f"CREATE TABLE {quoted(names.table)} (\n" + ",\n".join(lines) + "\n);\n"
        f"\\copy {quoted(names.table)} ({columns}) FROM 'rows.bin' WITH (FORMAT binary)\n"
        "-- The index comes last, over whole data, with the operator class of your metric:\n"
        f"-- CREATE INDEX ON {quoted(names.table)} USING hnsw ({quoted(names.vector)} {vector}_l2_ops);\n"
    )


WRITERS: dict[str, type[BulkWriter]] = {"milvus": Milvus, "qdrant": Qdrant, "pgvector": Pgvector}
