"""One worker: reading ahead, mapping and writing behind overlap in a bounded pipeline.

Four threads hand batches on through short queues: read -> map -> write -> publish. Memory is bounded by the queues and
the batch size, whatever the gallery's size. The local run and every Ray actor use this one class.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fct import _C
from fct.artifact.transformation import Transformation
from fct.atomic_files import checksum_file
from fct.backfilling.job import BackfillError, Job, Journal, Marker
from fct.gallery.interfaces import JOB_KEY, VECTOR_KEY, Destination, Output, Shard, Source
from fct.gallery.location import Patience, StoreError
from fct.gallery.matrix_files import ROW
from fct.gallery.recycler import Recycler
from fct.gallery.space_tags import SPACE_KEY, with_space
from fct.gallery.vectors import VectorBlock, column_type, rebatch, vector_array, vector_block
from fct.rows import nonfinite_rows, rows_of
from fct.transform import transform_finite

__all__ = ["BATCH_BYTES", "RowMapper", "ShardPipeline", "ShardReader", "output_schema"]

BATCH_BYTES = 64 << 20  # what a batch takes at default settings
_AHEAD = 1  # batches waiting before each stage: they are large, since the kernel is undisturbed only inside one


def output_schema(job: Job, schema: pa.Schema) -> pa.Schema:
    """The source's columns in their order, the vectors replaced; a row number where there is no other column."""
    d, kind = job.new_space.dim, job.vector_format
    fields = []
    for entry in schema:
        if entry.name == job.vector:
            fields.append(pa.field(job.vector, column_type(d, job.dtype, kind), nullable=False))
        elif not job.side_column or entry.name != job.side_column or job.keep_side:  # a column may be named ""
            fields.append(entry)
    if len(fields) == 1:
        fields.insert(0, pa.field(ROW, pa.int64(), nullable=False))
    metadata = {k: v for k, v in (schema.metadata or {}).items() if k not in (b"huggingface", SPACE_KEY)}
    metadata |= {VECTOR_KEY: job.vector.encode(), JOB_KEY: job.fingerprint.encode()}
    return with_space(pa.schema(fields, metadata=metadata), job.new_space)


