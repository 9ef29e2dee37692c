"""Arrays in containers by the libraries that wrote them: numpy.load, h5py, zarr; row by row as they slice."""

from __future__ import annotations

import contextlib
import io
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fct.backfilling.row_reader import BATCH_ROWS, RowReader, vector_batch
from fct.backfilling.second_files import listed_files, npy_blocks
from fct.errors import FctError
from fct.extras import need
from fct.gallery.location import Location
from fct.gallery.members import READ, MemberSource
from fct.types import Array, JsonDict, NumpyDType

__all__ = ["Hdf5Reader", "NpzReader", "ZarrReader"]


class _Reader(RowReader):
    def __init__(self, source: MemberSource) -> None:
        self.member = source.member.strip("/")
        self.files = (
            {source.name_of(source.location): source.location} if source.kind == "zarr" else listed_files(source)
        )

    @abstractmethod
    def shape(self, file: Location) -> tuple[int, ...]:
        """Of the array that holds the rows."""

    @abstractmethod
    def blocks(self, file: Location) -> Iterator[Array]:
        """Its rows."""

    def counts(self) -> dict[str, int]:
        try:
            return {name: int(self.shape(file)[0]) for name, file in self.files.items()}
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise FctError(f"{next(iter(self.files))} cannot be counted by {self.by}: {error}") from error

    def read(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        yield from (vector_batch(block) for block in self.blocks(self.files[name]))

    def pick(self, shapes: dict[str, tuple[tuple[int, ...], NumpyDType]]) -> str:
        """The member that was named, or the only one of rows."""
        rows = [n for n, (shape, kind) in shapes.items() if len(shape) == 2 and kind.newbyteorder("=").name in READ]
        return self.member or rows[0]


class NpzReader(_Reader):
    """Whole members by numpy.load where they lie column by column, else as their stream comes."""

    by = "numpy.load"

    @contextlib.contextmanager
    def _open(self, file: Location) -> Iterator[tuple[Any, str]]:
        where = file.path if file.is_local else io.BufferedReader(file.open())
        with np.load(where, allow_pickle=False) as archive:
            yield archive, self.pick({name: _facts(archive, name) for name in archive.files})

    def shape(self, file: Location) -> tuple[int, ...]:
        with self._open(file) as (archive, name):
            return _facts(archive, name)[0]

    def blocks(self, file: Location) -> Iterator[Array]:
        with self._open(file) as (archive, name):
            yield from npy_blocks(None, archive.zip.open(f"{name}.npy"))


def _facts(archive: Any, name: str) -> tuple[tuple[int, ...], NumpyDType]:
    with archive.zip.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        return shape, dtype


class _Sliced(_Reader):
    """Arrays that are read by slicing them, as h5py's and zarr's are."""

    @abstractmethod
    def opened(self, file: Location) -> contextlib.AbstractContextManager[Any]:
        """The array."""

    def shape(self, file: Location) -> tuple[int, ...]:
        with self.opened(file) as array:
            return tuple(array.shape)

    def blocks(self, file: Location) -> Iterator[Array]:
        with self.opened(file) as array:
            chunk = int(array.chunks[0]) if array.chunks else BATCH_ROWS
            step = max(1, BATCH_ROWS // chunk) * chunk
            for start in range(0, array.shape[0], step):
                yield _decoded(np.asarray(array[start : start + step]), dict(array.attrs))


def _decoded(block: Array, attrs: JsonDict) -> Array:
    """Codes as the CF conventions' attributes say, rounded once; other values as they are."""
    if block.dtype.kind not in "iu" or not {"scale_factor", "add_offset"} & attrs.keys():
        return block
    fill = attrs.get("_FillValue")
    if str(attrs.get("_Unsigned", "")).lower() == "true" and block.dtype.kind == "i":
        block = block.astype(block.dtype.str.replace("i", "u"))
        fill = None if fill is None else int(fill) % (1 << 8 * block.dtype.itemsize)
    scale, offset = (
        np.asarray(attrs.get(name, plain), np.float64).reshape(-1)
        for name, plain in (("scale_factor", 1), ("add_offset", 0))
    )
    values = (block * scale + offset).astype(np.float32)
    return values if fill is None else np.where(block == fill, np.float32(np.nan), values)


class Hdf5Reader(_Sliced):
    by = "h5py"

    @contextlib.contextmanager
    def opened(self, file: Location) -> Iterator[Any]:
        h5py = need("h5py", "verify")
        with h5py.File(file.path if file.is_local else file.open(), "r") as root:
            shapes: dict[str, tuple[tuple[int, ...], NumpyDType]] = {}

            def note(name: str, node: Any) -> None:
                if isinstance(node, h5py.Dataset) and node.shape is not None:
                    shapes[name] = node.shape, node.dtype

            if not self.member:
                root.visititems(note)
            yield root[self.pick(shapes)]


class ZarrReader(_Sliced):
    by = "zarr"

    @contextlib.contextmanager
    def opened(self, file: Location) -> Iterator[Any]:
        zarr = need("zarr", "verify")
        root = zarr.open(os.fspath(file.path) if file.is_local else file.fs.get_mapper(file.path), mode="r")
        if hasattr(root, "arrays") and not self.member:
            root = root[self.pick(dict(_shapes(root, "")))]
        yield root[self.member] if self.member else root


def _shapes(group: Any, prefix: str) -> Iterator[tuple[str, tuple[tuple[int, ...], NumpyDType]]]:
    yield from ((f"{prefix}{name}", (tuple(a.shape), np.dtype(a.dtype))) for name, a in group.arrays())
    for name, inner in group.groups():
        yield from _shapes(inner, f"{prefix}{name}/")
