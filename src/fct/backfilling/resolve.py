"""From a call's arguments to a job: every store opened, every "auto" settled, and what can never run refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from fct.artifact.transformation import Transformation
from fct.backfilling.coding import JobCoding, code_columns, job_coding
from fct.backfilling.database_job import join_databases
from fct.backfilling.job import ORDERS, Job
from fct.backfilling.journal import Journal
from fct.backfilling.new_location import open_new
from fct.backfilling.pipeline import BATCH_BYTES, RowMapper, ShardPipeline, ShardReader
from fct.backfilling.reembedding import (
    Reembedding,
    TrueRows,
    mixed_correction,
    partial_job,
    reembedding_of,
    writes_mixed,
)
from fct.backfilling.row_choice import kept_choice
from fct.backfilling.side_join import bound_side, join_by_id
from fct.backfilling.true_vectors import TrueVectors
from fct.backfilling.url_parts import UrlParts, url_parts
from fct.checks import check_path, shown
from fct.errors import BackfillError, FctError, SpaceMismatchError
from fct.gallery import Source, open_source
from fct.gallery.arrow_files import ArrowDestination
from fct.gallery.columns import SIDE_NAMES, VECTOR_NAMES, pick_column, pick_id_column
from fct.gallery.databases import DatabaseDestination, DatabaseSource, database_destination, is_database
from fct.gallery.iceberg_catalog import is_iceberg
from fct.gallery.interfaces import Destination, Piece
from fct.gallery.location import DELTA, RetryPolicy
from fct.gallery.saved_dataset import SavedDatasetSource
from fct.gallery.saved_destination import SavedDatasetDestination, saved_info
from fct.gallery.stores import FORMATS, Opening, opening
from fct.gallery.tables import pinned
from fct.gallery.vector_types import plain_type
from fct.gallery.vectors import holds_float64, is_packed_int4, vector_dtype, vector_type
from fct.ops.backend import check_precision
from fct.ops.registry import pick_transform
from fct.options.groups import BackfillOptions, Columns, JobOptions
from fct.terminal import plain_log
from fct.types import GalleryLike, TransformationLike

__all__ = ["Context", "load_transformation", "reads_float64", "require_rows", "resolve"]

_log = plain_log("fct.gallery")
_SHARD_BYTES = 128 << 20
_TABLES = {"delta": "a Delta table", "iceberg": "an Iceberg table"}


@dataclass
class Context:
    """A job and the open stores it is about."""

    job: Job
    source: Source
    side: Source | None
    destination: Destination
    journal: Journal
    h: Transformation
    device: str
    retry_policy: RetryPolicy
    reembedding: Reembedding | None = None

    def mapper(self, job: Job, *, threads: int | None = None) -> RowMapper:
        """What maps the rows of ``job``: this one, or one that was cut, or stored, otherwise."""
        return RowMapper(job, self.source.schema, self.h, threads=threads, device=self.device)

    def reader(self, job: Job) -> ShardReader:
        """What reads the rows of ``job``, a store over a network as patiently as was asked for."""
        return ShardReader(job, self.source, bound_side(self.side, job, self.retry_policy), self.retry_policy)

    def pipeline(self, job: Job, *, threads: int | None, on_rows: Callable[[int], None] | None = None) -> ShardPipeline:
        """What takes the shards of ``job`` from the source to the destination."""
        return ShardPipeline(
            job,
            self.source,
            bound_side(self.side, job, self.retry_policy),
            self.destination,
            self.journal,
            self.h,
            threads=threads,
            device=self.device,
            retry_policy=self.retry_policy,
            on_rows=on_rows,
            true_rows=self.true_rows(job),
        )

    def true_vectors(self) -> TrueVectors:
        """What the journal keeps of the new model's own vectors."""
        return TrueVectors(self.journal, self.job.new_space)

    def true_rows(self, job: Job) -> TrueRows | None:
        """What puts true vectors into the rows of ``job`` that were chosen; None for a whole backfill."""
        if self.reembedding is None:
            return None
        return TrueRows(self.reembedding, kept_choice(self.journal, job), self.journal, job)


def load_transformation(transformation: TransformationLike) -> Transformation:
    if isinstance(transformation, (str, os.PathLike)):
        return Transformation.load(check_path(transformation, "transformation"))
    if not isinstance(transformation, Transformation):
        raise TypeError(
            f"transformation: expected an fct.Transformation or the path of one, got {shown(transformation)}"
        )
    return transformation


