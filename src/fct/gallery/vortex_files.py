"""Vortex files by ``vortex-data``: ranges of rows of its Arrow stream, without what lies before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa

from fct.errors import FctError
from fct.extras import need
from fct.gallery.arrow_guard import validated
from fct.gallery.file_gallery import FileSource
from fct.gallery.interfaces import Batches, Piece
from fct.gallery.location import Location

__all__ = ["VortexSource"]

T = TypeVar("T")


class VortexSource(FileSource):
    """Files on this machine: the library opens a store by its own names and keys, not by fsspec's."""

    kind = "vortex"
    suffixes = (".vortex",)

    def _open(self, file: Location) -> Any:
        vortex = need("vortex", f"source: {file}, a Vortex file,")
        if not file.is_local:
            raise FctError(f"source: expected a Vortex file on this machine, got {file}: copy it here first")
        return _told(lambda: vortex.open(file.path), file)

    def file_schema(self, file: Location) -> pa.Schema:
        opened = self._open(file)
        schema = _told(lambda: opened.dtype.to_arrow_schema(), file)
        if not isinstance(schema, pa.Schema):
            raise FctError(f"source: expected a Vortex file of columns, {file} holds {opened.dtype}")
        return schema

    def groups(self, file: Location) -> list[int]:
        opened = self._open(file)
        found = [stop - start for start, stop in _told(opened.splits, file)]
        return found if sum(found) == len(opened) else [len(opened)]

    def read_file(self, file: Location, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches:
        scan = self._open(file).to_repeated_scan(batch_size=batch_rows)
        batches = iter(_told(lambda: scan.execute(row_range=(start, start + rows)).to_arrow(), file))
        left = rows
        while (batch := _told(lambda: next(batches, None), file)) is not None:
            left -= batch.num_rows
            yield validated(batch, str(file))
        if left:
            raise FctError(f"source: {file} is truncated: it ended {left} rows early")


def _told(do: Callable[[], T], file: Location) -> T:
    """``do()``; whatever the library says of a file comes out as an FctError that names it, panics too."""
    try:
        return do()
    except (FctError, FileNotFoundError):
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of Rust: no Exception
        if not (panic or isinstance(error, Exception)) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise FctError(f"source: expected a whole Vortex file, {file} is not: {error}") from error
