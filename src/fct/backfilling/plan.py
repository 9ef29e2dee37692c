"""plan_backfill: what a backfill would do, how long it takes, what it costs and what it would refuse."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from fct.artifact.transformation import Transformation
from fct.atomic_files import checksum_file
from fct.backfilling.database_job import database_journal, join_databases
from fct.backfilling.input_digest import InputDigest
from fct.backfilling.job import BackfillError, Job
from fct.backfilling.journal import Journal
from fct.backfilling.pipeline import BATCH_BYTES, RowMapper, ShardPipeline, ShardReader
from fct.backfilling.quality import Quality, ScoreShift, check_quality, score_shift
from fct.checks import (
    check_choice,
    check_flag,
    check_number,
    check_path,
    check_positive,
    check_text,
    check_whole,
    shown,
)
from fct.errors import FctError, SpaceMismatchError
from fct.gallery import Location, Source, journal_location, lance_in, location_of, open_destination, open_source
from fct.gallery.databases import DatabaseDestination, DatabaseSource, database_destination, is_database
from fct.gallery.file_gallery import FileDestination
from fct.gallery.interfaces import VECTOR_KEY, Destination, Shard
from fct.gallery.location import Patience
from fct.gallery.space_tags import SIDE_FILE
from fct.gallery.stores import FORMATS
from fct.gallery.urls import redacted
from fct.gallery.vectors import VECTOR_FORMATS, vector_dim, vector_dtype, vector_type
from fct.ops.backend import check_precision
from fct.ops.processors import threads_of
from fct.ops.registry import pick_transform

__all__ = ["BackfillPlan", "Resolved", "plan_backfill", "refuse_misfit", "resolve"]

_OLD_NAMES = ("old", "vector", "embedding", "emb", "features")
_SIDE_NAMES = ("side", "side_info", "side_information")
_DTYPES = ("float32", "float16")
_SHARD_BYTES = 128 << 20
_WRITE_BYTES = 512 << 20  # at most, to measure writing
SAMPLE_ROWS = 4096


@dataclass(frozen=True)
class BackfillPlan:
    """What :func:`plan_backfill` found out.

    rows, bytes_in, bytes_out: of the whole gallery. free_bytes: None where the destination cannot say.
    rows_per_second: of the whole backfill on this machine, from h (at ``precision`` on ``backend``), reading and
    writing, each measured for a moment: they overlap, so the slowest binds (``binds``), and on a CPU they share it.
    h_rows_per_second, read_rows_per_second, write_rows_per_second: of each alone. Reading is that of the source as it
    lies now (page cache included, and the network where it lies behind one); writing goes to a temporary folder of this
    machine, None where the destination is not files. Nothing is written to the destination, so the upload to a remote
    one can not be measured: upload_rows_per_second comes from the stated ``upload_mb_per_s``, and without one
    ``upload_left_out`` is True: the prediction is of everything but the upload.
    seconds: predicted for ``workers`` machines like this one. cost_per_billion_rows: at ``price_per_hour`` for each.
    nonfinite_share: rows of the sample that would go to rejects/.
    refusals: every reason why the backfill would be refused; empty when it would run.
    quality: expected retrieval quality on the pairs, None without. scores: how old and new scores compare.
    """

    source: str
    destination: str
    rows: int
    shards: int
    bytes_in: int
    bytes_out: int
    free_bytes: int | None
    precision: str
    backend: str
    rows_per_second: float
    workers: int
    seconds: float
    price_per_hour: float | None
    cost_per_billion_rows: float | None
    sample_rows: int
    nonfinite_share: float
    reject_reasons: Mapping[str, int]
    refusals: tuple[str, ...]
    gate_refusals: tuple[str, ...] = ()
    quality: Quality | None = None
    scores: ScoreShift | None = None
    job: Job | None = field(default=None, repr=False, compare=False)
    h_rows_per_second: float = 0.0
    read_rows_per_second: float = 0.0
    write_rows_per_second: float | None = None
    binds: str = "h"
    upload_mb_per_s: float | None = None
    upload_rows_per_second: float | None = None
    upload_left_out: bool = False


@dataclass
class Resolved:
    """A job and the open stores it is about."""

    job: Job
    source: Source
    side: Source | None
    destination: Destination
    journal: Journal
    h: Transformation
    device: str
    patience: Patience

    def mapper(self, job: Job, *, threads: int | None = None) -> RowMapper:
        """What maps the rows of ``job``: this one, or one that was cut, or stored, otherwise."""
        return RowMapper(job, self.source.schema, self.h, threads=threads, device=self.device)

    def reader(self, job: Job) -> ShardReader:
        """What reads the rows of ``job``, a store over a network as patiently as was asked for."""
        return ShardReader(job, self.source, self.side, self.patience)

    def pipeline(self, job: Job, *, threads: int | None, on_rows: Callable[[int], None] | None = None) -> ShardPipeline:
        """What takes the shards of ``job`` from the source to the destination."""
        return ShardPipeline(
            job,
            self.source,
            self.side,
            self.destination,
            self.journal,
            self.h,
            threads=threads,
            device=self.device,
            patience=self.patience,
            on_rows=on_rows,
        )


def load_transformation(transformation: Any) -> Transformation:
    if isinstance(transformation, (str, os.PathLike)):
        return Transformation.load(check_path(transformation, "transformation"))
    if not isinstance(transformation, Transformation):
        raise TypeError(
            f"transformation: expected an fct.Transformation or the path of one, got {shown(transformation)}"
        )
    return transformation


def _pick_column(schema: pa.Schema, wanted: str, names: tuple[str, ...], what: str, without: str = "") -> str:
    """The column asked for, or the only one that can hold vectors, or the one with a usual name."""
    able = [f.name for f in schema if vector_type(f.type) and f.name != without]
    if wanted != "auto":
        if wanted not in schema.names:
            raise ValueError(f"{what}: expected a column of the gallery ({', '.join(schema.names)}), got {wanted!r}")
        if wanted not in able:
            raise ValueError(f"{what}: expected a list or binary column, {wanted!r} is {schema.field(wanted).type}")
        return wanted
    marked = (schema.metadata or {}).get(VECTOR_KEY, b"").decode()
    if names is _OLD_NAMES and marked in able:
        return str(marked)
    usual = [n for n in able if n.lower() in names]
    lists = [n for n in able if vector_type(schema.field(n).type) != "binary"]
    for found in (usual, lists if names is _OLD_NAMES else [], able if names is _OLD_NAMES else []):
        if len(found) == 1:
            return str(found[0])
    if names is _SIDE_NAMES and not usual:
        return ""
    if not able:
        there = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(
            f"{what}: expected a list of float32, float16 or 8-bit integers, or a binary column, got {there}"
        )
    raise ValueError(f"{what}: expected the name of a column, since several could be meant: {', '.join(able)}")


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
    if space == h.new_space and space != h.old_space:
        raise SpaceMismatchError(
            f"source: {source.url} already holds vectors of {space}, the new space: the map would run in the wrong "
            f"direction; it goes from {h.old_space}"
        )
    h.old_space.require_same(space, f"source: {source.url}")


def _require_dim(kind: pa.DataType, binary_dtype: str, d: int, expected: str) -> None:
    """Refuses a column whose type alone says that its vectors have another length; rows of the others are looked at."""
    if pa.types.is_fixed_size_list(kind):
        found = int(kind.list_size)
    elif pa.types.is_fixed_size_binary(kind):
        found = kind.byte_width / np.dtype(binary_dtype).itemsize
    else:
        return
    if found != d:
        raise BackfillError(f"{expected}, got {found:g}-d vectors")


def resolve(
    source: Any,
    destination: Any,
    transformation: Any,
    *,
    side_source: Any = None,
    vector_column: str = "auto",
    side_column: str = "auto",
    id_column: str = "auto",
    keep_side_info: bool = False,
    old_model: str | None = None,
    format: str = "auto",
    vector_format: str = "auto",
    dtype: str = "auto",
    binary_dtype: str = "float32",
    scale: float = 1.0,
    precision: str = "auto",
    backend: str | None = None,
    device: str = "cpu",
    shard_rows: int | None = None,
    batch_rows: int | None = None,
    filesystem: Any = None,
    storage_options: Mapping[str, Any] | None = None,
    retries: int = 6,
    timeout: float = 60.0,
    journal: Any = None,
    max_rows_per_s: float | None = None,
    switch_alias: bool = False,
) -> Resolved:
    """Opens everything and settles every "auto"; raises for what can never run. See :func:`plan_backfill`."""
    h = load_transformation(transformation)
    # All that is chosen by a name, before a file is opened.
    check_choice(format, "format", ("auto", *FORMATS))
    check_choice(vector_format, "vector_format", ("auto", *VECTOR_FORMATS))
    check_choice(dtype, "dtype", ("auto", *_DTYPES))
    check_choice(binary_dtype, "binary_dtype", _DTYPES)
    check_precision(precision, gpu=True)
    for column, name in ((vector_column, "vector_column"), (side_column, "side_column"), (id_column, "id_column")):
        check_text(column, name, "the name of a column")
    check_text(device, "device", "a name like 'cpu' or 'cuda:0'")
    if old_model is not None:
        check_text(old_model, "old_model", "the id of a model or None")
    # What goes into the job is Python's own: 1 and 1.0 are written differently, and numpy's numbers not at all.
    keep_side_info = check_flag(keep_side_info, "keep_side_info")
    scale = check_positive(scale, "scale")
    shard_rows, batch_rows = (
        None if rows is None else check_whole(rows, name, 1)
        for rows, name in ((shard_rows, "shard_rows"), (batch_rows, "batch_rows"))
    )
    patience = Patience(retries, timeout)
    access: dict[str, Any] = {"filesystem": filesystem, "storage_options": storage_options, "patience": patience}
    reader = open_source(source, **access)
    if isinstance(reader, DatabaseSource) and side_column == "auto":
        side_column = reader.address.options.get("side", "auto")
    schema = reader.schema
    _require_names(reader, "source")
    vector = _pick_column(schema, vector_column, _OLD_NAMES, "vector_column")
    _require_space(reader, h, old_model)

    side: Source | None = None
    side_vector, side_name = "", ""
    if h.uses_side_info:
        if side_source is not None:
            side = open_source(side_source, **access, name="side_source")
            _require_names(side, "side_source")
            side_vector = _pick_column(side.schema, "auto", _OLD_NAMES + _SIDE_NAMES, "side_column")
            if side.space is not None and side.space.model_id != h.side_model:
                raise SpaceMismatchError(
                    f"side_source: expected vectors of {h.side_model!r}, got vectors of {side.space}"
                )
        else:
            side_name = _pick_column(schema, side_column, _SIDE_NAMES, "side_column", vector)
            if not side_name:
                raise BackfillError(
                    f"side_source: expected side-information of {h.side_model!r}, which this transformation was fitted "
                    f"with, as a column (side_column) or a gallery of its own (side_source); {reader.url} has "
                    f"{', '.join(schema.names)}"
                )
    elif side_source is not None or side_column != "auto":
        raise ValueError("side_source: expected none, since this transformation was fitted without side-information")

    _require_dim(schema.field(vector).type, binary_dtype, h.old_space.dim, f"source: expected vectors of {h.old_space}")
    if h.uses_side_info:
        kind = side.schema.field(side_vector).type if side else schema.field(side_name).type
        _require_dim(kind, binary_dtype, h.d_side, f"side_source: expected {h.d_side}-d vectors of {h.side_model!r}")

    form = format
    if form == "auto":
        form = _format_of(destination, reader)
    given = isinstance(destination, Destination) or is_database(destination)
    where = destination if given else location_of(destination, name="destination", **access)
    if form == "lance" and isinstance(where, Location):
        table = reader.url.rstrip("/").rpartition("/")[2].removesuffix(".lance")
        where = lance_in(where, table=table if reader.kind == "lance" else "gallery")
    writer = open_destination(where, form, storage_options=storage_options, patience=patience)
    if isinstance(where, Location):
        place = where
    elif isinstance(writer, DatabaseDestination):
        place = database_journal(journal).destination
    else:
        place = location_of(writer.url, **{**access, "filesystem": None})
    if isinstance(where, Location):
        for gallery, what in ((reader, "source"), *(((side, "side_source"),) if side is not None else ())):
            _require_apart(where, gallery, what)
        _require_folder(where)
    log = Journal(journal_location(place, form), place)
    if isinstance(writer, DatabaseDestination):
        log = database_journal(journal)
    ids = id_column
    if ids == "auto":
        usual = (reader.id_column,) if isinstance(reader, DatabaseSource) else ("id", "_id", "pk", "key", "uid")
        ids = next((n for n in usual if n in schema.names), "")
    elif ids and ids not in schema.names:
        raise ValueError(f"id_column: expected a column of the gallery ({', '.join(schema.names)}), got {ids!r}")
    join_databases(
        reader, side, writer, ids, log, journal, needed=(vector, side_name), rate=max_rows_per_s, switch=switch_alias
    )

    pieces = tuple(reader.pieces())
    side_pieces = tuple(side.pieces()) if side else ()
    rows = sum(p.rows for p in pieces)
    if rows == 0:
        raise BackfillError(f"source: expected at least one row, {reader.url} has none")
    if side is not None and sum(p.rows for p in side_pieces) != rows:
        raise BackfillError(
            f"side_source: expected {rows} rows to match the source, got {sum(p.rows for p in side_pieces)}"
        )

    known = vector_type(schema.field(vector).type)
    if vector_format == "auto":
        vector_format = known if known and form in ("parquet", "arrow") else "fixed_size_list"
    if dtype == "auto":
        half = vector_dtype(schema.field(vector).type, binary_dtype) == "float16"
        dtype = "float16" if half and form != "bin" else "float32"
    stored_job = log.job()
    chosen, chosen_precision = _pick(h, precision, device, backend, stored_job)
    width = 4 * (h.d_old + (h.d_side if h.uses_side_info else 0) + h.d_new)
    job = Job(
        source=reader.url,
        destination=writer.url if isinstance(writer, DatabaseDestination) else str(place),
        format=form,
        pieces=pieces,
        vector=vector,
        id_column=ids,
        side=side.url if side else "",
        side_pieces=side_pieces,
        side_vector=side_vector,
        side_column=side_name,
        keep_side=keep_side_info,
        transformation=h.fingerprint,
        old_space=h.old_space,
        new_space=h.new_space,
        precision=chosen_precision,
        backend=chosen,
        dtype=dtype,
        vector_format=vector_format,
        binary_dtype=binary_dtype,
        scale=scale,
        shard_rows=shard_rows or max(1024, 1 << int(np.log2(_SHARD_BYTES / width))),
        batch_rows=batch_rows or max(256, 1 << int(np.log2(BATCH_BYTES / width))),
    )
    return Resolved(job, reader, side, writer, log, h, device, patience)


def _pick(h: Transformation, precision: str, device: str, backend: str | None, stored: Job | None) -> tuple[str, str]:
    """(backend, precision); "auto" means what the job in the destination was begun with, where there is one."""
    if stored is not None and stored.transformation == h.fingerprint and precision == "auto":
        precision = stored.precision
        if backend is None and device == "cpu":
            try:
                return pick_transform(h, precision, device, stored.backend)[0].name, precision
            except (FctError, ValueError):
                pass  # another machine: any backend computes the same function at this precision
    picked, chosen = pick_transform(h, precision, device, backend)
    return picked.name, chosen


def _format_of(destination: Any, source: Source) -> str:
    if isinstance(destination, Destination):
        return destination.kind
    if is_database(destination):
        return database_destination(destination, Patience()).kind
    if str(destination).rstrip("/").endswith(".lance"):
        return "lance"
    return source.kind if source.kind in FORMATS else "parquet"


def _require_apart(where: Location, source: Source, what: str) -> None:
    """A source is never written to: the new gallery lies neither in it nor around it, whatever the two are called."""
    mine = getattr(source, "where", None)
    if not isinstance(mine, Location) or mine.fs != where.fs or (mine.is_pattern and "**" not in mine.path):
        return
    root = mine.path.partition("**")[0].rstrip("/") if mine.is_pattern else mine.path.rstrip("/")
    old, new = ((os.path.realpath(p) if where.is_local else p) + "/" for p in (root, where.path.rstrip("/")))
    if old == new:
        raise ValueError(f"destination: expected another place than the {what}, which is never written to")
    if new.startswith(old) or old.startswith(new):
        inside = f"inside the {what}" if new.startswith(old) else f"around the {what}"
        raise ValueError(f"destination: expected a place apart from the {what} {mine}, got {where} {inside}")


def _require_folder(where: Location) -> None:
    """Raises NotADirectoryError where a file stands in the destination's way."""
    if where.is_local:
        way = next((p for p in (where.local, *where.local.parents) if p.exists()), None)
        if way is not None and not way.is_dir():
            raise NotADirectoryError(f"destination: expected a folder, or a place for a new one, {way} is a file")


