"""Bulk-import files of vector databases: Milvus (Parquet), Qdrant (a matrix and JSON lines), pgvector (binary COPY)."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from typing_extensions import Unpack

from fct.atomic_files import refuse_existing
from fct.checks import check_choice
from fct.errors import FctError, FctWarning
from fct.gallery.beside_rows import BesideRows
from fct.gallery.bulk_files import WRITERS, BulkWriter, Names
from fct.gallery.columns import pick_column, pick_id_column
from fct.gallery.export_ids import RULES, IdCheck, id_kind
from fct.gallery.interfaces import VECTOR_KEY, Piece, Source, rows_at_once
from fct.gallery.json_values import lost_numbers
from fct.gallery.matrix_files import ROW
from fct.gallery.mixed_rows import warn_of_mixed
from fct.gallery.stores import open_source, opening
from fct.gallery.vectors import vector_block, vector_dim
from fct.options.declare import takes
from fct.options.groups import ExportOptions
from fct.options.keywords import ExportKeywords
from fct.progress import LongCall, Report
from fct.types import Array, GalleryLike

__all__ = ["BULK_FORMATS", "export_bulk"]

BULK_FORMATS = tuple(WRITERS)
_BATCH = 16384
_VECTOR_NAMES = ("vector", "embedding", "emb", "features", "new", "old")


@takes(ExportOptions)
def export_bulk(
    gallery: GalleryLike, out: str | os.PathLike[str], to: str, **options: Unpack[ExportKeywords]
) -> list[Path]:
    """Writes a gallery as the files that a database imports in bulk. docs/export.md shows what loads them.

    All of it is there at the end, or nothing: files grow in a hidden folder beside ``out``, which gets its name last.

    Args:
        gallery: a gallery, as :func:`fct.gallery.open_source` takes it. out: a folder that is empty or not there.
        to: "milvus": ``part-….parquet`` with id, vector (list<float>) and the other columns, a million rows a file;
            "qdrant": ``vectors.npy`` and ``payload.jsonl``, whose line i is ``{"id": ..., "payload": {...}}`` of row i;
            "pgvector": ``rows.bin`` for binary ``\\copy`` and ``table.sql``, which makes the table and loads it.
        id_column: which column is the id; "auto": the one that a backfill takes (``id``, ``_id``, ``pk``, ``key`` or
            ``uid``), else the row's number in the old gallery; "": that number whatever columns there are. Milvus takes
            integers of 64 bits and text, Qdrant unsigned integers and UUIDs, pgvector integers, text and UUIDs.
        vector_column: as :func:`fct.plan_backfill` has it.
        columns: the payload columns that go along; None for all, () for none. What ``.npy`` and ``.fbin`` galleries
            keep in ``_rows/`` counts as columns.
        id_field, vector_field: their names at the other end (Milvus, pgvector), which no payload column may have;
            "auto": ``vector`` for Milvus and Qdrant, ``embedding`` for pgvector. table: pgvector's, in ``table.sql``.
        halfvec: for pgvector, vectors of float16.

    Returns:
        The files.

    Raises:
        ValueError: ids that the database cannot take (null, twice, negative, no UUID, past 2^63, another type), a row
            without a vector, a payload that the files cannot hold; the message names column and row, and nothing is
            left.
        FileExistsError: ``out`` holds something.

    Warns:
        FctWarning: true and mapped rows of a partial backfill stand side by side uncorrected, with the loss that was
        measured when h was fitted. NaN or infinities in a payload became null, since JSON has neither: counted.

    Examples:
        >>> import numpy as np, tempfile
        >>> from fct.gallery import export_bulk
        >>> folder = tempfile.mkdtemp()
        >>> np.save(folder + "/a.npy", np.zeros((3, 8), np.float32))
        >>> [f.name for f in export_bulk(folder, folder + "/out", "pgvector")]
        ['rows.bin', 'table.sql']
    """
    given = ExportOptions.split(options)
    check_choice(to, "to", BULK_FORMATS)
    files = given.files
    vectors = ("embedding" if to == "pgvector" else "vector") if files.vector_field == "auto" else files.vector_field
    names = Names(files.id_field, vectors, files.table)
    if files.halfvec and to != "pgvector":
        raise ValueError(f"halfvec: expected False for {to}: it is a type of pgvector")
    if names.id == names.vector:
        raise ValueError(f"vector_field: expected another name than id_field, got {names.vector!r} twice")
    source = open_source(gallery, **opening(given.access), name="gallery")
    target = refuse_existing(out, overwrite=None, name="out", folder=True)
    rows = _Rows.of(source, files.vector_column, files.id_column, files.columns)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _beside(target) as folder, LongCall(files.progress) as call:
        check = IdCheck(RULES[to], rows.id_column or ROW, rows.id_type, folder)
        writer = WRITERS[to](folder, names, id_kind(rows.id_type), files.halfvec)
        try:
            _fill(writer, rows, check, call.stage("exporting"))
        except BaseException:
            writer.abandon()
            raise
        if rows.id_column:
            check.close(rows.ids)
        _publish(folder, target)
    warn_of_mixed(source, "export")
    for line in lost_numbers(writer.hollow):
        warnings.warn(line, FctWarning, stacklevel=2)
    return [target / name for name in writer.files]


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target``, gone at the end whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> None:
    """The whole folder under its name, once its files are on the disk."""
    for file in folder.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    os.replace(folder, target)  # over an empty folder, too


def _fill(writer: BulkWriter, rows: _Rows, check: IdCheck, report: Report | None) -> None:
    done = 0
    for ids, values, rest in rows:
        writer.add(check(ids, done), values, rest, done)
        done += len(values)
        if report is not None:
            report(done / rows.total)
    if not done:
        raise ValueError("gallery: expected at least one row, it has none")
    writer.close()


@dataclass
class _Rows:
    """A gallery's rows as (ids, (n, d) float32, other columns), row by row the same items.

    id_column: "" for the rows' numbers. payload: the other columns' names, in order.
    """

    source: Source
    pieces: Sequence[Piece]
    beside: BesideRows
    vector: str
    id_column: str
    id_type: pa.DataType
    payload: list[str]

    @classmethod
    def of(cls, source: Source, vector_column: str, id_column: str, columns: Sequence[str] | None) -> _Rows:
        pieces = source.pieces()
        beside = BesideRows(source, pieces)
        schema = source.schema
        for entry in beside.schema:
            schema = schema.append(entry)
        double = sorted({n for n in schema.names if schema.names.count(n) > 1})
        if double:
            raise ValueError(f"gallery: expected each column once, got {', '.join(map(repr, double))} twice")
        _require_new(source, vector_column)
        vector = pick_column(source.schema, vector_column, _VECTOR_NAMES, "vector_column")
        ids = pick_id_column(schema, id_column)
        if not ids and id_column == "auto" and ROW in schema.names:
            ids = ROW
        others = [n for n in schema.names if n not in (vector, ids)]
        if columns is not None:
            unknown = [n for n in columns if n not in others]
            if isinstance(columns, str) or unknown:
                raise ValueError(f"columns: expected some of {', '.join(others)}, got {unknown or columns!r}")
            others = [n for n in others if n in columns]
        elif not ids and ROW in others:
            others.remove(ROW)
        kind = schema.field(ids).type if ids else pa.int64()
        return cls(source, pieces, beside, vector, ids, kind, others)

    @property
    def total(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    def __iter__(self) -> Iterator[tuple[pa.Array, Array, pa.RecordBatch]]:
        d = self.source.space.dim if self.source.space else None
        done = 0
        for batch, numbers in self._batches():
            self._require_sound(batch, done)
            column = batch.column(self.vector)
            d = d or vector_dim(column)
            if d is None:
                raise ValueError(f"gallery: row {done} has no vector: null, in {self.source.url}")
            held = vector_dim(column) or d
            if held != d and self.source.space is not None:
                raise ValueError(
                    f"gallery: {self.source.url} says that it holds vectors of {self.source.space}, its column "
                    f"{self.vector!r} holds {held}-d ones: its _fct/space.json may be damaged; run the backfill again"
                )
            block = vector_block(column, d)
            if block.bad:  # a row left out here would shift those behind it
                row, why = min(block.bad.items())
                more = f" (and {len(block.bad) - 1} more)" if len(block.bad) > 1 else ""
                raise ValueError(
                    f"gallery: row {done + row} has no vector: {why}{more}, in {self.source.url}; take such rows out "
                    "before"
                )
            values = block.values.astype(np.float32, copy=False)
            wild = ~np.isfinite(values).all(axis=1)
            if wild.any():
                raise ValueError(
                    f"gallery: row {done + int(wild.argmax())} has no vector: NaN or infinity, in {self.source.url}"
                )
            ids = batch.column(self.id_column) if self.id_column else numbers
            yield ids, values, batch.select(self.payload)
            done += batch.num_rows

    def _require_sound(self, batch: pa.RecordBatch, first: int) -> None:
        """Text that is no UTF-8 reads without an error, and would fail in the middle of a file's writing."""
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            raise FctError(
                f"gallery: rows {first} to {first + batch.num_rows - 1} of {self.source.url} are damaged: {error}; run "
                "the backfill again"
            ) from error

    def ids(self) -> Iterator[pa.Array]:
        for batch, _ in self._batches():
            yield batch.column(self.id_column)

    def _batches(self) -> Iterator[tuple[pa.RecordBatch, pa.Array]]:
        """(all columns, the rows' numbers in the old gallery)"""
        for piece, first in zip(self.pieces, self.beside.first, strict=True):
            at, more = 0, self.beside.table(piece)
            for batch in self.source.read(piece, 0, piece.rows, rows_at_once(self.source, piece, _BATCH)):
                numbers = pa.array(np.arange(first + at, first + at + batch.num_rows))
                for entry in self.beside.schema:  # a shard without rejected rows has no file for its numbers
                    part = numbers if more is None else more[entry.name].slice(at, batch.num_rows).combine_chunks()
                    batch = batch.append_column(entry, part)
                at += batch.num_rows
                yield batch, numbers


def _require_new(source: Source, vector_column: str) -> None:
    """An old gallery looks the same: the new one says whose vectors it holds, or its user names the column."""
    marked = VECTOR_KEY in (source.schema.metadata or {})
    if vector_column == "auto" and not marked and source.space is None and "vector" not in source.schema.names:
        raise ValueError(
            "gallery: expected one that fct wrote, which says where its vectors are, a tagged one (see tag_space), "
            f"or a column 'vector', got {', '.join(source.schema.names)}; or name its vector_column"
        )