def resolve(
    source: GalleryLike,
    destination: GalleryLike | Destination,
    transformation: TransformationLike,
    options: JobOptions,
) -> Context:
    """Opens everything and settles every "auto"; raises for what can never run. See :func:`fct.plan_backfill`."""
    h = load_transformation(transformation)
    correction = mixed_correction(options.partial, h, options.output.mixed)
    check_precision(options.execution.precision, gpu=True)
    stores = _open_stores(source, destination, h, options)
    gallery, access = stores.gallery, opening(options.access)
    coding = job_coding(options.columns, gallery.source.schema, gallery.vector, h.d_old)
    order = options.partial.order if options.partial.reembed is not None else ""
    join_databases(
        gallery.source, gallery.side, stores.writer, gallery.ids, stores.journal, options.database.journal,
        needed=(gallery.vector, gallery.side_column, *code_columns(coding), "" if order in ORDERS else order),
        rate=options.database.max_rows_per_s, switch=options.database.switch_alias,
    )  # fmt: skip
    pieces = tuple(gallery.source.pieces())
    h = writes_mixed(correction, h, sum(piece.rows for piece in pieces), stores.journal.job())
    by_url = isinstance(stores.writer, DatabaseDestination) or is_iceberg(destination)  # others: by their journal
    urls = (source, options.columns.side_source, destination if by_url else None)
    parts = url_parts(urls, access["storage_options"], stores.begun)
    job = _job(stores, pieces, h, options, coding, parts)
    _require_rows(job)
    how = reembedding_of(options.partial, h, gallery.source.schema, gallery.vector, gallery.ids, access)
    return Context(
        partial_job(job, how), gallery.source, gallery.side, stores.writer, stores.journal, h,
        options.execution.device, access["retry_policy"], how,
    )  # fmt: skip


def _job(
    stores: _Stores,
    pieces: tuple[Piece, ...],
    h: Transformation,
    options: JobOptions,
    coding: JobCoding,
    parts: UrlParts,
) -> Job:
    """The job as the options say, every "auto" settled by what the stores hold."""
    gallery, writer, journal = stores.gallery, stores.writer, stores.journal
    backend, precision = _pick(h, options, journal.job())
    dtype, vector_format = _row_of(gallery, stores.form, options)
    width = 4 * (h.d_old + (h.d_side if h.uses_side_info else 0) + h.d_new)
    batch_width = width
    if reads_float64(gallery.source, gallery.vector, gallery.side_column, gallery.side, gallery.side_vector):
        batch_width *= 4  # decoded into new memory, twice as much; small batches are still cached when they are rounded
    return Job(
        source=gallery.source.url,
        destination=writer.url if isinstance(writer, DatabaseDestination) else str(journal.destination),
        format=stores.form,
        pieces=pieces,
        vector=gallery.vector,
        id_column=gallery.ids,
        side=gallery.side.url if gallery.side else "",
        side_pieces=tuple(gallery.side.pieces()) if gallery.side else (),
        side_vector=gallery.side_vector,
        side_column=gallery.side_column,
        side_join=options.columns.side_join,
        saved_dataset=isinstance(writer, SavedDatasetDestination),
        keep_side=options.output.keep_side_info,
        transformation=h.fingerprint,
        old_space=h.old_space,
        new_space=h.new_space,
        precision=precision,
        backend=backend,
        dtype=dtype,
        vector_format=vector_format,
        binary_dtype=options.columns.binary_dtype,
        **coding,
        **parts,
        shard_rows=options.cut.shard_rows or max(1024, 1 << int(np.log2(_SHARD_BYTES / width))),
        batch_rows=options.cut.batch_rows or max(256, 1 << int(np.log2(BATCH_BYTES / batch_width))),
    )


def reads_float64(source: Source, vector: str, side_column: str, side: Source | None, side_vector: str) -> bool:
    """Whether vectors or side-information are rounded to float32 as they are read."""
    return holds_float64(source.schema, (vector, side_column)) or (
        side is not None and holds_float64(side.schema, (side_vector,))
    )


def _pinned(
    location: GalleryLike, gallery: _OldGallery, stored: Job | None, h: Transformation, options: JobOptions
) -> _OldGallery:
    """A backfill of a table goes on at the version that its journal names, whatever was committed since."""
    follows = isinstance(options, BackfillOptions) and options.running.follow
    again = None if stored is None or follows else pinned(location, gallery.source, stored.source)
    if stored is None or again is None:
        return gallery
    _log.warning(
        "source: %s is there, this backfill was begun with %s and goes on with that; map what was added with --follow, "
        "or begin anew in another destination", gallery.source.url, stored.source,
    )  # fmt: skip
    return _open_gallery(again, h, options.columns, opening(options.access))


