"""Bulk-import files of vector databases: Milvus (Parquet), Qdrant (a matrix and JSON lines), pgvector (binary COPY)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fct.atomic_files import refuse_existing
from fct.checks import check_choice, check_text
from fct.gallery.interfaces import VECTOR_KEY, Piece, Source
from fct.gallery.location import Location, Patience
from fct.gallery.matrix_files import ROW, BinSource, NpySource, npy_header
from fct.gallery.stores import open_source
from fct.gallery.vectors import vector_array, vector_block

__all__ = ["BULK_FORMATS", "export_bulk"]

BULK_FORMATS = ("milvus", "qdrant", "pgvector")
_BATCH = 16384
_MILVUS_ROWS = 1 << 20


def export_bulk(
    gallery: Any,
    out: str | os.PathLike[str],
    to: str,
    *,
    id_column: str = "auto",
    filesystem: Any = None,
    storage_options: Mapping[str, Any] | None = None,
    retries: int = 6,
    timeout: float = 60.0,
) -> list[Path]:
    """Writes a gallery as the files that a database imports in bulk; ids must be integers or strings (see below).

    Args:
        gallery: a gallery of files, as :func:`fct.gallery.open_source` takes it. out: an empty folder.
        to: "milvus": ``*.parquet`` with id, vector (list<float>) and the other columns, a million rows a file, for
            ``utility.do_bulk_insert``; "qdrant": ``vectors.npy`` and ``payload.jsonl`` (id and payload of row i in line
            i), for ``QdrantClient.upload_collection(vectors=numpy.load(..., mmap_mode="r"))``; "pgvector": ``rows.bin``
            with (id bigint, embedding vector), for ``COPY items (id, embedding) FROM ... WITH (FORMAT binary)``.
        id_column: which column is the id; "auto": ``id`` or ``row``, else the row number. What a backfill to ``.npy``
            or ``.fbin`` put into ``_rows/`` counts as columns, and rows keep their numbers where others were rejected.
        filesystem, storage_options, retries, timeout: of the gallery, as :func:`fct.plan_backfill` has them.

    Returns:
        The files.

    Example:
        >>> import numpy as np, tempfile
        >>> from fct.gallery import export_bulk
        >>> folder = tempfile.mkdtemp()
        >>> np.save(folder + "/a.npy", np.zeros((3, 8), np.float32))
        >>> [f.name for f in export_bulk(folder, folder + "/out", "pgvector")]
        ['rows.bin']
    """
    check_choice(to, "to", BULK_FORMATS)
    check_text(id_column, "id_column", "the name of a column")
    source = open_source(
        gallery,
        filesystem=filesystem,
        storage_options=storage_options,
        patience=Patience(retries, timeout),
        name="gallery",
    )
    pieces = source.pieces()
    beside = _Beside(source, pieces)
    names = source.schema.names + beside.names
    vector = (source.schema.metadata or {}).get(VECTOR_KEY, b"vector").decode()
    if vector not in names:
        raise ValueError(
            f"gallery: expected one that fct wrote, which says where its vectors are, or a column {vector!r}, got "
            f"{', '.join(names)}"
        )
    if id_column == "auto":
        id_column = next((n for n in ("id", ROW) if n in names), "")
    elif id_column not in names:
        raise ValueError(f"id_column: expected one of {', '.join(names)}, got {id_column!r}")
    folder = refuse_existing(out, overwrite=None, name="out")
    folder.mkdir(parents=True, exist_ok=True)

    def rows() -> Iterator[tuple[Any, Any, pa.RecordBatch]]:
        """(ids, (n, d) float32, the other columns)"""
        for piece, first in zip(pieces, beside.first, strict=True):
            at, more = 0, beside.table(piece)
            for batch in source.read(piece, 0, piece.rows, _BATCH):
                column = batch.column(vector)
                numbers = pa.array(np.arange(first + at, first + at + batch.num_rows))
                for name in beside.names:  # a shard without rejected rows has no file for its numbers
                    part = numbers if more is None else more[name].slice(at, batch.num_rows).combine_chunks()
                    batch = batch.append_column(name, part)
                at += batch.num_rows
                d = source.space.dim if source.space else None
                values = vector_block(column, d or _dim(column)).values.astype(np.float32, copy=False)
                ids = batch.column(id_column) if id_column else numbers
                yield ids, values, batch.drop_columns([n for n in (vector, id_column) if n])

    return {"milvus": _milvus, "qdrant": _qdrant, "pgvector": _pgvector}[to](folder, rows())


class _Beside:
    """What a backfill to bare matrices left beside them: the other columns, or the numbers of the rows that are there.

    first: the number in the old gallery of each piece's first row.
    """

    def __init__(self, source: Source, pieces: Sequence[Piece]) -> None:
        self._files: dict[str, Location] = {}
        self.names: list[str] = []
        self.first = [0, *np.cumsum([p.rows for p in pieces])[:-1].tolist()]
        if not isinstance(source, (NpySource, BinSource)) or not (source.where / "_fct/manifest.json").exists():
            return
        root = source.where
        there = set((root / "_rows").files())
        first = 0
        for i, piece in enumerate(pieces):
            stem = piece.name.rpartition(".")[0]
            if f"{stem}.parquet" in there:
                self._files[piece.name] = root / f"_rows/{stem}.parquet"
            # The marker says how many rows the shard had before some were rejected.
            marker = json.loads((root / f"_fct/done/{int(stem.rpartition('-')[2]):08d}.json").read_bytes())
            self.first[i], first = first, first + int(json.loads(marker["marker"])["rows_in"])
        if self._files:
            with next(iter(self._files.values())).open() as file:
                self.names = pq.read_schema(file).names

    def table(self, piece: Piece) -> pa.Table | None:
        if piece.name not in self._files:
            return None
        with self._files[piece.name].open() as file:
            return pq.read_table(file)


def _dim(column: pa.Array) -> int:
    from fct.gallery.vectors import vector_dim

    d = vector_dim(column)
    if d is None:
        raise ValueError("gallery: expected vectors, got nulls only")
    return d


def _milvus(folder: Path, rows: Iterator[Any]) -> list[Path]:
    files: list[Path] = []
    writer: pq.ParquetWriter | None = None
    count = 0
    try:
        for ids, values, rest in rows:
            columns = {"id": ids, "vector": vector_array(values, "list")} | dict(
                zip(rest.schema.names, rest.columns, strict=True)
            )
            table = pa.table(columns)
            if writer is None or count >= _MILVUS_ROWS:
                if writer is not None:
                    writer.close()
                files.append(folder / f"part-{len(files):05d}.parquet")
                writer, count = pq.ParquetWriter(files[-1], table.schema), 0
            writer.write_table(table)
            count += len(ids)
    finally:
        if writer is not None:
            writer.close()
    return files


def _qdrant(folder: Path, rows: Iterator[Any]) -> list[Path]:
    vectors, payload = folder / "vectors.npy", folder / "payload.jsonl"
    n, d = 0, 0
    with open(vectors, "wb") as matrix, open(payload, "w") as lines:
        matrix.write(bytes(128))
        for ids, values, rest in rows:
            n, d = n + len(values), values.shape[1]
            matrix.write(np.ascontiguousarray(values).data.cast("B"))
            for key, row in zip(ids.to_pylist(), rest.to_pylist() or [{}] * len(ids), strict=True):
                lines.write(json.dumps({"id": key, "payload": row}, default=str) + "\n")
        matrix.seek(0)
        matrix.write(npy_header((n, d), np.dtype(np.float32)))
    return [vectors, payload]


def _pgvector(folder: Path, rows: Iterator[Any]) -> list[Path]:
    """PostgreSQL's binary COPY; a vector is int16 dim, int16 0 and big-endian float4s (pgvector's vector_send)."""
    file = folder / "rows.bin"
    with open(file, "wb") as out:
        out.write(b"PGCOPY\n\xff\r\n\x00" + bytes(8))
        for ids, values, _ in rows:
            if not pa.types.is_integer(ids.type):
                raise ValueError(f"id_column: expected integers for pgvector's bigint, got {ids.type}")
            d = values.shape[1]
            if d > 16000:
                raise ValueError(f"gallery: expected at most 16000 dimensions for pgvector, got {d}")
            record = np.zeros(
                len(values),
                [("fields", ">i2"), ("id_size", ">i4"), ("id", ">i8"), ("size", ">i4"), ("dim", ">i2"), ("zero", ">i2")]
                + [("v", ">f4", (d,))],
            )
            record["fields"], record["id_size"], record["size"], record["dim"] = 2, 8, 4 + 4 * d, d
            record["id"], record["v"] = ids.to_numpy(), values
            out.write(record.tobytes())
        out.write(b"\xff\xff")
    return [file]
