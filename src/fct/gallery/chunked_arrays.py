"""Arrays in HDF5 files and Zarr stores, by h5py and zarr: (n, d) rows, read in whole chunks where those are small.

Integers with the attributes ``scale_factor`` or ``add_offset`` (the CF conventions, as netCDF and xarray write them)
are codes: what is handed on is code * scale_factor + add_offset, rounded to float32 once, and a row that holds the
array's ``_FillValue`` has no values.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from fct.errors import FctError
from fct.extras import need
from fct.gallery.discovery import check_readable
from fct.gallery.interfaces import Batches, Piece
from fct.gallery.location import Location, Version
from fct.gallery.matrix_files import matrix_batch
from fct.gallery.members import READ, MemberSource, native_name, pick_member, require_matrix
from fct.types import Array, NumpyDType

__all__ = ["ChunkedSource", "Hdf5Source", "ZarrSource", "is_zarr"]

_AT_ONCE = 32 << 20  # bytes that are read at once, in whole chunks
_LARGE_CHUNK = 256 << 20  # a chunk beyond this is not read whole for its sake
_GROUP_ROWS, _GROUPS = 4096, 100_000
_CODES = ("int8", "uint8", "int16", "uint16")
_ZARR_MARKS = ("zarr.json", ".zarray", ".zgroup")


class Stored(Protocol):
    """What h5py and zarr have in common."""

    shape: tuple[int, ...]
    dtype: NumpyDType
    chunks: tuple[int, ...] | None

    @property
    def attrs(self) -> Mapping[str, object]: ...

    def __getitem__(self, at: slice) -> Array: ...


@dataclass(frozen=True)
class _Coding:
    """The attributes that say what codes stand for. fill: the code that stands for nothing, or None."""

    scale: Array
    offset: Array
    fill: float | None
    unsigned: bool

    def decoded(self, codes: Array) -> Array:
        if self.unsigned and codes.dtype.kind == "i":
            codes = codes.view(codes.dtype.str.replace("i", "u"))
        values = (codes * self.scale + self.offset).astype(np.float32)
        if self.fill is not None:
            values[codes == self.fill] = np.nan
        return values


def _coding(array: Stored, context: str) -> _Coding | None:
    """How an array of integers is decoded; None where it says nothing."""
    attrs = dict(array.attrs)
    if array.dtype.kind not in "iu" or not {"scale_factor", "add_offset"} & attrs.keys():
        return None
    d = array.shape[1] if len(array.shape) == 2 else 1
    found = {}
    for name, default in (("scale_factor", 1.0), ("add_offset", 0.0), ("_FillValue", np.nan)):
        try:
            value = np.asarray(attrs.get(name, default), np.float64).reshape(-1)
        except (TypeError, ValueError):
            value = np.empty(0)
        if value.size not in ((1,) if name == "_FillValue" else (1, d)) or (
            name != "_FillValue" and not np.isfinite(value).all()
        ):
            raise FctError(
                f"source: expected a finite number or one for each of the {d} dimensions as {name} of {context}, got "
                f"{attrs.get(name)!r:.80}"
            )
        found[name] = value
    fill = float(found["_FillValue"][0])
    unsigned = str(attrs.get("_Unsigned", "")).lower() == "true"
    if unsigned and fill < 0:
        fill += 2.0 ** (8 * array.dtype.itemsize)
    return _Coding(found["scale_factor"], found["add_offset"], None if np.isnan(fill) else fill, unsigned)


class ChunkedSource(MemberSource):
    """Arrays in chunks."""

    def flat(self) -> Array:
        """All values of an array of one dimension: labels, ids. Raises FctError for one of more."""
        with self._opened(self.files[0]) as (array, name):
            if len(array.shape) != 1 or np.dtype(array.dtype).kind not in "biuU":
                raise FctError(
                    f"source: expected (n,) integers in {self.files[0]}:{name}, got {array.shape} {array.dtype}"
                )
            values = np.asarray(array[0 : array.shape[0]])
            return np.ascontiguousarray(values, values.dtype.newbyteorder("="))

    @contextlib.contextmanager
    def _array(self, file: Location) -> Iterator[tuple[Stored, _Coding | None]]:
        """The array, open and known to hold rows."""
        with self._opened(file) as (array, name):
            where = f"{file}:{name}" if name else str(file)
            coding = _coding(array, where)
            dtype = native_name(np.dtype(array.dtype))
            require_matrix(where, tuple(array.shape), dtype, read=_CODES if coding is not None else READ)
            yield array, coding

    @abstractmethod
    def _opened(self, file: Location) -> contextlib.AbstractContextManager[tuple[Stored, str]]:
        """(the array that is meant, its path in the file). Raises FctError where it is not there."""

    @property
    def notes(self) -> tuple[str, ...]:
        with self._array(self.files[0]) as (_, coding):
            if coding is None:
                return super().notes
        said = "source: integer codes, read as code * scale_factor + add_offset, as the array's attributes say"
        return (*super().notes, said)

    def file_schema(self, file: Location) -> pa.Schema:
        with self._array(file) as (array, coding):
            dtype = np.dtype(np.float32) if coding is not None else np.dtype(array.dtype).newbyteorder("=")
            return pa.schema({"vector": pa.list_(pa.from_numpy_dtype(dtype), int(array.shape[1]))})

    def groups(self, file: Location) -> list[int]:
        with self._array(file) as (array, _):
            n, chunk = int(array.shape[0]), _chunk_rows(array)
        if chunk == 1 or chunk >= n:
            return [n]
        unit = chunk * max(1, -(-_GROUP_ROWS // chunk), -(-n // (chunk * _GROUPS)))
        return [min(unit, n - at) for at in range(0, n, unit)]

    def read_file(self, file: Location, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches:
        end = start + rows
        with self._array(file) as (array, coding):
            chunk = _chunk_rows(array)
            step = max(1, _AT_ONCE // (int(array.shape[1]) * array.dtype.itemsize) // chunk) * chunk
            if chunk == 1:
                step = max(1, min(step, batch_rows))
            while start < end:
                stop = min(end, (start // step + 1) * step)
                block = np.asarray(array[start:stop])
                if len(block) != stop - start:
                    raise FctError(f"source: {file} is truncated: it ended {end - start - len(block)} rows early")
                rows_ = coding.decoded(block) if coding is not None else block
                rows_ = np.ascontiguousarray(rows_, rows_.dtype.newbyteorder("="))
                for at in range(0, len(rows_), batch_rows):
                    yield matrix_batch(rows_[at : at + batch_rows])
                start = stop


def _chunk_rows(array: Stored) -> int:
    """Rows of a chunk that is read whole; 1 where there are no chunks, or too large ones."""
    if not array.chunks:
        return 1
    rows = int(array.chunks[0])
    return 1 if rows * int(array.shape[1]) * array.dtype.itemsize > _LARGE_CHUNK else max(1, rows)


class Hdf5Source(ChunkedSource):
    """ann-benchmarks' files among them: ``glove-100-angular.hdf5:/train``."""

    kind = "hdf5"
    suffixes = (".hdf5", ".h5")

    @contextlib.contextmanager
    def _opened(self, file: Location) -> Iterator[tuple[Stored, str]]:
        h5py = need("h5py", f"source: {file}, an HDF5 file,")
        with contextlib.ExitStack() as stack:
            opened = file.path if file.is_local else stack.enter_context(file.open())
            try:
                root = stack.enter_context(h5py.File(opened, "r"))
            except FileNotFoundError:
                raise
            except OSError as error:
                raise FctError(f"source: expected a whole HDF5 file, {file} is not: {error}") from error
            found: dict[str, tuple[tuple[int, ...], str]] = {}

            def note(name: str, node: object) -> None:  # links to other files are not followed
                if isinstance(node, h5py.Dataset) and node.shape is not None:
                    found[name] = (tuple(node.shape), native_name(node.dtype))

            root.visititems(note)
            name = pick_member(file, found, self.member)
            array = root[name]
            if array.external is not None or array.is_virtual:
                raise FctError(f"source: {file}:{name} lies in other files, which are not opened: copy it into one")
            created = array.id.get_create_plist()
            for code in (created.get_filter(i)[0] for i in range(created.get_nfilters())):
                if not h5py.h5z.filter_avail(code):
                    raise FctError(
                        f"source: {file}:{name} is compressed by the HDF5 filter {code}, which h5py lacks here: "
                        "install hdf5plugin and import it first, or write the file with gzip or lzf"
                    )
            yield array, name


