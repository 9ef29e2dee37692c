"""Bare matrices: ``.npy``, and ``.fbin``/``.u8bin``/``.i8bin`` of the big-ann-benchmarks.

Files are streamed with plain reads into our own buffers, never mapped: memory stays bounded whatever the file's size,
and a file that turns out shorter than its header is an error, not a SIGBUS. All offsets are 64-bit: fbin's header
holds n and d as 32-bit numbers, and their product overflows one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fct.errors import FctError
from fct.gallery.file_gallery import FileDestination, FileSource
from fct.gallery.interfaces import VECTOR_KEY, Batches, Piece, Shard
from fct.gallery.location import Location
from fct.gallery.members import READ, native_name
from fct.gallery.recycler import Recycler
from fct.gallery.urls import without_query
from fct.gallery.vectors import vector_block, vector_dim
from fct.packed_int4 import PackedInt4, int4_codes_of
from fct.spaces import EmbeddingSpace
from fct.types import Array, NumpyDType

if TYPE_CHECKING:
    from typing_extensions import Buffer


__all__ = [
    "ROW",
    "BinDestination",
    "BinSource",
    "Facts",
    "MatrixSource",
    "NpyDestination",
    "NpySource",
    "Stream",
    "matrix_batch",
    "npy_header",
    "read_npy_header",
]

ROW = "row"  # the column of row numbers of a gallery that has no ids of its own
_BIN: dict[str, NumpyDType] = {".fbin": np.dtype("<f4"), ".u8bin": np.dtype("u1"), ".i8bin": np.dtype("i1")}
_HEADER = 128


class Stream(Protocol):
    """What a store's or an archive's file is read by."""

    def read(self, size: int = -1, /) -> bytes: ...
    def readinto(self, buffer: Buffer, /) -> int | None: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...


def npy_header(shape: tuple[int, int], dtype: NumpyDType) -> bytes:
    """A version 1.0 .npy header of exactly 128 bytes, so that it can be written after the data."""
    text = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': ({shape[0]}, {shape[1]}), }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", _HEADER - 10) + text.ljust(_HEADER - 11).encode() + b"\n"


class Facts(NamedTuple):
    """A matrix in a file: its shape and dtype, where its first row begins, whether it lies column by column.

    inside: the member of an archive whose stream the offset counts in; "" for the file itself.
    int4: how many 4-bit codes the d bytes of a row hold; 0 where they are no codes.
    """

    n: int
    d: int
    dtype: NumpyDType
    offset: int
    fortran: bool = False
    inside: str = ""
    int4: int = 0


class MatrixSource(FileSource):
    """An (n, d) matrix behind a header."""

    @cached_property
    def _memory(self) -> Recycler:
        return Recycler()

    def _facts(self, file: Location) -> Facts:
        """What the header says, checked against the file's real size."""
        facts = self._header(file)
        n, d, dtype, offset = facts[:4]
        if native_name(dtype) not in READ:
            raise FctError(f"source: expected floats of 16 to 64 bits or 8-bit integers in {file}, got {dtype}")
        size, want = file.version().bytes, offset + n * d * dtype.itemsize
        if size < want:
            raise FctError(
                f"source: {file} is truncated: its header says ({n}, {d}) {dtype}, {want} bytes, the file has {size}"
            )
        if size > want or d < 1:  # rows that the header does not count would be lost without a word
            raise FctError(
                f"source: {file} has a wrong header: it says ({n}, {d}) {dtype}, {want} bytes, the file has {size}"
            )
        return facts

    def _header(self, file: Location) -> Facts:
        raise NotImplementedError

    def file_schema(self, file: Location) -> pa.Schema:
        facts = self._facts(file)
        if facts.int4:
            return pa.schema({"vector": pa.list_(pa.int8(), facts.int4)})
        return pa.schema({"vector": pa.list_(pa.from_numpy_dtype(facts.dtype.newbyteorder("=")), facts.d)})

    def groups(self, file: Location) -> list[int]:
        return [self._facts(file).n]

    @contextmanager
    def _stream(self, file: Location, facts: Facts, at: int) -> Iterator[Stream]:
        """What the matrix is read from, standing at a byte."""
        with file.open() as stream:
            stream.seek(at)
            yield stream

    def read_file(self, file: Location, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches:
        facts = self._facts(file)
        n, d, dtype, offset, fortran = facts[:5]
        native = dtype.newbyteorder("=")
        with self._stream(file, facts, offset + start * d * dtype.itemsize) as stream:
            while rows:
                take = min(rows, batch_rows)
                if fortran:
                    block = _transposed(stream, file, offset, n, slice(start, start + take), d, dtype)
                else:
                    block = self._memory.empty((take, d), native)
                    _fill(stream, block, file)
                if not dtype.isnative:
                    block.byteswap(inplace=True)
                yield matrix_batch(PackedInt4(block, facts.int4).codes() if facts.int4 else block)
                start, rows = start + take, rows - take


def matrix_batch(block: Array) -> pa.RecordBatch:
    """(n, d) rows in the machine's byte order as a batch of one column, ``vector``, without a copy."""
    child = pa.Array.from_buffers(pa.from_numpy_dtype(block.dtype), block.size, [None, pa.py_buffer(block)])
    return pa.RecordBatch.from_arrays([pa.FixedSizeListArray.from_arrays(child, block.shape[1])], ["vector"])


def _fill(stream: Stream, block: Array, file: Location) -> None:
    view = block.data.cast("B")
    while view.nbytes:
        count = stream.readinto(view)
        if not count:
            raise FctError(f"source: {file} is truncated: it ended {view.nbytes} bytes early")
        view = view[count:]


def _transposed(stream: Stream, file: Location, offset: int, n: int, rows: slice, d: int, dtype: NumpyDType) -> Array:
    """Rows of a matrix that lies column by column: a run of each column, turned. In the file's byte order still."""
    columns = np.empty((d, rows.stop - rows.start), dtype.newbyteorder("="))
    for i in range(d):
        stream.seek(offset + (i * n + rows.start) * dtype.itemsize)
        _fill(stream, columns[i], file)
    return np.ascontiguousarray(columns.T)


def read_npy_header(stream: Stream, location: str) -> tuple[tuple[int, ...], bool, NumpyDType, int]:
    """(shape, Fortran order, dtype, bytes of the header) of an .npy stream. location: names it in a message."""
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version in ((2, 0), (3, 0)):  # 3.0 is 2.0 with field names in UTF-8, which a plain dtype lacks
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"version {version}")
    except OSError:
        raise
    except Exception as error:  # numpy's parser of a damaged header raises what it likes, tokenize's errors too
        raise FctError(
            f"source: expected a whole .npy file, {location} has no readable header ({error}): was its writer killed?"
        ) from error
    return tuple(int(n) for n in shape), bool(fortran), np.dtype(dtype), int(stream.tell())