def occupied(place: Location) -> list[str]:
    """Names in a destination that no backfill of ours began."""
    return [n for n in place.files() if n != SIDE_FILE]


def plan_backfill(
    source: Any,
    destination: Any,
    transformation: Any,
    *,
    workers: int = 1,
    price_per_hour: float | None = None,
    pairs: Any = None,
    min_gap_closed: float | None = None,
    min_recall: float | None = None,
    sample_rows: int = SAMPLE_ROWS,
    measure_seconds: float = 1.0,
    threads: int | None = None,
    upload_mb_per_s: float | None = None,
    **options: Any,
) -> BackfillPlan:
    """Reads metadata and a sample, measures h, reading and writing, and says what a backfill would do. The destination
    is not touched.

    Args:
        source: the old gallery: a folder, a glob or a file of Parquet, Arrow IPC, .npy, .fbin/.u8bin/.i8bin; a
            ``.lance`` dataset; any of them at an fsspec URL; or your own :class:`fct.gallery.Source`.
        destination: where the new gallery goes: a folder, a ``.lance`` path, or a :class:`fct.gallery.Destination`.
        transformation: h, or the path of its .safetensors file.
        workers: machines like this one, for the prediction. price_per_hour: of one, in your currency.
        pairs: held-out pairs as an .npz path or a mapping with "old", "side" (where h needs it), "new" and, for
            ``min_gap_closed``, "labels": (n, d) arrays, row i of each the same item.
        min_gap_closed: least share of the gap closed, by mAP. min_recall: least recall@10 against new/new.
        sample_rows: rows of the sample. measure_seconds: how long h is measured, and reading and writing together.
        threads: CPU threads.
        upload_mb_per_s: 10^6 bytes a second that one machine uploads to the destination, for the prediction: a plan
            writes nothing there, so it can not measure this.
        options: side_source, vector_column, side_column, id_column, keep_side_info, old_model, format,
            vector_format, dtype, binary_dtype, scale, precision, backend, device, shard_rows, batch_rows, filesystem,
            storage_options, retries, timeout; see docs/backfill.md.

    Returns:
        BackfillPlan; ``refusals`` holds every reason why the backfill would not run.

    Raises:
        ValueError, TypeError: a bad argument. FileNotFoundError: no gallery there. FctError: unreadable input.

    Example:
        >>> import fct, numpy as np, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> np.save(folder + "/old.npy", np.ones((100, 8), np.float32))
        >>> h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False)
        >>> fct.plan_backfill(folder, folder + "-new", h, old_model="random-old", measure_seconds=0.01).rows
        100
    """
    check_whole(workers, "workers", 1)
    check_whole(sample_rows, "sample_rows", 1)
    check_number(measure_seconds, "measure_seconds", 0)
    if price_per_hour is not None:
        check_number(price_per_hour, "price_per_hour", 0)
    if upload_mb_per_s is not None:
        check_positive(upload_mb_per_s, "upload_mb_per_s", "a positive number of MB a second or None")
    h = load_transformation(transformation)
    quality = check_quality(h, pairs, min_gap_closed, min_recall)
    gate = quality.refusals if quality is not None else ()
    try:
        found = resolve(source, destination, h, **options)
    except FctError as error:
        return _refused(redacted(str(source)), redacted(str(destination)), (str(error),), gate, quality)
    job = found.job
    refusals = list(gate)
    stored = found.journal.job()
    if stored is not None:
        refusals += [f"destination: holds another backfill: {d}" for d in stored.differences(job)]
    elif job.format != "lance" and occupied(found.journal.destination):
        refusals.append(f"destination: {job.destination} already holds other files")
    bytes_in = sum(p.bytes for p in (*job.pieces, *job.side_pieces))
    bytes_out = job.rows * h.d_new * np.dtype(job.dtype).itemsize
    files = not isinstance(found.destination, DatabaseDestination)
    free = found.journal.destination.free_bytes() if files else None
    if free is not None and free < bytes_out:
        refusals.append(f"destination: {bytes_out} bytes are needed, {free} are free")

    mapper = found.mapper(job, threads=threads)
    sample: list[tuple[Any, Any]] = []
    try:
        sample = list(sampled(found, sample_rows))
    except (FctError, ValueError, OSError) as error:
        refusals.append(str(error))
    n, rejects, mapped = sum(b.num_rows for b, _ in sample), [], []
    for batch, side in sample:
        try:
            rows, bad = mapper(batch, side, 0)
            mapped.append(rows)
            rejects += bad
        except ValueError as error:
            refusals.append(str(error))
            break
    reasons: dict[str, int] = {}
    for reject in rejects:
        reasons[reject["reason"]] = reasons.get(reject["reason"], 0) + 1
    if n and len(rejects) == n:
        refusals.append(misfit(job, sample[0][0], rejects))
    h_rate = _rate(mapper, measure_seconds)
    pace = _Pace(h_rate, on_cpu=found.device == "cpu", threads=threads_of(threads))
    if not refusals:
        _measure_reading(pace, found, mapper, measure_seconds / 2)
        _measure_writing(pace, found, mapped)
    if upload_mb_per_s is not None:
        pace.upload = (pace.row_bytes or bytes_out / job.rows) / (upload_mb_per_s * 1e6)
    rate, binds = pace.together()
    seconds = job.rows / (rate * max(1, workers))
    cost = None if price_per_hour is None else 1e9 / rate / 3600 * price_per_hour
    return BackfillPlan(
        source=job.source,
        destination=job.destination,
        rows=job.rows,
        shards=len(job.shards),
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        free_bytes=free,
        precision=job.precision,
        backend=job.backend,
        rows_per_second=rate,
        workers=workers,
        seconds=seconds,
        price_per_hour=price_per_hour,
        cost_per_billion_rows=cost,
        sample_rows=n,
        nonfinite_share=len(rejects) / n if n else 0.0,
        reject_reasons=reasons,
        refusals=tuple(dict.fromkeys(refusals)),
        gate_refusals=tuple(gate),
        quality=quality,
        scores=None if refusals or not sample else score_shift(mapper, sample),
        job=job,
        h_rows_per_second=h_rate,
        read_rows_per_second=1 / pace.read if pace.read else 0.0,
        write_rows_per_second=1 / pace.write if pace.write else None,
        binds=binds,
        upload_mb_per_s=upload_mb_per_s,
        upload_rows_per_second=1 / pace.upload if pace.upload else None,
        upload_left_out=upload_mb_per_s is None and not found.journal.destination.is_local,
    )