class RowMapper:
    """Maps one batch: vectors out, bad rows aside, h, the new column in. Used by the pipeline and by whoever needs
    the same rows without writing them."""

    def __init__(self, job: Job, schema: pa.Schema, h: Transformation, *, threads: int | None, device: str) -> None:
        self.job, self.h, self.threads, self.device = job, h, threads, device
        self.schema = output_schema(job, schema)
        self._memory = Recycler()

    def __call__(
        self, batch: pa.RecordBatch, side: pa.RecordBatch | None, first: int, digest: Any = None
    ) -> tuple[pa.RecordBatch, list[dict[str, Any]]]:
        """(mapped rows, rejects). first: the number of the batch's first row in the gallery."""
        job = self.job
        old, other = self._blocks(batch, side)
        bad = {row: f"{job.vector}: {why}" for row, why in old.bad.items()}
        if other is not None:
            for row, why in other.bad.items():
                bad.setdefault(row, f"side-information: {why}")
        n = batch.num_rows
        blocks = [(old, job.vector, job.scale)] + ([(other, "side-information", 1.0)] if other else [])
        arrays = []
        for block, name, scale in blocks:
            values, rows = block.values, block.rows
            wild = nonfinite_rows(rows_of(values, name, finite=False), digest)
            if scale != 1.0:
                with np.errstate(over="ignore"):
                    values = values * np.float32(scale)
                wild |= nonfinite_rows(rows_of(values, name, finite=False))
            for i in np.flatnonzero(wild).tolist():
                bad.setdefault(int(i if rows is None else rows[i]), f"{name}: not finite")
            arrays.append((values, rows))
        if digest is not None:
            self._digest_rest(digest, batch)
        keep = None
        if bad:
            keep = np.ones(n, dtype=bool)
            keep[list(bad)] = False
            arrays = [(a[keep if rows is None else keep[rows]], None) for a, rows in arrays]
        out = self._memory.empty((len(arrays[0][0]), job.new_space.dim), job.dtype)
        with np.errstate(over="ignore"):
            self._map(arrays[0][0], arrays[1][0] if len(arrays) > 1 else None, out)
        wild = nonfinite_rows(rows_of(out, "output", finite=False))
        if wild.any():
            where = np.arange(n) if keep is None else np.flatnonzero(keep)
            bad |= dict.fromkeys(where[wild].tolist(), f"h's output is not finite in {job.dtype}")
            keep = np.ones(n, dtype=bool)
            keep[list(bad)] = False
            out = out[~wild]
        columns: list[Any] = []
        mask = None if keep is None else pa.array(keep)
        for entry in self.schema:
            if entry.name == job.vector:
                columns.append(vector_array(out, job.vector_format))
            elif entry.name == ROW and ROW not in batch.schema.names:
                numbers = np.arange(first, first + n, dtype=np.int64)
                columns.append(pa.array(numbers if keep is None else numbers[keep]))
            else:
                column = batch.column(entry.name)
                columns.append(column if mask is None else column.filter(mask))
        ids = batch.column(job.id_column) if job.id_column else None
        rejects = [
            {"id": _plain(ids[row]) if ids is not None else first + row, "row": first + row, "reason": why}
            for row, why in sorted(bad.items())
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema), rejects

    def _map(self, old: Any, side: Any, out: Any) -> None:
        job = self.job
        transform_finite(
            old, side, self.h, out=out, device=self.device, precision=job.precision, backend=job.backend,
            threads=self.threads,
        )  # fmt: skip

    def _blocks(self, batch: pa.RecordBatch, side: pa.RecordBatch | None) -> tuple[VectorBlock, VectorBlock | None]:
        job = self.job
        old = vector_block(batch.column(job.vector), job.old_space.dim, job.binary_dtype)
        if side is not None:
            return old, vector_block(side.column(job.side_vector), self.h.d_side, job.binary_dtype)
        if job.side_column:
            return old, vector_block(batch.column(job.side_column), self.h.d_side, job.binary_dtype)
        return old, None

    def digest(self, batch: pa.RecordBatch, side: pa.RecordBatch | None, digest: Any) -> None:
        """Adds what was read to a checksum: the vectors and every other column."""
        self._digest(digest, batch, *self._blocks(batch, side))

    def _digest(self, digest: Any, batch: pa.RecordBatch, *blocks: VectorBlock | None) -> None:
        for block in blocks:
            if block is not None and block.values.size:
                values = np.ascontiguousarray(block.values)
                digest.update(int(values.ctypes.data), values.nbytes)
        self._digest_rest(digest, batch)

    def _digest_rest(self, digest: Any, batch: pa.RecordBatch) -> None:
        rest = batch.drop_columns([n for n in (self.job.vector, self.job.side_column) if n])
        # Serialised alone, a batch says which entries of a dictionary its rows are, and not what the entries say.
        for i, entry in enumerate(rest.schema):
            if pa.types.is_dictionary(entry.type):
                rest = rest.set_column(i, entry.name, rest.column(i).dictionary_decode())
        if rest.num_columns:
            body = rest.serialize()
            digest.update(body.address, body.size)


def _plain(scalar: pa.Scalar) -> Any:
    """An id as it stands in rejects/: Arrow holds dates and time zones that Python has no objects for."""
    try:
        value = scalar.as_py()
    except (ValueError, OverflowError, pa.ArrowException, KeyError, UnicodeDecodeError):
        return f"{getattr(scalar, 'value', scalar.type)} ({scalar.type})"
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


@dataclass
class _Work:
    """A shard on its way through the stages."""

    shard: Shard
    done: Future[Marker] = field(default_factory=Future)
    digest: Any = field(default_factory=_C.Xxh64)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    rows_in: int = 0
    rows_out: int = 0

    def fail(self, error: BaseException) -> None:
        with contextlib.suppress(Exception):  # the first error stands
            self.done.set_exception(error)


