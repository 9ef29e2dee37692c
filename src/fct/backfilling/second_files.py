"""Files by pyarrow.dataset, by numpy and by their headers: the second reader of what lies there as it is."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from typing import IO, Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from fct.backfilling.row_reader import BATCH_ROWS, RowReader, vector_batch
from fct.errors import FctError
from fct.extras import need
from fct.gallery.arrow_stream import ArrowStreamSource
from fct.gallery.clip_folder import ClipSource
from fct.gallery.file_gallery import FileSource
from fct.gallery.location import Location
from fct.gallery.urls import without_query
from fct.gallery.vectors import rebatch
from fct.gallery.vortex_files import open_vortex
from fct.types import Array, NumpyDType

__all__ = ["ClipReader", "FileReader", "StreamReader", "VortexReader", "columns_of_file", "listed_files", "npy_blocks"]

_DATASETS = {"parquet": "parquet", "arrow": "ipc"}
_BIN = {".fbin": "<f4", ".u8bin": "u1", ".i8bin": "i1"}
_BROKEN = (pa.ArrowException, OSError, ValueError, IndexError, EOFError)


class FileReader(RowReader):
    """Files of Parquet, Arrow, .npy or .fbin below one place, listed anew."""

    def __init__(self, source: FileSource) -> None:
        self.kind = source.kind
        self.by = {"parquet": "pyarrow.dataset", "arrow": "pyarrow.ipc"}.get(source.kind, "numpy")
        self.files = listed_files(source)
        self._partitioned = source.partitioned_name

    def counts(self) -> dict[str, int]:
        return {name: _count(self.kind, file) for name, file in self.files.items()}

    def read(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        file = self.files[name]
        if self.kind in _DATASETS:
            yield from columns_of_file(self.kind, file, columns, self._partitioned(file))
            return
        blocks = npy_blocks(file) if self.kind == "npy" else _bin_blocks(file)
        yield from (vector_batch(block) for block in blocks)


def listed_files(source: FileSource) -> dict[str, Location]:
    """Every file of the gallery's kind by its name in it; hidden names are no data, but ``_lang=de`` is a partition."""
    where = source.location
    if where.is_local and not where.is_pattern and os.path.isdir(where.path):
        paths = [os.path.join(top, name) for top, _, names in os.walk(where.path) for name in names]
    elif where.is_pattern or where.is_folder():
        paths = [file.path for file in where.find()]
    else:
        paths = [where.path]
    found = [where.at(path) for path in paths if without_query(path).endswith(source.suffixes)]
    return {source.name_of(f): f for f in found if not _hidden(FileSource.name_of(source, f).split("/"))}


def _hidden(parts: Sequence[str]) -> bool:
    *folders, file = parts
    return file.startswith(("_", ".")) or any(f.startswith((".", "_")) and "=" not in f for f in folders)


