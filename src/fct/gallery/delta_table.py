"""Delta tables by ``deltalake``: the files of one version, less the rows that deletion vectors take out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import unquote

import numpy as np
import pyarrow as pa

from fct.errors import FctError
from fct.gallery.discovery import natural
from fct.gallery.interfaces import Batches, Piece
from fct.gallery.lance_dataset import lance_options
from fct.gallery.location import Location
from fct.gallery.parquet_files import ParquetSource
from fct.types import Array, JsonDict, StorageOptions

if TYPE_CHECKING:
    from deltalake import DeltaTable


__all__ = ["DeltaSource"]

_FEATURES = {
    *("deletionVectors", "columnMapping", "timestampNtz", "vacuumProtocolCheck", "v2Checkpoint"),
    *("typeWidening", "typeWidening-preview"),
}
_LONGEST = 1024  # characters of a file's path below its table; what object stores take


class DeltaSource(ParquetSource):
    """One version of a table: later commits are not seen. Partition columns stand where the table has them.

    version: by default the newest when this is made; :attr:`url` names it.
    """

    of_log = True

    def __init__(self, location: Location, version: int | None, storage_options: StorageOptions | None) -> None:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError

        self.storage_options = options = lance_options(dict(storage_options or {}))
        try:
            table = DeltaTable(str(location), version=version, storage_options=options)
            features = set(table.protocol().reader_features or ())
            self._columns = pa.schema(table.schema().to_arrow())
            self._renamed = _physical_names(table, location)
            self._partitioned = list(table.metadata().partition_columns)
            adds = pa.table(table.get_add_actions(flatten=True))
            masks = pa.table(table.deletion_vectors()).to_pylist() if "deletionVectors" in features else []
        except (DeltaError, OSError, ValueError) as error:
            asked = "" if version is None else f" at version {version}"
            raise FctError(f"source: the Delta table {location}{asked} cannot be read: {error}") from error
        unknown = sorted(features - _FEATURES)
        if unknown:
            raise FctError(f"source: the Delta table {location} needs {', '.join(unknown)}, which fct does not read")
        self.version = int(table.version())
        paths = [_inside(location, path) for path in adds["path"].to_pylist()]
        super().__init__(location, sorted((location / p for p in paths), key=lambda f: natural(f.path)))
        self._adds = {
            f"{location.path.rstrip('/')}/{path}": row for path, row in zip(paths, adds.to_pylist(), strict=True)
        }
        self._kept: dict[str, Array] = {}
        for mask in masks:
            self._kept[_masked(location, mask["filepath"], self._adds)] = np.array(mask["selection_vector"], bool)

    @property
    def url(self) -> str:
        return f"{self.location}?version={self.version}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"source: a Delta table, read at version {self.version}", *super().notes)

    def refresh(self) -> None:
        """A version never changes."""

    @cached_property
    def _folders(self) -> tuple[pa.Schema, dict[str, JsonDict]]:
        schema = pa.schema([self._columns.field(name) for name in self._partitioned])
        values = {}
        for path, row in self._adds.items():
            keys = {n: self._renamed.get(n, n) for n in self._partitioned}
            values[path] = {n: row.get(f"partition.{n}", row.get(f"partition.{p}")) for n, p in keys.items()}
        return schema, values

    def _unified(self) -> pa.Schema:
        whole = super()._unified() if self._files else self._columns
        return pa.schema([whole.field(n) for n in self._columns.names if n in whole.names], metadata=whole.metadata)

    def _stored(self, schema: pa.Schema) -> dict[str, str]:
        """The table's columns that a file holds: name in the table -> name in the file."""
        names = {name: self._renamed.get(name, name) for name in self._columns.names if name not in self._partitioned}
        return {name: stored for name, stored in names.items() if stored in schema.names}

    def file_schema(self, file: Location) -> pa.Schema:
        schema = super().file_schema(file)
        fields = [schema.field(stored).with_name(name) for name, stored in self._stored(schema).items()]
        return pa.schema(fields, metadata=schema.metadata)

    def groups(self, file: Location) -> list[int]:
        counts = super().groups(file)
        kept = self._kept.get(file.path)
        if kept is None:
            return counts
        ends = np.concatenate([[0], np.cumsum(counts)])
        whole = _padded(kept, int(ends[-1]))
        return [int(whole[a:b].sum()) for a, b in itertools.pairwise(ends.tolist())]

    def read_file(self, file: Location, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches:
        kept = self._kept.get(file.path)
        if kept is None:
            yield from (self._named(b) for b in super().read_file(file, piece, start, rows, batch_rows))
            return
        whole = _padded(kept, sum(super().groups(file)))
        places = np.flatnonzero(whole)[start : start + rows]
        at = int(places[0])
        for batch in super().read_file(file, piece, at, int(places[-1]) + 1 - at, batch_rows):
            mask = whole[at : at + batch.num_rows]
            at += batch.num_rows
            if mask.any():
                yield self._named(batch).filter(pa.array(mask))

    def _named(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        stored = self._stored(batch.schema)
        return batch.select(list(stored.values())).rename_columns(list(stored))


def _padded(kept: Array, rows: int) -> Array:
    """The mask for every row of a file: a deletion vector ends with the last row that it takes out."""
    return np.concatenate([kept, np.ones(max(0, rows - len(kept)), bool)])


def _physical_names(table: DeltaTable, location: Location) -> dict[str, str]:
    """Names in the files of a table with column mapping, by the table's names."""
    import json

    names = {}
    for field in json.loads(table.schema().to_json())["fields"]:
        stored = field.get("metadata", {}).get("delta.columnMapping.physicalName")
        if stored is None:
            continue
        names[field["name"]] = stored
        if "physicalName" in json.dumps(field["type"]):
            raise FctError(
                f"source: the Delta table {location} has the struct {field['name']!r} under column mapping, which fct "
                "does not read: write the table once without it"
            )
    return names


def _masked(location: Location, uri: str, files: Iterable[str]) -> str:
    """The file that a deletion vector is of: the log has its path, deltalake the whole URI. A file's name may end
    another's, so that the longest that fits is meant."""
    below = len(location.path.rstrip("/"))
    plain = unquote(uri)
    fits = [file for file in files if plain.endswith(file)] or [f for f in files if plain.endswith(f[below:])]
    if not fits:
        raise FctError(
            f"source: the log of the Delta table {location} is damaged: it deletes rows of {uri}, no file of it"
        )
    return max(fits, key=len)


def _inside(location: Location, path: str) -> str:
    """A file of the log below the table. Raises FctError for one that lies elsewhere."""
    plain = unquote(path)
    if "://" in plain or plain.startswith("/") or ".." in plain.split("/"):
        raise FctError(f"source: the Delta table {location} names a file outside it, which is not opened: {plain}")
    if len(plain) > _LONGEST:
        raise FctError(
            f"source: the log of the Delta table {location} is damaged: it names a file by {len(plain)} characters"
        )
    return plain
