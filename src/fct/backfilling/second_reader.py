"""A gallery read by another way than a backfill reads it: its rows counted, its columns streamed, by the format's own
libraries. What a fault of fct's readers did to a gallery does not happen here a second time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from fct.errors import FctError
from fct.gallery.file_gallery import FileSource
from fct.gallery.interfaces import Source
from fct.gallery.location import Location
from fct.gallery.schemas import conform

__all__ = ["SecondReader", "columns_of_file", "second_reader"]

_BATCH_ROWS = 8192
_DATASETS = {"parquet": "parquet", "arrow": "ipc"}


class SecondReader:
    """Files of Parquet, Arrow, .npy or .fbin below one place, by pyarrow.dataset and by their headers."""

    def __init__(self, source: FileSource) -> None:
        self._source, self._fs = source, source.where.fs
        self.files = {source.name_of(file): file for file in self._listed()}

    def _listed(self) -> list[Location]:
        """Every file of the gallery's kind, listed anew; hidden names are no data, but ``_lang=de`` is a partition."""
        where, endings = self._source.where, self._source.suffixes
        if where.is_local and not where.is_pattern and os.path.isdir(where.path):
            paths = [os.path.join(top, name) for top, _, names in os.walk(where.path) for name in names]
        elif where.is_pattern or where.is_folder():
            paths = [file.path for file in where.find()]
        else:
            paths = [where.path]
        found = [where.at(path) for path in paths if path.endswith(endings)]
        return [file for file in found if not _hidden(self._source.name_of(file).split("/"))]

    def counts(self) -> dict[str, int]:
        """Rows of each file, by its name in the gallery."""
        return {name: _count(self._source.kind, file) for name, file in self.files.items()}

    def columns(self, names: Sequence[str], wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns of these files, in order and under one schema; a column that a file lacks is null."""
        schema = pa.schema([self._source.schema.field(name) for name in wanted])
        for name in names:
            file = self.files[name]
            for batch in columns_of_file(self._source.kind, file, wanted, self._source.partitioned_name(file)):
                yield conform(batch, schema)


def second_reader(source: Source) -> SecondReader | LanceReader | None:
    """Another way to read the gallery, or None where there is no other."""
    if isinstance(source, FileSource) and source.of_log:
        return None  # the folder holds rows that are the table's no longer
    if isinstance(source, FileSource) and (source.kind in _DATASETS or source.kind in ("npy", "bin")):
        return SecondReader(source)
    return LanceReader(source) if source.kind == "lance" else None


class LanceReader:
    """A Lance dataset, by its own count and its own scanner."""

    def __init__(self, source: Any) -> None:
        self._dataset = source._dataset(source.version)

    def counts(self) -> dict[str, int]:
        return {f"fragment-{f.fragment_id}": f.count_rows() for f in self._dataset.get_fragments()}

    def columns(self, names: Sequence[str], wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        have = [name for name in wanted if name in self._dataset.schema.names]
        yield from self._dataset.scanner(columns=have, batch_size=_BATCH_ROWS, scan_in_order=True).to_batches()


def _hidden(parts: Sequence[str]) -> bool:
    *folders, file = parts
    return file.startswith(("_", ".")) or any(f.startswith((".", "_")) and "=" not in f for f in folders)


def _is_stream(file: Location) -> bool:
    with file.open() as opened:
        return bytes(opened.read(6)) != b"ARROW1"


def _count(kind: str, file: Location) -> int:
    try:
        if kind == "arrow" and _is_stream(file):
            with file.open() as opened, pa.ipc.open_stream(pa.PythonFile(opened, mode="r")) as stream:
                return sum(batch.num_rows for batch in stream)
        if kind in _DATASETS:
            return int(_dataset(kind, file).count_rows())
        with file.open() as opened:
            if kind == "bin":
                return int(np.frombuffer(bytes(opened.read(8)), "<u4")[0])
            version = np.lib.format.read_magic(opened)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return int(read(opened)[0][0])
    except (pa.ArrowException, OSError, ValueError, IndexError, EOFError) as error:
        raise FctError(f"{file} cannot be counted: {error}") from error


def _dataset(kind: str, file: Location) -> Any:
    where = {} if file.is_local else {"filesystem": file.fs}
    return ds.dataset(file.path, format=_DATASETS[kind], **where)


def columns_of_file(kind: str, file: Location, wanted: Sequence[str], name: str = "") -> Iterator[pa.RecordBatch]:
    """These columns of one file. name: its path below the gallery, whose folders may hold columns (``lang=de/``)."""
    if kind not in _DATASETS:
        return
    pairs = (part.split("=", 1) for part in name.split("/")[:-1] if "=" in part)
    folders = {unquote(key): value for key, value in pairs}
    for batch in _batches(kind, file, wanted):
        arrays = [
            batch.column(n) if n in batch.schema.names else _of_folder(folders.get(n), batch.num_rows) for n in wanted
        ]
        yield pa.RecordBatch.from_arrays(arrays, names=list(wanted))


def _batches(kind: str, file: Location, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
    if kind == "arrow" and _is_stream(file):
        with file.open() as opened, pa.ipc.open_stream(pa.PythonFile(opened, mode="r")) as stream:
            yield from stream
        return
    dataset = _dataset(kind, file)
    have = [n for n in wanted if n in dataset.schema.names]
    yield from dataset.to_batches(columns=have, batch_size=_BATCH_ROWS, use_threads=False)


def _of_folder(value: str | None, rows: int) -> pa.Array:
    if value is None or value == "__HIVE_DEFAULT_PARTITION__":
        return pa.nulls(rows)
    return pa.repeat(pa.scalar(unquote(value)), rows)