def require_rows(rows: int, expected: int | None) -> None:
    """Raises BackfillError unless the source has the number of rows that its owner's table has."""
    if expected is not None and rows != expected:
        raise BackfillError(
            f"expect_rows: expected {expected:,} rows, the source has {rows:,}: its writer may have stopped early, or "
            "run twice"
        )


@dataclass(frozen=True)
class _OldGallery:
    """The old gallery, opened, and its columns: "" where there is none."""

    source: Source
    vector: str
    ids: str
    side: Source | None
    side_vector: str
    side_column: str


@dataclass(frozen=True)
class _Stores:
    """The old gallery and where the new one goes, opened. begun: the job that the journal held, if any."""

    gallery: _OldGallery
    form: str
    writer: Destination
    journal: Journal
    begun: Job | None


def _open_stores(
    source: GalleryLike, destination: GalleryLike | Destination, h: Transformation, options: JobOptions
) -> _Stores:
    access = opening(options.access)
    gallery = _open_gallery(source, h, options.columns, access)
    form = _format_of(destination, gallery.source, options.cut.format)
    writer, journal = open_new(destination, form, (gallery.source, gallery.side), options.database, access)
    begun, old = journal.job(), gallery.source
    saved = options.cut.format == "auto" and (begun is None or begun.saved_dataset)
    if saved and isinstance(old, SavedDatasetSource) and isinstance(writer, ArrowDestination):
        writer = SavedDatasetDestination(writer.location, saved_info(old.location))
    return _Stores(_pinned(source, gallery, begun, h, options), form, writer, journal, begun)


def _open_gallery(location: GalleryLike, h: Transformation, columns: Columns, access: Opening) -> _OldGallery:
    source = open_source(location, **access)
    if isinstance(source, DatabaseSource) and columns.side_column == "auto":
        columns = replace(columns, side_column=source.address.options.get("side", "auto"))
    _require_names(source, "source")
    vector = pick_column(source.schema, columns.vector_column, VECTOR_NAMES, "vector_column")
    _require_space(source, h, columns.old_model)
    side, side_vector, side_column = _open_side(source, vector, h, columns, access)
    _require_dims(source, vector, side, side_vector or side_column, h, columns.binary_dtype)
    ids = _pick_ids(source, columns.id_column)
    if columns.side_join == "id" and side is not None:
        side = join_by_id(source, side, ids, side_vector)
    return _OldGallery(source, vector, ids, side, side_vector, side_column)


def _pick_ids(source: Source, wanted: str) -> str:
    if wanted == "auto" and isinstance(source, DatabaseSource):
        return source.id_column if source.id_column in source.schema.names else ""
    return pick_id_column(source.schema, wanted)


def _open_side(
    source: Source, vector: str, h: Transformation, columns: Columns, access: Opening
) -> tuple[Source | None, str, str]:
    """(the gallery of the side-information, its column, the column of the source): one of the two columns, or none."""
    if columns.side_join == "id" and columns.side_source is None:
        raise ValueError(
            "side_join: expected a gallery of side-information (side_source) with side_join='id', got none"
        )
    if not h.uses_side_info:
        if columns.side_source is not None or columns.side_column != "auto":
            raise ValueError(
                "side_source: expected none, since this transformation was fitted without side-information"
            )
        return None, "", ""
    if columns.side_source is not None:
        side = open_source(columns.side_source, **access, name="side_source")
        _require_names(side, "side_source")
        column = pick_column(side.schema, "auto", VECTOR_NAMES + SIDE_NAMES, "side_column")
        if side.space is not None and side.space.model_id != h.side_model:
            raise SpaceMismatchError(f"side_source: expected vectors of {h.side_model!r}, got vectors of {side.space}")
        return side, column, ""
    column = pick_column(source.schema, columns.side_column, SIDE_NAMES, "side_column", without=vector)
    if not column:
        raise BackfillError(
            f"side_source: expected side-information of {h.side_model!r}, which this transformation was fitted with, "
            f"as a column (side_column) or a gallery of its own (side_source); {source.url} has "
            f"{', '.join(source.schema.names)}"
        )
    return None, "", column


def _require_dims(
    source: Source, vector: str, side: Source | None, side_column: str, h: Transformation, binary_dtype: str
) -> None:
    kind = source.schema.field(vector).type
    _require_dim(kind, binary_dtype, h.old_space.dim, f"source: expected vectors of {h.old_space}")
    if side_column:
        kind = (side or source).schema.field(side_column).type
        _require_dim(kind, binary_dtype, h.d_side, f"side_source: expected {h.d_side}-d vectors of {h.side_model!r}")