class NpySource(MatrixSource):
    kind = "npy"
    suffixes = (".npy",)

    def _header(self, file: Location) -> Facts:
        with file.open() as stream:
            shape, fortran, dtype, offset = read_npy_header(stream, str(file))
        if dtype.hasobject:
            raise FctError(f"source: expected numbers in {file}, got pickled objects, which are never loaded")
        codes = int4_codes_of(dtype)
        if codes is not None and len(shape) == 1:
            return Facts(shape[0], (codes + 1) // 2, np.dtype(np.uint8), offset, int4=codes)
        if len(shape) != 2:
            raise FctError(
                f"source: expected (n, d) rows in {file}, got {shape} {dtype.descr if dtype.names else dtype}"
            )
        return Facts(shape[0], shape[1], dtype, offset, fortran)


class BinSource(MatrixSource):
    kind = "bin"
    suffixes = tuple(_BIN)

    def _header(self, file: Location) -> Facts:
        dtype = _BIN["." + without_query(file.path).rpartition(".")[2]]
        with file.open() as stream:
            head = np.empty(2, "<u4")
            _fill(stream, head, file)
        n, d = (int(x) for x in head)
        return Facts(n, d, dtype, 8)


class _MatrixDestination(FileDestination):
    """Vectors alone in the file; other columns go to ``_rows/part-….parquet``, row by row beside them.

    Row numbers are written only for a shard with rejected rows: everywhere else they are simply the next ones.
    """

    columns = False
    header_bytes = 0

    def write_file(self, path: Path, shard: Shard, batches: Batches, files: dict[str, Path]) -> None:
        n, d, dtype = 0, 0, np.dtype(np.float32)
        beside: pq.ParquetWriter | None = None
        beside_path = path.with_name(path.stem + ".parquet")
        numbers: list[int] = []
        try:
            # Plain writes, not a map: a full disk is an error at the write instead of a SIGBUS. The header comes
            # last: a file that a crash tore has none, and no reader takes it for a whole one.
            with open(path, "wb") as file:
                file.write(bytes(self.header_bytes))
                for batch in batches:
                    name = batch.schema.metadata[VECTOR_KEY].decode()
                    column = batch.column(name)
                    d = vector_dim(column) or d
                    values = vector_block(column, d).values
                    dtype = values.dtype
                    if values.size:
                        file.write(np.ascontiguousarray(values).data.cast("B"))
                    n += len(values)
                    others = batch.drop_columns([name])
                    if others.schema.names == [ROW] and others.schema.types == [pa.int64()]:
                        numbers.append(others.column(0))
                    elif others.num_columns:
                        beside = beside or pq.ParquetWriter(beside_path, others.schema)
                        beside.write_batch(others)
                file.seek(0)
                file.write(self.header(n, d, dtype))
        finally:
            if beside is not None:
                beside.close()
        # What the place of a row says already is left out: numbers that count on. Not a column that a user calls so.
        counted = pa.chunked_array([np.arange(shard.first, shard.first + shard.rows)])
        own = bool(numbers) and not pa.chunked_array(numbers).equals(counted)
        if own:
            pq.write_table(pa.table({ROW: pa.chunked_array(numbers)}), beside_path)
        if beside is not None or own:
            files[f"_rows/{beside_path.name}"] = beside_path

    def header(self, n: int, d: int, dtype: NumpyDType) -> bytes:
        raise NotImplementedError


class NpyDestination(_MatrixDestination):
    kind = "npy"
    suffix = ".npy"
    header_bytes = _HEADER

    def header(self, n: int, d: int, dtype: NumpyDType) -> bytes:
        return npy_header((n, d), dtype)


class BinDestination(_MatrixDestination):
    kind = "bin"
    suffix = ".fbin"
    header_bytes = 8

    def begin(self, schema: pa.Schema, space: EmbeddingSpace) -> None:
        kind = schema.field(schema.metadata[VECTOR_KEY].decode()).type
        if kind.value_type != pa.float32():
            raise ValueError(f"dtype: expected float32 for .fbin, got {kind.value_type}")
        super().begin(schema, space)

    def header(self, n: int, d: int, dtype: NumpyDType) -> bytes:
        return struct.pack("<II", n, d)