class ShardReader:
    """A shard's rows in batches of exactly ``job.batch_rows``, side-information from its own gallery beside them."""

    def __init__(
        self,
        job: Job,
        source: Source,
        side: Source | None,
        patience: Patience | None = None,
    ) -> None:
        self.job, self.source, self.side, self.patience = job, source, side, patience or Patience()
        self._starts = np.cumsum([0] + [p.rows for p in job.side_pieces])

    def batches(self, shard: Shard) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch | None]]:
        job = self.job
        rows = rebatch(self._rows(self.source, job.pieces, shard.piece, shard.start, shard.rows), job.batch_rows)
        if self.side is None:
            yield from ((batch, None) for batch in rows)
            return
        yield from zip(rows, rebatch(self._side_rows(shard.first, shard.rows), job.batch_rows), strict=True)

    def head(self, shard: Shard, rows: int) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        """The shard's first ``rows`` rows at once, side-information beside them: for a look at what is there."""
        rows = min(rows, shard.rows)
        batch = pa.concat_batches(list(self._rows(self.source, self.job.pieces, shard.piece, shard.start, rows)))
        side = None if self.side is None else pa.concat_batches(list(self._side_rows(shard.first, rows)))
        return batch, side

    def _side_rows(self, first: int, rows: int) -> Iterator[pa.RecordBatch]:
        assert self.side is not None
        while rows:
            piece = int(np.searchsorted(self._starts, first, side="right")) - 1
            start = first - int(self._starts[piece])
            take = min(rows, self.job.side_pieces[piece].rows - start)
            yield from self._rows(self.side, self.job.side_pieces, piece, start, take)
            first, rows = first + take, rows - take

    def _rows(self, source: Source, pieces: Any, piece: int, start: int, rows: int) -> Iterator[pa.RecordBatch]:
        """The rows, going on where it broke off after an error that may pass."""
        done = 0
        batches: Iterator[pa.RecordBatch] | None = None

        def step() -> pa.RecordBatch | None:
            nonlocal batches
            batches = batches or source.read(pieces[piece], start + done, rows - done, self.job.batch_rows)
            try:
                return next(batches, None)
            except BaseException:
                batches = None
                raise

        while done < rows:
            batch = self.patience.ask(step, f"reading {source.url}", moves=BATCH_BYTES) if source.transient else step()
            if batch is None:
                raise BackfillError(f"source: {pieces[piece].name} ended {rows - done} rows early")
            done += batch.num_rows
            yield batch


class _Aborted(Exception):
    """An earlier stage gave the shard up."""


_END = object()