def _require_rows(job: Job) -> None:
    if job.rows == 0:
        raise BackfillError(f"source: expected at least one row, {job.source} has none")
    beside = sum(p.rows for p in job.side_pieces)
    if job.side and job.side_join == "position" and beside != job.rows:
        raise BackfillError(
            f"side_source: expected {job.rows} rows to match the source, got {beside}: join them by id with "
            "--side-join id (side_join='id') to see which ids are missing"
        )


def _row_of(gallery: _OldGallery, form: str, options: JobOptions) -> tuple[str, str]:
    """(dtype, vector_format) of the new rows: as asked for, else as the old ones are."""
    kind = gallery.source.schema.field(gallery.vector).type
    known = vector_type(kind)
    vector_format: str = options.output.vector_format
    if vector_format == "auto":
        vector_format = known if known and form in ("parquet", "arrow", *_TABLES) else "fixed_size_list"
    dtype: str = options.output.dtype
    halves = form != "bin" and (form not in _TABLES or vector_format == "binary")
    if dtype == "auto":
        half = vector_dtype(kind, options.columns.binary_dtype) == "float16"
        dtype = "float16" if half and halves else "float32"
    if dtype == "float16" and form in _TABLES and not halves:
        raise ValueError(f"dtype: expected float32, or vector_format binary: {_TABLES[form]} has no half floats")
    return dtype, vector_format


def _pick(h: Transformation, options: JobOptions, stored: Job | None) -> tuple[str, str]:
    """(backend, precision); "auto" means what the job in the destination was begun with, where there is one."""
    precision: str = options.execution.precision
    device, backend = options.execution.device, options.execution.backend
    if stored is not None and stored.transformation == h.fingerprint and precision == "auto":
        precision = stored.precision
        if backend is None and device == "cpu":
            try:
                return pick_transform(h, precision, device, stored.backend)[0].name, precision
            except (FctError, ValueError):
                pass  # another machine: any backend computes the same function at this precision
    picked, chosen = pick_transform(h, precision, device, backend)
    return picked.name, chosen


def _format_of(destination: GalleryLike | Destination, source: Source, asked: str) -> str:
    """The new gallery's format; a destination that names a table says it itself."""
    table = "iceberg" if is_iceberg(destination) else "delta" if str(destination).startswith(DELTA) else ""
    if table and asked not in ("auto", table):
        raise ValueError(f"format: expected auto, since the destination is {_TABLES[table]}, got {asked!r}")
    if table or asked != "auto":
        return table or asked
    if isinstance(destination, Destination):
        return destination.kind
    if is_database(destination):
        return database_destination(str(destination), RetryPolicy()).kind
    if str(destination).rstrip("/").endswith(".lance"):
        return "lance"
    return source.kind if source.kind in FORMATS else "parquet"


def _require_names(source: Source, what: str) -> None:
    """Columns are found by their names: two of one name would be mistaken for each other."""
    names = source.schema.names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BackfillError(f"{what}: expected columns with names of their own, {source.url} has {twice[0]!r} twice")


def _require_space(source: Source, h: Transformation, old_model: str | None) -> None:
    space = source.space
    if space is None:
        if old_model == h.old_space.model_id:
            return
        if old_model is not None:
            raise SpaceMismatchError(
                f"source: expected vectors of {h.old_space}, which this transformation was fitted for, got vectors of "
                f"{old_model!r}"
            )
        raise SpaceMismatchError(
            f"source: {source.url} does not say which model made its vectors; if it was {h.old_space}, pass "
            f"old_model={h.old_space.model_id!r} (--old-model) or write it down once with fct.gallery.tag_space"
        )
    if old_model is not None and old_model != space.model_id:
        raise SpaceMismatchError(f"old_model: expected {space.model_id!r}, which {source.url} says, got {old_model!r}")
    if space.plain == h.new_space.plain and space != h.old_space:
        raise SpaceMismatchError(
            f"source: {source.url} already holds vectors of {space}, the new space: the map would run in the wrong "
            f"direction; it goes from {h.old_space}"
        )
    h.old_space.require_same(space, f"source: {source.url}")


def _require_dim(kind: pa.DataType, binary_dtype: str, d: int, expected: str) -> None:
    """Refuses a column whose type alone says that its vectors have another length; rows of the others are looked at."""
    kind = plain_type(kind)
    if pa.types.is_fixed_size_list(kind):
        found = int(kind.list_size)
    elif is_packed_int4(kind, d, binary_dtype):
        return
    elif pa.types.is_fixed_size_binary(kind):
        found = kind.byte_width / np.dtype(binary_dtype).itemsize
    else:
        return
    if found != d:
        raise BackfillError(f"{expected}, got {found:g}-d vectors")
