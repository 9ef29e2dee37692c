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
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from fct.artifact.transformation import Transformation
from fct.atomic_files import checksum_file
from fct.backfilling.input_digest import InputDigest
from fct.backfilling.job import Job
from fct.backfilling.journal import Journal
from fct.backfilling.marker import Marker, ShardTimes
from fct.backfilling.reembedding import TrueRows
from fct.backfilling.row_mapper import RowMapper, output_schema
from fct.backfilling.shard_reader import BATCH_BYTES, ShardReader
from fct.errors import BackfillError, StoreError
from fct.gallery.interfaces import Destination, Output, Shard, Source
from fct.gallery.location import RetryPolicy
from fct.types import JsonDict

__all__ = ["BATCH_BYTES", "RowMapper", "ShardPipeline", "ShardReader", "output_schema"]

_AHEAD = 1  # batches waiting before each stage: they are large, since the kernel is undisturbed only inside one


@dataclass
class _Work:
    """A shard on its way through the stages."""

    shard: Shard
    done: Future[Marker] = field(default_factory=Future)
    digest: InputDigest = field(default_factory=InputDigest)
    rejects: list[JsonDict] = field(default_factory=list)
    rows_in: int = 0
    rows_out: int = 0
    true_rows: int = 0
    began: float = 0.0

    def fail(self, error: BaseException) -> None:
        with contextlib.suppress(Exception):  # the first error stands
            self.done.set_exception(error)


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
        retry_policy: RetryPolicy | None = None,
        on_rows: Callable[[int], None] | None = None,
        true_rows: TrueRows | None = None,
    ) -> None:
        self.true_rows = true_rows
        self.job, self.destination, self.journal = job, destination, journal
        self.mapper = RowMapper(job, source.schema, h, threads=threads, device=device)
        self.on_rows = on_rows
        self._left = False
        self._down: StoreError | None = None  # a store that is down is asked once for all shards under way
        self.worker = uuid.uuid4().hex
        if (parts := journal.scratch()) is not None:
            self.scratch = parts / self.worker
            self.scratch.mkdir(parents=True)
        else:
            self.scratch = Path(tempfile.mkdtemp(prefix="fct-"))
        self.reader = ShardReader(job, source, side, retry_policy)
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

    def leave(self) -> None:
        """Leaves what is under way unfinished and does not wait for it; the next run does those shards again."""
        self._left = True

    # ---- read ----
    def _read_all(self) -> None:
        while (work := self._queues[0].get()) is not _END:
            self._queues[1].put(work)
            work.began = time.time()
            try:
                if self._down is not None:
                    raise self._down
                if self._left:
                    raise _Aborted
                for item in self.reader.batches(work.shard):
                    if work.done.done() or self._left:
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
                if work.done.done() or self._left:
                    continue
                try:
                    batch, side = item
                    mapped, rejects = self.mapper(batch, side, work.shard.first + work.rows_in, work.digest)
                    for reject in rejects:
                        reject["piece"] = self.job.pieces[work.shard.piece].name
                    if self.true_rows is not None:
                        gone = [reject["row"] for reject in rejects]
                        mapped, true = self.true_rows(mapped, batch, gone, work.shard, work.rows_in)
                        work.true_rows += true
                    work.rejects += rejects
                    work.rows_in += batch.num_rows
                    work.rows_out += mapped.num_rows
                    self._queues[2].put(mapped)
                    if self.on_rows is not None:
                        self.on_rows(batch.num_rows)
                except BaseException as error:
                    work.fail(error)
                item = batch = side = mapped = None
            self._tidy(work)
            self._queues[2].put(None)
        self._queues[2].put(_END)

    def _tidy(self, work: _Work) -> None:
        """Joins the files of a shard's true vectors, once it is mapped."""
        if self.true_rows is None or work.done.done() or self._left:
            return
        try:
            self.true_rows.done(work.shard)
        except BaseException as error:
            work.fail(error)

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
                if work.done.done() or self._left:
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
                if self._left:
                    raise _Aborted
                work.done.set_result(self._publish(work, files, extra))
            except BaseException as error:
                self._failed(work, error, self.destination.url)

    def _failed(self, work: _Work, error: BaseException, url: str = "") -> None:
        if isinstance(error, StoreError):
            self._down = error
        work.fail(_plainer(error, url) if url else error)

    def _publish(self, work: _Work, files: dict[str, Path], extra: object) -> Marker:
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
            work.digest.hexdigest(),
            outputs,
            rejected,
            self.job.backend,
            extra,
            work.shard.piece,
            work.shard.start,
            work.digest.version,
            work.true_rows,
            ShardTimes(round(work.began, 3), round(time.time(), 3), self.worker),
        )
        self.journal.mark(marker)
        return marker

    def _put(self, path: Path, name: str) -> Output:
        with open(path, "rb", buffering=0) as file:
            output = Output(name, os.fstat(file.fileno()).st_size, checksum_file(file))
        if self._left:
            raise _Aborted
        self.journal.location(output).publish(path)
        return output


def _no_rows(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], type=f.type) for f in schema], schema=schema)


def _plainer(error: BaseException, url: str) -> BaseException:
    """A full disk or a lost permission in one sentence that says what to do."""
    if isinstance(error, OSError):
        return BackfillError(
            f"destination: writing to {url} failed: {error}; what is done is kept, start again once this is put right"
        )
    return error