@dataclass
class _Pace:
    """What a row costs: seconds on the clock of each stage, and processor seconds of reading and writing.

    row_bytes: of a written row with all its columns, once writing was measured.
    """

    h_rate: float
    on_cpu: bool
    threads: int
    read: float = 0.0
    write: float = 0.0
    upload: float = 0.0
    cpu: float = 0.0
    row_bytes: float = 0.0

    def together(self) -> tuple[float, str]:
        """(rows per second, which stage binds). Stages overlap; what runs on the processors adds up there."""
        stages = {"h": 1 / self.h_rate, "reading": self.read, "writing": self.write, "uploading": self.upload}
        if self.on_cpu:
            stages["h"] += self.cpu / self.threads
        binds = max(stages, key=lambda name: stages[name])
        return 1 / stages[binds], binds


def _measure_reading(pace: _Pace, found: Resolved, mapper: RowMapper, seconds: float) -> None:
    """Rows as the backfill reads them, with the checksum of what was read."""
    reader, rows = found.reader(found.job), 0
    wall, cpu = time.perf_counter(), time.process_time()
    for shard in found.job.shards:
        for batch, side in reader.batches(shard):
            mapper.digest(batch, side, InputDigest())
            rows += batch.num_rows
            if time.perf_counter() - wall > seconds:
                break
        if time.perf_counter() - wall > seconds:
            break
    pace.read, pace.cpu = (time.perf_counter() - wall) / rows, pace.cpu + (time.process_time() - cpu) / rows


