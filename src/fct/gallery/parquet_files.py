"""Parquet. Vectors as FixedSizeList, List or binary; page checksums are written, and verified where they are there.

Parquet has no fixed-size list: it stores one as LIST with levels, and takes them apart again. ``binary`` (fixed-length
byte arrays) avoids both; see docs/galleries.md.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fct.errors import FctError
from fct.gallery.file_gallery import FileDestination, FileSource
from fct.gallery.int96_times import columns_of_int96, unwrapped
from fct.gallery.interfaces import VECTOR_KEY, Batches, Piece, Shard
from fct.gallery.location import Location
from fct.spaces import EmbeddingSpace
from fct.types import JsonDict

__all__ = ["ParquetDestination", "ParquetSource", "parquet_writer"]

_BUFFER, _REMOTE_BUFFER = 256 << 10, 8 << 20  # pages larger than this are read straight to where they are decoded
_AHEAD = 256 << 20  # row groups up to this, together, are fetched from a network at once
_PAUSED = 2  # passes kept that stopped in the middle of a row group; the side-information has its own source


class ParquetSource(FileSource):
    kind = "parquet"
    suffixes = (".parquet", ".pq")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._paused: list[_Run] = []
        self._row_bytes: dict[str, float | None] = {}

    def __getstate__(self) -> JsonDict:
        return {**self.__dict__, "_paused": []}

    def _open(self, file: Location, **more: object) -> pq.ParquetFile:
        try:
            # A buffer for each column instead of whole column chunks: memory does not grow with the row group.
            buffer = {"buffer_size": _BUFFER if file.is_local else _REMOTE_BUFFER, "pre_buffer": False} | more
            return pq.ParquetFile(
                file.path if file.is_local else file.open(), page_checksum_verification=True, **buffer
            )
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and (error.errno is not None or isinstance(error, FctError)):
                raise  # the system's or the store's; Arrow says OSError for a damaged footer
            raise FctError(f"source: expected a whole Parquet file, {file} is not: {error}") from error

    def file_schema(self, file: Location) -> pa.Schema:
        with self._open(file) as parquet:
            return parquet.schema_arrow

    def groups(self, file: Location) -> list[int]:
        with self._open(file) as parquet:
            groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        self._row_bytes[file.path] = max((g.total_byte_size / g.num_rows for g in groups if g.num_rows), default=None)
        return [group.num_rows for group in groups]

    def row_bytes(self, piece: Piece) -> float | None:
        file = self.file_of(piece)
        if file.path not in self._row_bytes:
            ParquetSource.groups(self, file)
        return self._row_bytes[file.path]

    def read_file(self, file: Location, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches:
        end = start + rows
        while start < end:
            run = self._run(file, piece, start, end, batch_rows)
            stop = min(end, run.end)
            try:
                while start < stop:
                    batch = run.take(stop - start)
                    if batch is None:
                        raise FctError(f"source: {file} is truncated: it ended {end - start} rows early")
                    start += batch.num_rows
                    if start == stop:
                        self._leave(run)  # before the last rows are handed on: whoever has them asks for no more
                    yield batch
            finally:
                if start < stop:
                    run.close()

    def _leave(self, run: _Run) -> None:
        if run.at == run.end:
            run.close()
            return
        self._paused.append(run)  # in the middle of a row group: the next shard goes on there
        while len(self._paused) > _PAUSED:
            with contextlib.suppress(IndexError):
                self._paused.pop(0).close()

    def _run(self, file: Location, piece: Piece, start: int, end: int, batch_rows: int) -> _Run:
        """A pass that stands at row ``start``: one that was paused in its row group, or else a new one."""
        name = (file.path, piece.stamp, batch_rows)
        for run in list(self._paused):
            if run.name == name and run.at <= start < run.end:
                with contextlib.suppress(ValueError):
                    self._paused.remove(run)
                    return run.skip(start)
        parquet = self._open(file)
        metadata = parquet.metadata
        wanted: list[int] = []
        first = at = last = size = 0
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            if first < end and first + group.num_rows > start:
                at = at if wanted else first
                wanted.append(i)
                size += group.total_byte_size
                last = first + group.num_rows
            first += group.num_rows
        if not wanted:
            parquet.close()
            raise FctError(f"source: {file} is truncated: it has {first} rows, row {start} was to be read")
        if not file.is_local and size <= _AHEAD:
            # A store over a network answers few large requests sooner than many small ones.
            parquet.close()
            parquet = self._open(file, metadata=metadata, pre_buffer=True)
        # With few processors Arrow's threads only take turns with the kernel's.
        threads = pa.cpu_count() > 4
        batches = parquet.iter_batches(batch_rows, row_groups=wanted, use_threads=threads)
        wrapping = columns_of_int96(parquet.schema)
        if wrapping:
            micro = self._open(file, metadata=metadata, coerce_int96_timestamp_unit="us")
            again = micro.iter_batches(batch_rows, row_groups=wanted, columns=wrapping, use_threads=threads)
            batches = unwrapped(batches, iter(again), wrapping, file)
        return _Run(name, parquet, batches, at, last).skip(start)


class _Run:
    """A pass over some row groups of an open file. A row group can only be decoded from its beginning on, so a pass
    that has not reached the end of one is worth keeping for whoever reads the rows after it."""

    def __init__(self, name: tuple[str, str, int], file: pq.ParquetFile, batches: Batches, at: int, end: int) -> None:
        self.name, self.file, self.batches = name, file, iter(batches)
        self.at, self.end = at, end  # the rows, counted through the file, that are still to come
        self.left: pa.RecordBatch | None = None

    def take(self, most: int) -> pa.RecordBatch | None:
        batch = self.left if self.left is not None else next(self.batches, None)
        self.left = None
        if batch is None:
            return None
        if batch.num_rows > most:
            self.left, batch = batch.slice(most), batch.slice(0, most)
        self.at += batch.num_rows
        return batch

    def skip(self, to: int) -> _Run:
        while self.at < to and self.take(to - self.at) is not None:
            pass
        return self

    def close(self) -> None:
        self.file.close()


class ParquetDestination(FileDestination):
    kind = "parquet"
    tags_itself = True
    suffix = ".parquet"

    def begin(self, schema: pa.Schema, space: EmbeddingSpace) -> None:
        for entry in schema:
            with _named(entry):
                pq.ParquetWriter(io.BytesIO(), pa.schema([entry])).close()
        super().begin(schema, space)

    def write_file(self, path: Path, shard: Shard, batches: Batches, files: dict[str, Path]) -> None:
        writer: pq.ParquetWriter | None = None
        try:
            for batch in batches:
                writer = writer or parquet_writer(path, batch.schema)
                writer.write_batch(batch)
        # Arrow's name for what Parquet cannot hold: it becomes a refusal that names the column.
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            for entry, column in zip(batch.schema, batch.columns, strict=True):
                with _named(entry):
                    pq.write_table(pa.Table.from_arrays([column], schema=pa.schema([entry])), io.BytesIO())
            raise error
        finally:
            if writer is not None:
                writer.close()


def parquet_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Vectors neither compress nor repeat: no dictionary, no statistics, no codec for them."""
    vector = schema.metadata[VECTOR_KEY].decode()
    plain = [name for name in schema.names if name != vector]
    return pq.ParquetWriter(
        path,
        schema,
        use_dictionary=plain,
        write_statistics=plain,
        compression={**dict.fromkeys(plain, "snappy"), vector: "none"},
        write_page_checksum=True,
    )


@contextlib.contextmanager
def _named(entry: pa.Field) -> Iterator[None]:
    """What Parquet cannot hold, by its type or its values, comes out as an FctError that names the column."""
    try:
        yield
    # Arrow's name for what Parquet cannot hold: it becomes a refusal that names the column.
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise FctError(
            f"destination: the column {entry.name!r} ({entry.type}) cannot be kept in Parquet: {error}; write Arrow "
            "files with --format arrow (format='arrow'), or change that column before"
        ) from error
