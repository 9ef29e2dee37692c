"""Vortex files by ``vortex-data``: ranges of rows, without what lies before them; written by it, too."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from fct.errors import FctError
from fct.extras import need
from fct.gallery.arrow_guard import validated
from fct.gallery.file_gallery import FileDestination, FileSource
from fct.gallery.interfaces import Batches, Piece, Shard
from fct.gallery.location import Location
from fct.spaces import EmbeddingSpace

__all__ = ["VortexDestination", "VortexSource", "open_vortex"]

T = TypeVar("T")


def open_vortex(vortex: Any, file: Location) -> Any:
    """The file by the library, which opens stores by names and keys of its own: so by what reads them here."""
    return vortex.open(file.path) if file.is_local else vortex.open_readable(file.open())


class VortexSource(FileSource):
    """Local files are opened by the library, those of a store through fct's own file objects."""

    kind = "vortex"
    suffixes = (".vortex",)

    def _open(self, file: Location) -> Any:
        vortex = need("vortex", f"source: {file}, a Vortex file,")
        return _told(lambda: open_vortex(vortex, file), file)

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


class VortexDestination(FileDestination):
    """A file a shard. It names neither space nor vector column: the side file says the one, its type the other."""

    kind = "vortex"
    suffix = ".vortex"

    def begin(self, schema: pa.Schema, space: EmbeddingSpace) -> None:
        need("vortex", f"destination: {self.location}, a Vortex gallery,")
        with tempfile.TemporaryDirectory() as folder:
            for entry in schema:
                self._require(entry, Path(folder) / "column.vortex")
        super().begin(schema, space)

    def _require(self, entry: pa.Field, path: Path) -> None:
        """Raises FctError for a column that the format has no type for."""
        schema = pa.schema([entry.remove_metadata()])
        try:
            _write(path, iter([_no_rows(schema)]), schema)
        except Exception as error:
            raise FctError(
                f"destination: the column {entry.name!r} ({entry.type}) cannot be kept in Vortex: vortex-data "
                "has no type for it. Write Parquet or Arrow files with --format (format=), or change that column before"
            ) from error

    def write_file(self, path: Path, shard: Shard, batches: Batches, files: dict[str, Path]) -> None:
        first, failed = next(batches), list[BaseException]()

        def stream() -> Batches:
            try:
                yield first
                yield from batches
            except BaseException as error:  # which the library would tell in words of its own
                failed.append(error)
                raise

        try:
            _write(path, stream(), first.schema)
        except BaseException:
            if failed:
                raise failed[0] from None
            raise


def _write(path: Path, batches: Batches, schema: pa.Schema) -> None:
    need("vortex", "destination").io.write(pa.RecordBatchReader.from_batches(schema, batches), str(path))


def _no_rows(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], type=f.type) for f in schema], schema=schema)


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
