"""Members of ``.npz`` archives, streamed: one that is stored is read at its place in the file, one that is compressed
from typing import Any
from typing import IO
from the start, and the next shard goes on where the last one stopped."""

from __future__ import annotations

import contextlib
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fct.errors import FctError
from fct.gallery.location import Location
from fct.gallery.matrix_files import Facts, MatrixSource, read_npy_header
from fct.gallery.members import Found, MemberSource, native_name, pick_member, require_matrix
from fct.types import Array, JsonDict, NumpyDType

__all__ = ["NpzSource"]

_LOCAL_HEADER = 30  # bytes of a zip's local header before the name
Header = tuple[tuple[int, ...], bool, NumpyDType, int]
_IDLE = 4  # readings of compressed members kept for the next shard


class NpzSource(MemberSource, MatrixSource):
    """Arrays of ``.npz`` archives."""

    kind = "npz"
    suffixes = (".npz",)

    def __init__(self, location: Location, files: Sequence[Location], member: str = "") -> None:
        super().__init__(location, files, member)
        self._idle: list[tuple[str, Any]] = []

    def __getstate__(self) -> JsonDict:
        return {**self.__dict__, "_idle": []}

    def flat(self) -> Array:
        """All values of a member of one dimension: labels, ids. Raises FctError for one of more."""
        file = self.files[0]
        with _archive(file) as archive:
            headers = _headers(archive, file)
            found: Found = {name: (shape, native_name(dtype)) for name, (_, (shape, _, dtype, _)) in headers.items()}
            info, (shape, _, dtype, offset) = headers[pick_member(file, found, self.member)]
            if len(shape) != 1 or dtype.kind not in "biuU":
                raise FctError(f"source: expected (n,) integers or text in {self.url}, got {shape} {dtype}")
            values = np.frombuffer(archive.read(info), dtype, offset=offset)
        if values.shape != shape:
            raise FctError(f"source: {self.url} is damaged: its header says {shape}, it holds {values.shape}")
        return values.astype(dtype.newbyteorder("="))

    def _facts(self, file: Location) -> Facts:
        with _archive(file) as archive:
            headers = _headers(archive, file)
            found: Found = {name: (shape, native_name(dtype)) for name, (_, (shape, _, dtype, _)) in headers.items()}
            name = pick_member(file, found, self.member)
            info, (shape, fortran, dtype, offset) = headers[name]
            require_matrix(f"{file}:{name}", *found[name])
            want = offset + shape[0] * shape[1] * dtype.itemsize
            if info.file_size != want:
                raise FctError(
                    f"source: {file}:{name} is damaged: its header says {shape} {dtype}, {want} bytes, the archive has "
                    f"{info.file_size}"
                )
            if info.compress_type == zipfile.ZIP_STORED:
                return Facts(shape[0], shape[1], dtype, _data_offset(file, info) + offset, fortran)
            if fortran:
                raise FctError(
                    f"source: expected rows in C order in a compressed archive, {file}:{name} lies column by column: "
                    "save it with numpy.ascontiguousarray, or by numpy.savez"
                )
            return Facts(shape[0], shape[1], dtype, offset, False, info.filename)

    @contextlib.contextmanager
    def _stream(self, file: Location, facts: Facts, at: int) -> Iterator[Any]:
        if not facts.inside:
            with super()._stream(file, facts, at) as plain:
                yield plain
            return
        stream = self._take(file, facts, at)
        try:
            stream.seek(at)
            yield stream
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise FctError(f"source: {file} is damaged: {error}") from error
        self._idle = [*self._idle, (f"{file.path}:{facts.inside}", stream)][-_IDLE:]

    def _take(self, file: Location, facts: Facts, at: int) -> Any:
        """The idle reading that is nearest before a place, or a new one."""
        name = f"{file.path}:{facts.inside}"
        behind = [entry for entry in self._idle if entry[0] == name and entry[1].tell() <= at]
        for entry in sorted(behind, key=lambda e: -int(e[1].tell())):
            with contextlib.suppress(ValueError):  # taken by another thread meanwhile
                self._idle.remove(entry)
                return entry[1]
        return zipfile.ZipFile(file.path if file.is_local else file.open()).open(facts.inside)


def _headers(archive: zipfile.ZipFile, file: Location) -> dict[str, tuple[zipfile.ZipInfo, Header]]:
    """The arrays of an archive by name, what the zip and what numpy says of each."""
    found = {}
    for info in archive.infolist():
        if info.filename.endswith(".npy"):
            opened: Any = archive.open(info)  # its stub leaves readinto out
            with opened as stream:
                found[info.filename[:-4]] = (info, read_npy_header(stream, f"{file}:{info.filename[:-4]}"))
    return found


@contextlib.contextmanager
def _archive(file: Location) -> Iterator[zipfile.ZipFile]:
    try:
        with contextlib.ExitStack() as stack:
            opened = file.path if file.is_local else stack.enter_context(file.open())
            yield stack.enter_context(zipfile.ZipFile(opened))
    # zipfile raises NotImplementedError for a way of compressing that it lacks, RuntimeError for an encrypted member.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise FctError(f"source: expected a whole .npz file, {file} is not: {error}") from error


def _data_offset(file: Location, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: behind its local header, whose name and extra field have lengths of their
    own."""
    with file.open() as stream:
        stream.seek(info.header_offset)
        head = np.empty(_LOCAL_HEADER, np.uint8)
        if stream.readinto(head.data) != _LOCAL_HEADER or head[:4].tobytes() != b"PK\x03\x04":
            raise FctError(f"source: {file} is damaged: no member begins at byte {info.header_offset}")
    name, extra = struct.unpack("<HH", head[26:30].tobytes())
    return int(info.header_offset + _LOCAL_HEADER + name + extra)
