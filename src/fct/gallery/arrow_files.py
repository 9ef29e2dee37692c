"""Arrow IPC files, and the Arrow streams that Hugging Face ``datasets`` saves."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from fct.errors import FctError
from fct.gallery.arrow_guard import validated
from fct.gallery.file_gallery import FileDestination, FileSource, named_errors
from fct.gallery.interfaces import Batches, Piece, Shard
from fct.gallery.location import Location

__all__ = ["ArrowDestination", "ArrowSource"]

_FILE_MAGIC = b"ARROW1"


class ArrowSource(FileSource):
    """Local files are mapped, for no longer than a shard is read; remote ones are read.

    A stream has no index: a remote one is read from its beginning for each shard. Rewrite such a gallery once.
    """

    kind = "arrow"
    suffixes = (".arrow", ".feather", ".ipc")

    def _open(self, file: Location) -> tuple[pa.NativeFile, pa.ipc.RecordBatchFileReader, bool]:
        """(what to close, reader, whether batches can be asked for by number)."""
        try:
            with file.open() as head:
                indexed = head.read(len(_FILE_MAGIC)) == _FILE_MAGIC
            if file.is_local:
                sink = pa.memory_map(file.path)
            else:
                sink = pa.PythonFile(file.open(), mode="r")
            reader = pa.ipc.open_file(sink) if indexed else pa.ipc.open_stream(sink)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise FctError(f"source: expected a whole Arrow file, {file} is not: {error}") from error
        return sink, reader, indexed

    def file_schema(self, file: Location) -> pa.Schema:
        sink, reader, _ = self._open(file)
        with sink:
            return reader.schema

    def batches_of(self, file: Location) -> Batches:
        """All batches of a file, over its mapped memory where it is local."""
        _, reader, indexed = self._open(file)
        with named_errors(file, remote=not file.is_local):
            found = (reader.get_batch(i) for i in range(reader.num_record_batches)) if indexed else reader
            yield from (validated(batch, str(file)) for batch in found)

    def groups(self, file: Location) -> list[int]:
        sink, reader, indexed = self._open(file)
        try:
            with sink:
                if not indexed:
                    return [batch.num_rows for batch in reader]
                return [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise FctError(f"source: expected a whole Arrow file, {file} is not: {error}") from error

    def read_file(self, file: Location, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches:
        sink, reader, indexed = self._open(file)
        with sink:
            first = 0
            batches = iter(reader) if not indexed else None
            for i, count in enumerate(piece.groups):
                last = first + count
                batch = next(batches) if batches is not None else None
                if last > start and first < start + rows:
                    batch = validated(batch or reader.get_batch(i), str(file))
                    part = batch.slice(max(0, start - first), min(last, start + rows) - max(first, start))
                    yield from (part.slice(j, batch_rows) for j in range(0, part.num_rows, batch_rows))
                first = last
                if first >= start + rows:
                    return


class ArrowDestination(FileDestination):
    kind = "arrow"
    tags_itself = True
    suffix = ".arrow"

    def write_file(self, path: Path, shard: Shard, batches: Batches, files: dict[str, Path]) -> None:
        writer = None
        known: dict[int, pa.Array] = {}
        try:
            for batch in batches:
                writer = writer or pa.ipc.new_file(
                    str(path), batch.schema, options=pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
                )
                writer.write_batch(_one_dictionary(batch, known))
        finally:
            if writer is not None:
                writer.close()


def _one_dictionary(batch: pa.RecordBatch, known: dict[int, pa.Array]) -> pa.RecordBatch:
    """The batch, its dictionary columns over one dictionary for all batches: a file can add to one, not replace it.

    known: the dictionary of each column so far, which grows.
    """
    for i, entry in enumerate(batch.schema):
        if not pa.types.is_dictionary(entry.type):
            continue
        column = batch.column(i)
        grown = column.dictionary
        if i in known and not grown.equals(known[i]):
            fresh = grown.filter(pc.invert(pc.is_in(grown, known[i])))
            grown = pa.concat_arrays([known[i], fresh])
            where = pc.index_in(column.dictionary, grown)
            indices = pc.take(where, column.indices).cast(entry.type.index_type)
            column = pa.DictionaryArray.from_arrays(indices, grown, ordered=entry.type.ordered)
            batch = batch.set_column(i, entry, column)
        known[i] = grown
    return batch