def _measure_writing(pace: _Pace, found: Resolved, mapped: list[pa.RecordBatch]) -> None:
    """The mapped sample, again and again to a shard's size, as the backfill encodes, checks and publishes it."""
    rows = sum(batch.num_rows for batch in mapped)
    if not isinstance(found.destination, FileDestination) or not rows:
        return
    job = found.job
    once = pa.Table.from_batches(mapped)
    again = min(job.batch_rows // rows, BATCH_BYTES // max(1, once.nbytes))  # whatever a row's payload is
    full = pa.concat_tables([once] * max(1, again)).combine_chunks().to_batches()[0]
    times = max(1, min(job.shard_rows, job.rows) // full.num_rows)
    times = min(times, max(1, _WRITE_BYTES // max(1, full.nbytes)))
    with tempfile.TemporaryDirectory(prefix="fct-plan-") as folder:
        part = Path(folder) / "part"
        wall, cpu = time.perf_counter(), time.process_time()
        files = {part.name: part}
        found.destination.write_file(part, Shard(0, 0, 0, times * full.num_rows, 0), iter([full] * times), files)
        size = sum(file.stat().st_size for file in files.values())
        with open(part, "rb", buffering=0) as file:
            checksum_file(file)
        Location(LocalFileSystem(), str(part.with_name("whole"))).publish(part)
        done = times * full.num_rows
        pace.row_bytes = size / done
        pace.write, pace.cpu = (time.perf_counter() - wall) / done, pace.cpu + (time.process_time() - cpu) / done


def _refused(
    source: str, destination: str, why: tuple[str, ...], gate: tuple[str, ...], quality: Quality | None
) -> BackfillPlan:
    return BackfillPlan(
        source, destination, 0, 0, 0, 0, None, "", "", 0.0, 1, 0.0, None, None, 0, 0.0, {}, (*gate, *why), gate, quality
    )  # fmt: skip


def sampled(found: Resolved, rows: int) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch | None]]:
    """About ``rows`` rows with their side-information, in up to 8 runs from shards spread evenly over the gallery."""
    shards = found.job.shards
    chosen = [shards[i] for i in sorted({int(x) for x in np.linspace(0, len(shards) - 1, min(8, len(shards)))})]
    each = max(1, rows // len(chosen))
    # One batch a run: no more is decoded than is looked at.
    reader = found.reader(replace(found.job, batch_rows=each))
    for shard in chosen:
        yield reader.head(shard, each)


def misfit(job: Job, first: pa.RecordBatch, rejects: list[dict[str, Any]]) -> str:
    """Why this is the wrong gallery, when every row of the sample was rejected. first: the sample's first rows."""
    d = vector_dim(first.column(job.vector), job.binary_dtype)
    if d is not None and d != job.old_space.dim:
        return f"source: expected vectors of {job.old_space}, got {d}-d vectors"
    return f"source: every row of the sample would be rejected: {rejects[0]['reason']}"


def refuse_misfit(found: Resolved, *, threads: int | None = None) -> None:
    """Raises BackfillError where no row of the sample that :func:`plan_backfill` takes can be mapped.

    One row that can is enough, so that of most galleries only the first run is read.
    """
    mapper = found.mapper(found.job, threads=threads)
    first, rejects = None, []
    for batch, side in sampled(found, SAMPLE_ROWS):
        _, bad = mapper(batch, side, 0)
        if len(bad) < batch.num_rows:
            return
        first = batch if first is None else first
        rejects += bad
    assert first is not None  # resolve() refuses a gallery without rows
    raise BackfillError(misfit(found.job, first, rejects))


def _rate(mapper: RowMapper, seconds: float) -> float:
    """Rows per second of h alone, on random rows of the default batch, for about ``seconds``."""
    h, rng = mapper.h, np.random.default_rng(0)
    n = min(mapper.job.batch_rows, 4096)
    old = rng.standard_normal((n, h.d_old), dtype=np.float32)
    side = rng.standard_normal((n, h.d_side), dtype=np.float32) if h.uses_side_info else None
    out = np.empty((n, h.d_new), mapper.job.dtype)
    mapper._map(old, side, out)  # packs h, warms up
    done, start = 0, time.perf_counter()
    while done == 0 or time.perf_counter() - start < seconds:
        mapper._map(old, side, out)
        done += n
    return done / (time.perf_counter() - start)