def is_zarr(location: Location) -> bool:
    """Whether a folder is a Zarr store, or a group or an array in one."""
    return not location.is_pattern and bool(set(_ZARR_MARKS) & set(location.files()))


class ZarrSource(ChunkedSource):
    """A store of format 2 or 3 as its one file: a folder, whose version is that of all files in the array's own."""

    kind = "zarr"
    suffixes = (".zarr",)
    _looked_at = False

    def find(self) -> list[Location]:
        return [self.location]

    def version_of(self, file: Location) -> Version:
        place = file / self.member.strip("/") if self.member.strip("/") else file
        infos = place._look(lambda: place.fs.find(place.path, detail=True))
        total, size = hashlib.sha256(), 0
        for path, info in sorted(infos.items()):
            stamp = next(
                (info[k] for k in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created") if k in info), ""
            )
            size += int(info["size"] or 0)
            total.update(f"{path[len(place.path) :]} {info['size']} {stamp}\n".encode())
        return Version(size, total.hexdigest()[:32])

    @property
    def notes(self) -> tuple[str, ...]:
        with self._array(self.files[0]) as (array, _):
            lacking = int(getattr(array, "nchunks", 0)) - int(getattr(array, "nchunks_initialized", 0))
        if lacking <= 0:
            return super().notes
        said = (
            f"source: {lacking} chunks of {self.url} are not stored, and read as its fill value: was it written whole?"
        )
        return (*super().notes, said)

    @contextlib.contextmanager
    def _opened(self, file: Location) -> Iterator[tuple[Stored, str]]:
        zarr = need("zarr", f"source: {file}, a Zarr store,")
        if not self._looked_at and file.is_local:  # zarr would wait for a pipe's writer
            for folder, _, names in os.walk(file.path):
                for name in names:
                    check_readable(file.at(os.path.join(folder, name)))
            self._looked_at = True
        store = os.fspath(file.path) if file.is_local else file.fs.get_mapper(file.path)
        try:
            root = zarr.open(store, mode="r")
        except Exception as error:  # zarr's own kinds of errors differ between its versions
            raise FctError(f"source: expected a Zarr store, {file} is not: {error}") from error
        if not hasattr(root, "arrays"):
            if self.member.strip("/"):
                raise FctError(f"source: {file} is one array, and holds none called {self.member!r}: name it alone")
            yield root, ""
            return
        found = {name: (tuple(a.shape), native_name(np.dtype(a.dtype))) for name, a in _arrays_below(root, "")}
        name = pick_member(file, found, self.member)
        yield root[name], name


def _arrays_below(group: Any, prefix: str) -> Iterator[tuple[str, Stored]]:
    for name, array in group.arrays():
        yield f"{prefix}{name}", array
    for name, inner in group.groups():
        yield from _arrays_below(inner, f"{prefix}{name}/")