class ShardPipeline:
    """Runs shards through read, map, write and publish; ``submit`` blocks while enough are under way."""

    def __init__(
        self,
        job: Job,
        source: Source,
        side: Source | None,
        destination: Destination,
        journal: Journal,
        h: Transformation,
        *,
        threads: int | None = None,
        device: str = "cpu",
        patience: Patience | None = None,
        on_rows: Callable[[int], None] | None = None,
    ) -> None:
        self.job, self.destination, self.journal = job, destination, journal
        self.mapper = RowMapper(job, source.schema, h, threads=threads, device=device)
        self.on_rows = on_rows
        self._down: StoreError | None = None  # a store that is down is asked once for all shards under way
        if journal.root.is_local:
            self.scratch = journal.root.local / "parts" / uuid.uuid4().hex
            self.scratch.mkdir(parents=True)
        else:
            self.scratch = Path(tempfile.mkdtemp(prefix="fct-"))
        self.reader = ShardReader(job, source, side, patience)
        self._queues: list[queue.Queue[Any]] = [queue.Queue(size) for size in (1, _AHEAD, _AHEAD, 1)]
        stages = (self._read_all, self._map_all, self._write_all, self._publish_all)
        self._threads = [threading.Thread(target=s, name=f"fct{s.__name__}", daemon=True) for s in stages]
        for thread in self._threads:
            thread.start()

    def submit(self, shard: Shard) -> Future[Marker]:
        work = _Work(shard)
        self._queues[0].put(work)
        return work.done

    def close(self) -> None:
        """Waits for what is under way and ends the threads."""
        self._queues[0].put(_END)
        for thread in self._threads:
            thread.join()
        shutil.rmtree(self.scratch, ignore_errors=True)

    # ---- read ----
    def _read_all(self) -> None:
        while (work := self._queues[0].get()) is not _END:
            self._queues[1].put(work)
            try:
                if self._down is not None:
                    raise self._down
                for item in self.reader.batches(work.shard):
                    if work.done.done():
                        break
                    self._queues[1].put(item)
            except BaseException as error:
                self._failed(work, error)
            self._queues[1].put(None)
        self._queues[1].put(_END)

    # ---- map ----
    def _map_all(self) -> None:
        while (work := self._queues[1].get()) is not _END:
            self._queues[2].put(work)
            while (item := self._queues[1].get()) is not None:
                if work.done.done():
                    continue
                try:
                    batch, side = item
                    mapped, rejects = self.mapper(batch, side, work.shard.first + work.rows_in, work.digest)
                    for reject in rejects:
                        reject["piece"] = self.job.pieces[work.shard.piece].name
                    work.rejects += rejects
                    work.rows_in += batch.num_rows
                    work.rows_out += mapped.num_rows
                    self._queues[2].put(mapped)
                    if self.on_rows is not None:
                        self.on_rows(batch.num_rows)
                except BaseException as error:
                    work.fail(error)
                item = batch = side = mapped = None
            self._queues[2].put(None)
        self._queues[2].put(_END)

    # ---- write ----
    def _write_all(self) -> None:
        while (work := self._queues[2].get()) is not _END:
            ended = False

            def batches(work: _Work = work) -> Iterator[pa.RecordBatch]:
                nonlocal ended
                empty = True
                while (batch := self._queues[2].get()) is not None:
                    if not work.done.done() and batch.num_rows:
                        empty = False
                        yield batch
                ended = True
                if work.done.done():
                    raise _Aborted
                if empty:  # all rejected: the shard is still a file, of no rows
                    yield _no_rows(self.mapper.schema)

            try:
                files, extra = self.destination.write(work.shard, batches(), self.scratch)
                if not ended:
                    raise BackfillError(f"destination: {self.destination.url} did not take all rows of a shard")
                self._queues[3].put((work, dict(files), extra))
            except _Aborted:
                pass
            except BaseException as error:
                work.fail(_plainer(error, self.destination.url))
            while not ended and self._queues[2].get() is not None:
                pass
        self._queues[3].put(_END)

    # ---- publish ----
    def _publish_all(self) -> None:
        while (item := self._queues[3].get()) is not _END:
            work, files, extra = item
            try:
                if self._down is not None:
                    raise self._down
                work.done.set_result(self._publish(work, files, extra))
            except BaseException as error:
                self._failed(work, error, self.destination.url)

    def _failed(self, work: _Work, error: BaseException, url: str = "") -> None:
        if isinstance(error, StoreError):
            self._down = error
        work.fail(_plainer(error, url) if url else error)

    def _publish(self, work: _Work, files: dict[str, Path], extra: Any) -> Marker:
        rejected = None
        if work.rejects:
            path = self.scratch / f"{work.shard.name}.jsonl"
            path.write_text("".join(json.dumps(r) + "\n" for r in work.rejects))
            rejected = self._put(path, f"rejects/{work.shard.name}.jsonl")
        outputs = tuple(self._put(path, name) for name, path in files.items())
        if hasattr(self.destination, "outputs"):
            outputs += tuple(self.destination.outputs(extra))
        marker = Marker(
            work.shard.number,
            self.job.fingerprint,
            work.rows_in,
            work.rows_out,
            len(work.rejects),
            f"{work.digest.digest():016x}",
            outputs,
            rejected,
            self.job.backend,
            extra,
        )
        self.journal.mark(marker)
        return marker

    def _put(self, path: Path, name: str) -> Output:
        with open(path, "rb", buffering=0) as file:
            output = Output(name, os.fstat(file.fileno()).st_size, checksum_file(file))
        self.journal.place(output).publish(path)
        return output


def _no_rows(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], type=f.type) for f in schema], schema=schema)


def _plainer(error: BaseException, url: str) -> BaseException:
    """A full disk or a lost permission in one sentence that says what to do."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return BackfillError(
            f"destination: writing to {url} failed: {error}; what is done is kept, start again once this is put right"
        )
    return error
