"""Side-information that is joined to its gallery by id, whatever the order of either, in bounded memory.

Both sides' ids are hashed into partitions on disk, each small enough to be held. A partition says which row of the
gallery each row of the side-information belongs to. The side-information is then written once more, in the gallery's
order, bucket by bucket. What is held at a time: the ids of a partition (about 500,000 rows a side) and 64 MB of
side-information. What lies on disk: twice the side-information's ids and vectors while it is written, then once.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pyarrow as pa

from fct.atomic_files import checksum_file, write_bytes
from fct.backfilling.checked_json import SchemaError, listed, parse, sealed, text, unsealed, whole
from fct.backfilling.confined import read_confined, refuse_links
from fct.backfilling.id_partitions import IdPartitions, Spill
from fct.backfilling.job import Job
from fct.backfilling.shard_reader import ShardReader
from fct.errors import BackfillError, FctError
from fct.gallery.arrow_files import ArrowSource
from fct.gallery.databases import DatabaseSource
from fct.gallery.interfaces import Batches, Piece, Source
from fct.gallery.location import RetryPolicy, location_of
from fct.gallery.schemas import conform, unify
from fct.gallery.side_ids import id_column_of
from fct.progress import LongCall
from fct.scratch import ScratchFolder
from fct.spaces import EmbeddingSpace
from fct.types import Array, JsonDict

__all__ = ["JoinedSide", "bound_side", "join_by_id"]

_BUCKET_BYTES, _INDEX_BYTES, _BATCH_ROWS = 64 << 20, 256 << 20, 4096


class JoinedSide(Source):
    """The side-information of a job's rows, in their order.

    inner: as it lies. source: the gallery. ids, side_ids, column: their columns of ids, and that of the vectors.
    location: the folder where the join is kept, so that it is made once for all runs; None for a temporary one.
    Its pieces are ``inner``'s, as the journal writes them down: row i of all pieces is row i of the gallery.
    """

    kind = "joined by id"

    def __init__(self, inner: Source, source: Source, ids: str, side_ids: str, column: str) -> None:
        self.inner, self.source, self._ids, self._side_ids, self.column = inner, source, ids, side_ids, column
        self.location: Path | None = None
        self.progress = False
        self._job: Job | None = None
        self._patience = RetryPolicy()
        self._ready: tuple[ArrowSource, list[Piece]] | None = None
        self._temporary: ScratchFolder | None = None

    def __getstate__(self) -> JsonDict:
        return {**self.__dict__, "_temporary": None, "_ready": None}

    def of(self, job: Job, retry_policy: RetryPolicy) -> JoinedSide:
        """The same for the rows of ``job``, which says the order of the pieces."""
        if self._job is not None and (self._job.pieces, self._job.side_pieces) == (job.pieces, job.side_pieces):
            return self
        bound = copy.copy(self)
        bound._job, bound._patience, bound._ready = job, retry_policy, None
        if sum(p.rows for p in job.side_pieces) != job.rows:
            bound.joined()  # which says what is missing: position by position there is nothing to read
        return bound

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def _id_type(self) -> pa.DataType:
        kinds = [pa.schema([("id", _decoded(s.schema.field(n).type))])
                 for s, n in ((self.source, self._ids), (self.inner, self._side_ids))]  # fmt: skip
        try:
            return unify(kinds, ["the gallery", "the side-information"]).field("id").type
        except FctError as error:
            raise BackfillError(f"side_source: expected ids of the gallery's type: {error}") from error

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([(self._side_ids, self._id_type), self.inner.schema.field(self.column)])

    @property
    def space(self) -> EmbeddingSpace | None:
        return self.inner.space

    @property
    def notes(self) -> tuple[str, ...]:
        return ("side_source: joined by id", *self.inner.notes)

    def refresh(self) -> None:
        self.inner.refresh()

    def pieces(self) -> Sequence[Piece]:
        return self.inner.pieces()

    def read(self, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches:
        assert self._job is not None
        ordered, pieces = self.joined()
        names = [p.name for p in self._job.side_pieces]
        at = start + sum(p.rows for p in self._job.side_pieces[: names.index(piece.name)])
        for part in pieces:
            if rows and at < part.rows:
                take = min(rows, part.rows - at)
                yield from ordered.read(part, at, take, batch_rows)
                at, rows = 0, rows - take
            else:
                at -= part.rows

    # ---- making it ----
    def joined(self) -> tuple[ArrowSource, list[Piece]]:
        """The side-information in the gallery's order, made where it is not there yet.

        Raises:
            BackfillError: ids that are missing, left over, twice or null; each named, with counts.
        """
        if self._ready is None:
            folder = self.location
            if folder is None:
                self._temporary = self._temporary or ScratchFolder("fct-side-")
                folder = self._temporary.path / "side"
            if not self._kept(folder):
                self._make(folder)
            files = [location_of(str(folder / name)) for name, _, _ in _index(folder)[1]]
            ordered = ArrowSource(location_of(str(folder)), files)
            self._ready = ordered, ordered.pieces()
        return self._ready

    def _key(self) -> str:
        job = self._job
        assert job is not None
        meaning = [[astuple(p) for p in ps] for ps in (job.pieces, job.side_pieces)]
        names = [self._ids, self._side_ids, self.column, self.source.url, self.inner.url]
        return hashlib.sha256(json.dumps([meaning, names]).encode()).hexdigest()

    def _kept(self, folder: Path) -> bool:
        """Whether an earlier run left the whole join there, of the same rows, and nothing in it changed since."""
        try:
            key, files = _index(folder)
        except (FileNotFoundError, SchemaError):
            return False
        if key != self._key():
            return False
        paths = [refuse_links(folder, name) for name, _, _ in files]
        return all(p.is_file() and p.stat().st_size == size for p, (_, size, _) in zip(paths, files, strict=True)) and (
            all(_checksum(p) == xxh64 for p, (_, _, xxh64) in zip(paths, files, strict=True))
        )

    def _make(self, folder: Path) -> None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            for left in folder.parent.glob(f".{folder.name}-*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                with LongCall(self.progress) as call:
                    self._write(made, call)
                if folder.exists():
                    shutil.rmtree(folder)
                made.rename(folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        except OSError as error:
            raise BackfillError(
                f"side_source: the join by id could not be written to {folder.parent}: {error.strerror or error}; it "
                "needs twice the room of the side-information: make room (TMPDIR says where temporary files go) and "
                "start again"
            ) from error

    def _write(self, folder: Path, call: LongCall) -> None:
        job = self._job
        assert job is not None
        partitions = IdPartitions(folder, job.rows)
        for rows, where, side in ((self._rows(self.source, job), "gallery", False), (self._side(job), "side", True)):
            tell, done = call.stage(f"the ids of the {where}"), 0
            name, total = (self._side_ids, sum(p.rows for p in job.side_pieces)) if side else (self._ids, job.rows)
            for batch in rows:
                partitions.add(self._as_id(batch, name), side=side)
                done += batch.num_rows
                if tell is not None and total:
                    tell(done / total)
        targets = partitions.targets()
        self._scatter(folder, job, targets, call)

    def _rows(self, source: Source, job: Job) -> Batches:
        reader = ShardReader(job, source, None, self._patience)
        for i, piece in enumerate(job.pieces):
            yield from reader.rows(source, job.pieces, i, 0, piece.rows)

    def _side(self, job: Job) -> Batches:
        reader = ShardReader(job, self.inner, None, self._patience)
        for i, piece in enumerate(job.side_pieces):
            yield from reader.rows(self.inner, job.side_pieces, i, 0, piece.rows)

    def _as_id(self, batch: pa.RecordBatch, name: str) -> pa.Array:
        column = batch.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        return conform(pa.record_batch([column], names=["id"]), pa.schema([("id", self._id_type)])).column(0)

    def _scatter(self, folder: Path, job: Job, targets: Array, call: LongCall) -> None:
        tell, at, spill = call.stage("side-information by id"), 0, None
        schema = pa.schema([*self.schema, pa.field("row", pa.int64())])
        per_bucket = 1
        for batch in self._side(job):
            rows = np.asarray(targets[at : at + batch.num_rows])
            columns = [self._as_id(batch, self._side_ids), batch.column(self.column), pa.array(rows)]
            part = pa.RecordBatch.from_arrays(columns, schema=schema)
            if spill is None:
                spill = Spill(folder / "spilt", schema)
                per_bucket = max(1, int(_BUCKET_BYTES * part.num_rows / max(1, part.nbytes)))
            spill.add(part, rows // per_bucket)
            at += batch.num_rows
            if tell is not None:
                tell(at / job.rows)
        files = []
        for bucket in range(-(-job.rows // per_bucket)):
            assert spill is not None
            table = spill.take(bucket)
            order = np.argsort(table.column("row").to_numpy())
            ordered = table.take(pa.array(order)).select(self.schema.names).combine_chunks()
            path = folder / f"bucket-{bucket:08d}.arrow"
            with pa.ipc.new_file(str(path), self.schema) as writer:
                writer.write_table(ordered, max_chunksize=_BATCH_ROWS)
            files.append([path.name, path.stat().st_size, _checksum(path)])
        for left in ("spilt", "ids", "side-ids"):
            shutil.rmtree(folder / left, ignore_errors=True)
        (folder / "targets").unlink(missing_ok=True)
        write_bytes(folder / "index.json", sealed({"key": self._key(), "files": files}))


def join_by_id(source: Source, side: Source, ids: str, column: str) -> JoinedSide:
    """What joins a gallery of side-information to ``source`` by id.

    Raises:
        ValueError: one is in a database. BackfillError: one of the two has no ids.
    """
    for what in (source, side):
        if isinstance(what, DatabaseSource):
            raise ValueError(
                f"side_join: expected files or tables, got the database {what.url}: join them by SQL there"
            )
    theirs = id_column_of(side.schema, ids)
    for what, name in ((source, ids), (side, theirs)):
        if not name:
            raise BackfillError(
                f"side_join: expected ids on both sides, found no column of them in {what.url} "
                f"({', '.join(what.schema.names)}): name it with id_column (--id-column)"
            )
    return JoinedSide(side, source, ids, theirs, column)


def bound_side(side: Source | None, job: Job, retry_policy: RetryPolicy) -> Source | None:
    """The side-information of the rows of ``job``."""
    return side.of(job, retry_policy) if isinstance(side, JoinedSide) else side


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return checksum_file(file)


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


_FILES = listed(listed(lambda value, where: value, 3), 1 << 22)


def _index(folder: Path) -> tuple[str, list[tuple[str, int, str]]]:
    """(key, (name, bytes, XXH64) of each file). Raises FileNotFoundError, or SchemaError for what was not written."""
    body = unsealed(parse(read_confined(folder.parent, f"{folder.name}/index.json", _INDEX_BYTES), _INDEX_BYTES))
    key, files = text(64, "[0-9a-f]{64}")(body.get("key"), "key"), _FILES(body.get("files"), "files")
    name, size, checksum = text(40, r"bucket-[0-9]{8,12}\.arrow"), whole(0, 1 << 60), text(16, "[0-9a-f]{16}")
    return key, [(name(n, "files"), size(s, "files"), checksum(x, "files")) for n, s, x in files]
