"""Tables by their own libraries' scans, at the version that is meant: Delta, Iceberg, Lance, saved ``datasets``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from importlib import import_module

import pyarrow as pa

from fct.backfilling.row_reader import BATCH_ROWS, RowReader, WholeReader
from fct.errors import FctError, MissingExtraError
from fct.extras import need
from fct.gallery.delta_table import DeltaSource
from fct.gallery.iceberg_table import IcebergSource
from fct.gallery.lance_dataset import LanceSource
from fct.gallery.saved_dataset import IndexedDatasetSource, SavedDatasetSource

__all__ = ["DeltaReader", "IcebergReader", "LanceReader", "SavedReader"]


class DeltaReader(WholeReader):
    """deltalake's own engine, which minds deletion vectors and column mapping, and promises no order of rows."""

    by = "deltalake's scan"

    def __init__(self, source: DeltaSource) -> None:
        deltalake = need("deltalake", "verify")
        self._table = deltalake.DeltaTable(
            str(source.location), version=source.version, storage_options=source.storage_options
        )

    def read(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        yield from pa.RecordBatchReader.from_stream(self._table.scan(columns=list(columns)))


class IcebergReader(RowReader):
    """pyiceberg's scan, asked for one data file after the other: of all at once it would hold every row."""

    by = "pyiceberg's scan"

    def __init__(self, source: IcebergSource) -> None:
        self._source, (self._table, _) = source, source._opened()
        self._version = source.version
        self._tasks = {source._inside(task.file.file_path): task for task in self._scan(("*",)).plan_files()}

    def _scan(self, columns: tuple[str, ...]) -> pa.RecordBatchReader:
        return self._table.scan(snapshot_id=self._version, selected_fields=columns)

    def _of_one(self, name: str, columns: tuple[str, ...]) -> pa.RecordBatchReader:
        one = copy.copy(self._scan(columns))
        one.plan_files = lambda: [self._tasks[name]]
        return one

    def counts(self) -> dict[str, int]:
        return {name: self._count(name) for name in self._tasks}

    def _count(self, name: str) -> int:
        return int(self._of_one(name, ("*",)).count())

    def read(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        yield from self._source.put_in_order(
            name, lambda file: iter(self._of_one(file, tuple(columns)).to_arrow_batch_reader()), self._count
        )


class LanceReader(RowReader):
    """Lance's own count and its scanner."""

    by = "Lance's scanner"

    def __init__(self, source: LanceSource) -> None:
        self._dataset = source._dataset(source.version)

    def counts(self) -> dict[str, int]:
        return {f"fragment-{f.fragment_id}": f.count_rows() for f in self._dataset.get_fragments()}

    def read(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        have = [c for c in columns if c in self._dataset.schema.names]
        fragment = self._dataset.get_fragment(int(name.rpartition("-")[2]))
        scanner = self._dataset.scanner(
            columns=have, fragments=[fragment], batch_size=BATCH_ROWS, scan_in_order=True
        )  # fmt: skip
        yield from scanner.to_batches()


class SavedReader(RowReader):
    """``datasets.load_from_disk``, its rows counted file by file and taken by slices."""

    by = "datasets.load_from_disk"

    def __init__(self, source: SavedDatasetSource) -> None:
        datasets = _datasets()
        if not source.location.is_local:
            raise MissingExtraError(f"datasets reads {source.location} through a copy of its own, which is not made")
        self._whole = datasets.load_from_disk(source.location.path)
        files = [str(entry["filename"]) for entry in self._whole.cache_files]
        self._starts: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        if isinstance(source, IndexedDatasetSource):  # which datasets wrote once, and reads no longer
            parts = (datasets.Dataset.from_file(place.path).data.column(0).to_pylist() for place in source.indices)
            self._whole = self._whole.select([row for part in parts for row in part], keep_in_memory=True)
            self._starts["indices"], self._counts["indices"] = 0, len(self._whole)
            return
        at = 0
        for file in files:
            name = file.replace("\\", "/").rpartition("/")[2]
            self._starts[name], self._counts[name] = at, int(datasets.Dataset.from_file(file).num_rows)
            at += self._counts[name]
        if at != len(self._whole):
            raise FctError(
                f"datasets.load_from_disk has {len(self._whole)} rows of {source.location}, its files have {at}"
            )

    def counts(self) -> dict[str, int]:
        return dict(self._counts)

    def read(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        rows = self._whole.select_columns([c for c in columns if c in self._whole.column_names]).with_format("arrow")
        start, end = self._starts[name], self._starts[name] + self._counts[name]
        for at in range(start, end, BATCH_ROWS):
            yield from rows[at : min(end, at + BATCH_ROWS)].to_batches()


def _datasets() -> pa.RecordBatchReader:
    try:
        return import_module("datasets")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "a saved dataset is read a second time by datasets, which is not installed: pip install datasets",
            name="datasets",
        ) from error
