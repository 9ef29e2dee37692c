"""Rows of a partitioned Iceberg table: a data file holds those of one partition, and says which of its shard they are.

A shard becomes as many files as it has partitions. Its rows' numbers, kept in the files' own metadata, put them back
into the source's order when the new gallery is compared with the old one.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fct.errors import FctError
from fct.gallery.interfaces import Batches
from fct.gallery.location import Location
from fct.gallery.parquet_files import parquet_writer
from fct.types import Indices

if TYPE_CHECKING:
    from pyiceberg.manifest import DataFile
    from pyiceberg.partitioning import PartitionField, PartitionSpec
    from pyiceberg.schema import Schema
    from pyiceberg.table import Table

__all__ = ["PartitionWriter", "Partitions", "in_order", "rows_of_shard"]

_ROWS = b"fct.rows"  # of a file's metadata: which of its shard's rows it holds
_MOST = 500  # files that one shard is written to at a time
_BLOCK = 8192
_NAN = float("nan")


@dataclass(frozen=True)
class Partitions:
    """How a table is partitioned: its spec, and the schema whose columns the spec names."""

    spec: PartitionSpec
    schema: Schema

    @classmethod
    def of(cls, table: Table, title: str) -> Partitions | None:
        """None for a table without partitions. Raises FctError for a transform that pyiceberg does not know."""
        from pyiceberg.transforms import UnknownTransform

        spec = table.spec()
        unknown = [str(f.transform) for f in spec.fields if isinstance(f.transform, UnknownTransform)]
        if unknown:
            raise FctError(
                f"destination: {title} is partitioned by {unknown[0]}, which pyiceberg does not know: append to a "
                "table without partitions, and let your engine insert from there"
            )
        return cls(spec, table.schema()) if spec.fields else None

    def __str__(self) -> str:
        return ", ".join(f"{f.name} = {f.transform} of column {f.source_id}" for f in self.spec.fields)

    def keys(self, batch: pa.RecordBatch) -> tuple[Indices, list[tuple[Hashable, ...]]]:
        """(the place of each row's partition in the list, the partitions' values as a manifest keeps them)."""
        codes: Indices = np.zeros(batch.num_rows, np.int64)
        values: list[tuple[Hashable, ...]] = [()]
        for field in self.spec.fields:
            own, known = self._field(field, self._column(batch, field.source_id))
            pairs, codes = np.unique(codes * len(known) + own, return_inverse=True)
            values = [(*values[pair // len(known)], known[pair % len(known)]) for pair in pairs.tolist()]
        return codes, values

    def _column(self, batch: pa.RecordBatch, source: int) -> pa.Array:
        name = self.schema.find_column_name(source) or ""
        if name in batch.schema.names:
            return batch.column(name)
        first, *inner = name.split(".")
        if first not in batch.schema.names:
            return pa.nulls(batch.num_rows)
        return pc.struct_field(batch.column(first), inner)

    def _field(self, field: PartitionField, column: pa.Array) -> tuple[Indices, list[Hashable]]:
        """(the place of each row's value in the list, the values)."""
        from pyiceberg.partitioning import partition_record_value

        kind = self.schema.find_field(field.source_id).field_type
        transformed = field.transform.transform(kind)
        if pa.types.is_null(column.type):
            return np.zeros(len(column), np.int64), [transformed(None)]
        coded = column.dictionary_encode(null_encoding="encode")
        places: dict[Hashable, int] = {}
        which = []
        for value in coded.dictionary.to_pylist():
            key = transformed(partition_record_value(field, value, self.schema))
            which.append(places.setdefault(_NAN if key != key else key, len(places)))
        return np.array(which, np.int64)[coded.indices.to_numpy(zero_copy_only=False)], list(places)

    def data_file(self, table: Table, file: Location, path: str) -> DataFile:
        """The file as a manifest names it: pyiceberg's statistics, and the partition of its first row.

        pyiceberg's own ``add_files`` guesses the partition from statistics, which no bucket has.
        """
        from pyiceberg.io.pyarrow import parquet_file_to_data_file
        from pyiceberg.partitioning import PartitionSpec
        from pyiceberg.typedef import Record

        whole = PartitionSpec(spec_id=self.spec.spec_id)
        plain = table.metadata.model_copy(update={"partition_specs": [whole], "default_spec_id": whole.spec_id})
        found = parquet_file_to_data_file(table.io, plain, path)
        names = {(self.schema.find_column_name(f.source_id) or "").partition(".")[0] for f in self.spec.fields}
        with file.open() as opened, pq.ParquetFile(opened) as parquet:
            have = [name for name in parquet.schema_arrow.names if name in names]
            first = next(parquet.iter_batches(1, columns=have)) if have else _no_columns(1)
        _, (values,) = self.keys(first)
        found[3] = Record(*values)
        return found


def _no_columns(rows: int) -> pa.RecordBatch:
    return pa.record_batch([pa.nulls(rows)], [""])


class PartitionWriter:
    """One shard's rows, each into the file of its partition. A context: its files are whole when it ends.

    folder: where the files are made; ``written``: them and their rows, in the order of their first rows.
    """

    def __init__(self, partitions: Partitions, folder: Path, name: str, title: str) -> None:
        self._partitions, self._folder, self._name, self._title = partitions, folder, name, title
        self._files: dict[tuple[Hashable, ...], tuple[Path, pq.ParquetWriter, list[Indices]]] = {}
        self._rows = 0

    @property
    def written(self) -> Mapping[Path, int]:
        return {path: sum(map(len, rows)) for path, _, rows in self._files.values()}

    def write(self, batches: Batches) -> None:
        try:
            for batch in batches:
                self._add(batch)
        finally:
            self._close()

    def _add(self, batch: pa.RecordBatch) -> None:
        codes, keys = self._partitions.keys(batch)
        order = np.argsort(codes, kind="stable")
        bounds = np.searchsorted(codes[order], np.arange(len(keys) + 1))
        firsts = sorted(range(len(keys)), key=lambda i: int(order[bounds[i]]))
        for i in firsts if batch.num_rows else range(1):
            own = order[bounds[i] : bounds[i + 1]] if batch.num_rows else order
            _, writer, rows = self._file(keys[i] if keys else (), batch.schema)
            writer.write_batch(batch if len(own) == batch.num_rows else batch.take(pa.array(own)))
            rows.append(own + self._rows)
        self._rows += batch.num_rows

    def _file(self, key: tuple[Hashable, ...], schema: pa.Schema) -> tuple[Path, pq.ParquetWriter, list[Indices]]:
        if key not in self._files:
            if len(self._files) == _MOST:
                raise FctError(
                    f"destination: expected at most {_MOST} partitions of {self._title} among the rows of one shard, "
                    f"got more ({self._partitions}): order the source by these columns once, or cut smaller shards "
                    "(--shard-rows), else each of them leaves as many small files"
                )
            path = self._folder / f"{self._name}-{len(self._files)}.parquet"
            self._files[key] = path, parquet_writer(path, schema), []
        return self._files[key]

    def _close(self) -> None:
        for _, writer, rows in self._files.values():
            writer.add_key_value_metadata({_ROWS: _packed(np.concatenate(rows))})
            writer.close()


def _packed(rows: Indices) -> bytes:
    """Ascending numbers as text: their steps, deflated."""
    steps = np.diff(rows, prepend=0).astype("<u4")
    return base64.b64encode(zlib.compress(steps.tobytes(), 6))


def rows_of_shard(file: Location, count: int) -> Indices:
    """Which of its shard's rows a data file holds, in order. count: how many they are.

    Raises:
        FctError: a file that does not say it, or not as it was written.
    """
    try:
        with file.open() as opened:
            said = (pq.read_metadata(opened).metadata or {}).get(_ROWS, b"")
        steps = zlib.decompressobj().decompress(base64.b64decode(said, validate=True), 4 * count)
        rows = np.cumsum(np.frombuffer(steps, "<u4"), dtype=np.int64)
    except (ValueError, zlib.error, pa.ArrowException) as error:
        raise FctError(f"source: {file} does not say which rows of its shard it holds: {error}") from error
    if len(rows) != count:
        raise FctError(f"source: {file} has {count} rows and says which rows {len(rows)} of them are")
    return rows


def in_order(streams: Sequence[Iterator[pa.RecordBatch]], rows: Sequence[Indices]) -> Iterator[pa.RecordBatch]:
    """The rows of a shard's files in the order of their numbers, in bounded memory.

    Raises:
        FctError: numbers that are not each row's once; a file that ends early.
    """
    total, files = sum(map(len, rows)), [_Stream(stream) for stream in streams]
    for first in range(0, total, _BLOCK):
        want = np.arange(first, min(total, first + _BLOCK))
        parts, places = [], []
        for file, own in zip(files, rows, strict=True):
            low, high = np.searchsorted(own, [want[0], want[-1] + 1])
            if high > low:
                parts += file.take(int(high - low))
                places.append(own[low:high])
        found = np.concatenate(places) if places else want[:0]
        order = np.argsort(found, kind="stable")
        if not np.array_equal(found[order], want):
            raise FctError(f"source: the files of one shard do not hold its rows {first} to {want[-1]} once each")
        yield pa.concat_batches(parts).take(pa.array(order))


class _Stream:
    """Batches of which as many rows are taken at a time as are wanted."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches, self._left = batches, None

    def take(self, rows: int) -> list[pa.RecordBatch]:
        found = []
        while rows:
            batch = self._left if self._left is not None else next(self._batches, None)
            if batch is None:
                raise FctError(f"source: a file of a partitioned table ended {rows} rows early")
            self._left = batch.slice(rows) if batch.num_rows > rows else None
            found.append(batch.slice(0, rows))
            rows -= found[-1].num_rows
        return found