class VortexReader(RowReader):
    """Each file as vortex streams it whole, its rows counted one by one."""

    by = "vortex"

    def __init__(self, source: FileSource) -> None:
        self._vortex = need("vortex", "verify")
        self.files = listed_files(source)
        self._partitioned = source.partitioned_name

    def counts(self) -> dict[str, int]:
        return {name: sum(b.num_rows for b in self._stream(name)) for name in self.files}

    def _stream(self, name: str) -> Iterator[pa.RecordBatch]:
        yield from open_vortex(self._vortex, self.files[name]).to_arrow()

    def read(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return (b.select([c for c in columns if c in b.schema.names]) for b in self._stream(name))


# ---- Parquet and Arrow ----
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
            return _npy_header(opened)[0][0]
    except _BROKEN as error:
        raise FctError(f"{file} cannot be counted: {error}") from error


def _dataset(kind: str, file: Location) -> pa.dataset.Dataset:
    where = {} if file.is_local else {"filesystem": file.fs}
    return ds.dataset(file.path, format=_DATASETS[kind], **where)


def columns_of_file(kind: str, file: Location, wanted: Sequence[str], name: str = "") -> Iterator[pa.RecordBatch]:
    """These columns of one file. name: its path below the gallery, whose folders may hold columns (``lang=de/``)."""
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
    if kind == "arrow":
        yield from _of_arrow_file(file, wanted)
        return
    dataset = _dataset(kind, file)
    have = [n for n in wanted if n in dataset.schema.names]
    yield from dataset.to_batches(columns=have, batch_size=BATCH_ROWS, use_threads=False)


def _of_arrow_file(file: Location, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Batch by batch, in this thread: pyarrow.dataset (26.0) reads ahead, and now and then ended the process."""
    with file.open() as opened:
        names = pa.ipc.open_file(pa.PythonFile(opened, mode="r")).schema.names
        options = pa.ipc.IpcReadOptions(included_fields=[i for i, name in enumerate(names) if name in wanted])
        with pa.ipc.open_file(pa.PythonFile(opened, mode="r"), options=options) as batches:
            for number in range(batches.num_record_batches):
                yield batches.get_batch(number)


def _of_folder(value: str | None, rows: int) -> pa.Array:
    if value is None or value == "__HIVE_DEFAULT_PARTITION__":
        return pa.nulls(rows)
    return pa.repeat(pa.scalar(unquote(value)), rows)


# ---- matrices ----
def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, NumpyDType]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return shape, fortran, dtype


def npy_blocks(file: Location | None, stream: Any = None) -> Iterator[Array]:
    """The rows of an .npy file by numpy.load, or of an .npy stream (a member of an archive) as it comes."""
    if file is not None and file.is_local:
        array = np.load(file.path, mmap_mode="r", allow_pickle=False)
        for start in range(0, len(array), BATCH_ROWS):
            yield _codes(array[start : start + BATCH_ROWS])
        return
    with io.BufferedReader(file.open()) if file is not None else stream as opened:
        shape, fortran, dtype = _npy_header(opened)
        if fortran:
            whole = np.frombuffer(opened.read(), dtype).reshape(shape, order="F")
            yield from (whole[at : at + BATCH_ROWS] for at in range(0, shape[0], BATCH_ROWS))
            return
        for start in range(0, shape[0], BATCH_ROWS):
            rows = (min(BATCH_ROWS, shape[0] - start), *shape[1:])
            data = opened.read(int(np.prod(rows)) * dtype.itemsize)
            yield _codes(np.frombuffer(data, dtype).reshape(rows))


def _codes(block: Array) -> Array:
    """Records of 4-bit codes as codes, the low half of each byte first; other rows as they are."""
    if not block.dtype.names:
        return block
    (name,) = block.dtype.names
    halves = block[name]
    pairs = np.stack([halves & 15, halves >> 4], axis=-1).reshape(len(block), -1)
    return ((pairs.astype(np.int8) ^ 8) - 8)[:, : int(name.removeprefix("int4x"))]


def _bin_blocks(file: Location) -> Iterator[Array]:
    dtype = np.dtype(_BIN["." + without_query(file.path).rpartition(".")[2]])
    with io.BufferedReader(file.open()) as opened:
        n, d = (int(x) for x in np.frombuffer(opened.read(8), "<u4"))
        for start in range(0, n, BATCH_ROWS):
            rows = min(BATCH_ROWS, n - start)
            yield np.frombuffer(opened.read(rows * d * dtype.itemsize), dtype).reshape(rows, d)


# ---- what is made of several ----
class ClipReader(RowReader):
    """clip-retrieval's folder: numpy's matrices and pyarrow's metadata, joined by the number in their names."""

    by = "numpy and pyarrow.dataset"

    def __init__(self, source: ClipSource) -> None:
        self._files: dict[str, dict[str, Location]] = {}
        for folder in source.location.folders():
            if folder not in ("img_emb", "text_emb", "metadata"):
                continue
            place = source.location / folder
            for name in place.files():
                if name.startswith(f"{folder}_"):
                    number = int(name.removeprefix(f"{folder}_").partition(".")[0])
                    self._files.setdefault(f"shard-{number}", {})[folder] = place / name

    def counts(self) -> dict[str, int]:
        found = {}
        for name, files in self._files.items():
            rows = {_count("parquet" if folder == "metadata" else "npy", f) for folder, f in files.items()}
            if len(rows) != 1:
                raise FctError(f"the files of {name} have {', '.join(map(str, sorted(rows)))} rows")
            found[name] = rows.pop()
        return found

    def read(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        streams, names = [], []
        for folder, file in self._files[name].items():
            if folder == "metadata":
                known = [c for c in columns if c not in self._files[name]]
                streams.append(rebatch(columns_of_file("parquet", file, known), BATCH_ROWS))
                names += known
            else:
                streams.append(vector_batch(block) for block in npy_blocks(file))
                names.append(folder)
        for parts in zip(*streams, strict=True):
            yield pa.RecordBatch.from_arrays([c for part in parts for c in part.columns], names)


class StreamReader(RowReader):
    """A stream from Python, made anew and read as it comes."""

    by = "pyarrow"

    def __init__(self, source: ArrowStreamSource) -> None:
        self._source = source

    def counts(self) -> dict[str, int]:
        (piece,) = self._source.pieces()
        return {piece.name: sum(batch.num_rows for batch in self._source.open())}

    def read(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for batch in self._source.open():
            yield batch.select(list(columns))
