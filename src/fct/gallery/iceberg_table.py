"""Iceberg tables by ``pyiceberg``: the data files of one snapshot, less the rows that its delete files take out.

Without a catalog the newest metadata file is the table. One data file is in memory at a time while it is read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from fct.errors import FctError
from fct.gallery.arrow_guard import validated
from fct.gallery.committed_files import CommittedFile, shards_committed
from fct.gallery.discovery import natural
from fct.gallery.iceberg_catalog import NAMES
from fct.gallery.iceberg_partitions import in_order, rows_of_shard
from fct.gallery.interfaces import VECTOR_KEY, Batches, Piece, Source
from fct.gallery.location import Location
from fct.gallery.schemas import conform
from fct.gallery.space_tags import SPACE_KEY, side_file_space, space_of_schema
from fct.spaces import EmbeddingSpace
from fct.types import JsonDict, StorageOptions

if TYPE_CHECKING:
    from pyiceberg.io import FileIO
    from pyiceberg.table import DataScan, FileScanTask, Table


__all__ = ["IcebergSource"]

_OURS = (VECTOR_KEY.decode(), SPACE_KEY.decode())  # of a table's properties: what a backfill wrote down


class IcebergSource(Source):
    """One snapshot of a table: later ones are not seen.

    location: the table's folder. version: a snapshot's id, by default the current one. metadata: its
    ``.metadata.json``, by default the newest.
    """

    kind = "iceberg"

    def __init__(
        self,
        location: Location,
        version: int | None,
        storage_options: StorageOptions | None,
        metadata: Location | None = None,
    ) -> None:
        self.location, self._metadata = location, metadata or _newest(location)
        given = dict(storage_options or {})
        further = given.get("client_kwargs")
        options = given | (dict(further) if isinstance(further, Mapping) else {})
        own = {k: str(v) for k, v in options.items() if k.startswith("s3.")}  # of a catalog's table
        self._properties = own | {NAMES[k]: str(v) for k, v in options.items() if k in NAMES}
        table, _ = self._opened()
        snapshot = table.metadata.current_snapshot_id if version is None else version
        if snapshot is None or table.metadata.snapshot_by_id(snapshot) is None:
            raise FctError(
                f"source: the Iceberg table {location} has no snapshot{'' if version is None else f' {version}'}"
            )
        self.version = int(snapshot)
        self._only: frozenset[str] | None = None
        self._shards: dict[str, list[str]] = {}  # of a job that is looked at: files that hold one shard together
        self._pass: tuple[str, int, Iterator[pa.RecordBatch]] | None = None

    def __getstate__(self) -> JsonDict:
        return {**self.__dict__, "_pass": None}

    def _opened(self) -> tuple[Table, FileIO]:
        """(table, its files). The table's own properties choose nothing: they may name code to be loaded."""
        from pyiceberg.catalog.noop import NoopCatalog
        from pyiceberg.exceptions import ValidationError
        from pyiceberg.io.pyarrow import PyArrowFileIO
        from pyiceberg.serializers import FromInputFile
        from pyiceberg.table import Table

        io, place = PyArrowFileIO(self._properties), str(self._metadata)
        try:
            metadata = FromInputFile.table_metadata(io.new_input(place))
        except (ValueError, OSError, KeyError, ValidationError) as error:
            raise FctError(f"source: {place} is no metadata of an Iceberg table: {error}") from error
        return Table(("table",), metadata, place, io, NoopCatalog("none")), io

    def as_added(self, shards: Sequence[Sequence[CommittedFile]]) -> IcebergSource | None:
        """These files alone, at the snapshot that a backfill added the last of them by; None where there is none.

        A shard of several files, as partitions make them, is one piece with its rows in the shard's own order.
        """
        table, _ = self._opened()
        files = [file for shard in shards for file in shard]
        for snapshot in table.metadata.snapshots:
            said = {} if snapshot.summary is None else dict(snapshot.summary.additional_properties)
            if shards_committed(said, files) == len(files):
                found = copy.copy(self)
                found.version, found._only = int(snapshot.snapshot_id), frozenset(f.name for f in files)
                found._shards = {shard[0].name: [f.name for f in shard] for shard in shards if len(shard) > 1}
                return found
        return None

    def current(self) -> IcebergSource:
        """The same files as the table's current snapshot has them."""
        table, _ = self._opened()
        found = copy.copy(self)
        found.version, found._shards = int(table.metadata.current_snapshot_id or self.version), {}
        return found

    @property
    def url(self) -> str:
        return f"{self.location}?version={self.version}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"source: an Iceberg table, read at snapshot {self.version}",)

    @property
    def schema(self) -> pa.Schema:
        from pyiceberg.io.pyarrow import schema_to_pyarrow

        table, _ = self._opened()
        schema = schema_to_pyarrow(self._scan(table).projection(), include_field_ids=False)
        said = {key.encode(): value.encode() for key, value in table.properties.items() if key in _OURS}
        return schema.with_metadata((schema.metadata or {}) | said) if said else schema

    @property
    def space(self) -> EmbeddingSpace | None:
        return space_of_schema(self.schema, self.url) or side_file_space(self.location)

    def _scan(self, table: Table) -> DataScan:
        scan: DataScan = table.scan(snapshot_id=self.version)
        return scan

    def _tasks(self, table: Table, io: FileIO) -> JsonDict:
        """What is read for each data file, by its path below the table. Files that lie elsewhere are not opened."""
        snapshot = table.metadata.snapshot_by_id(self.version)
        assert snapshot is not None  # as it was opened
        self._inside(snapshot.manifest_list)
        for manifest in snapshot.manifests(io):
            self._inside(manifest.manifest_path)
        try:
            tasks = list(self._scan(table).plan_files())
        except ValueError as error:  # equality deletes
            raise FctError(f"source: the Iceberg table {self.location} cannot be read: {error}") from error
        for task in tasks:
            for deletes in task.delete_files:
                self._inside(deletes.file_path)
        found = {self._inside(task.file.file_path): task for task in tasks}
        if self._only is not None:
            tasks = [task for name, task in found.items() if name in self._only]
            found = {name: task for name, task in found.items() if name in self._only}
        if len(found) != len(tasks):
            raise FctError(f"source: the Iceberg table {self.location} names one data file twice")
        return dict(sorted(found.items(), key=lambda item: natural(item[0])))

    def _inside(self, path: str) -> str:
        root = str(self.location).rstrip("/") + "/"
        plain = path.removeprefix("file://").replace("s3a://", "s3://", 1)
        if not plain.startswith(root) or ".." in plain.split("/"):
            raise FctError(
                f"source: the Iceberg table {self.location} names a file outside it, which is not opened: {path}; was "
                "the table moved or copied?"
            )
        return plain[len(root) :]

    def pieces(self) -> list[Piece]:
        table, io = self._opened()
        tasks = self._tasks(table, io)
        behind = {name for first, names in self._shards.items() for name in names if name != first}
        found = []
        for name in tasks:
            if name not in behind:
                parts = [tasks[part] for part in self.files_of(name)]
                rows = sum(self._rows(table, io, part) for part in parts)
                size = sum(part.file.file_size_in_bytes for part in parts)
                found.append(Piece(name, rows, size, str(sum(len(part.delete_files) for part in parts))))
        return found

    def files_of(self, piece: str) -> list[str]:
        """The data files that hold a piece: one, or those of a shard that was written by partitions."""
        return self._shards.get(piece, [piece])

    def put_in_order(
        self, piece: str, read: Callable[[str], Iterator[pa.RecordBatch]], rows: Callable[[str], int]
    ) -> Iterator[pa.RecordBatch]:
        """A piece's rows, its files read by ``read``. rows: of a file."""
        files = self.files_of(piece)
        if len(files) == 1:
            return read(piece)
        return in_order([read(name) for name in files], [rows_of_shard(self.location / n, rows(n)) for n in files])

    def _rows(self, table: Table, io: FileIO, task: FileScanTask) -> int:
        if not task.delete_files:
            return int(task.file.record_count)
        return sum(batch.num_rows for batch in self._batches(table, io, task))

    def _batches(self, table: Table, io: FileIO, task: FileScanTask) -> Iterator[pa.RecordBatch]:
        from pyiceberg.expressions import AlwaysTrue
        from pyiceberg.io.pyarrow import ArrowScan

        scan = ArrowScan(table.metadata, io, self._scan(table).projection(), AlwaysTrue())
        return iter(scan.to_record_batches([task]))

    def read(self, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches:
        schema, end = self.schema, start + rows
        kept, self._pass = self._pass, None
        if kept is not None and kept[0] == piece.name and kept[1] <= start:
            _, at, batches = kept  # the next shard goes on where the last one stopped
        else:
            table, io = self._opened()
            tasks = self._tasks(table, io)
            at, batches = (
                0,
                self.put_in_order(
                    piece.name,
                    lambda name: self._batches(table, io, tasks[name]),
                    lambda name: self._rows(table, io, tasks[name]),
                ),
            )
        for batch in batches:
            first, at = at, at + batch.num_rows
            if at > start:
                part = batch.slice(max(0, start - first), min(end, at) - max(start, first))
                if at > end:
                    rest = batch.slice(end - first)
                    batches, at = _behind(rest, batches), end
                whole = conform(validated(part, f"{self.location}/{piece.name}"), schema)
                if at == end:
                    self._pass = (piece.name, at, batches)
                yield from (whole.slice(i, batch_rows) for i in range(0, whole.num_rows, batch_rows))
            if at >= end:
                return
        raise FctError(f"source: {piece.name} of {self.url} ended {end - at} rows early")


def _behind(first: pa.RecordBatch, rest: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield first
    yield from rest


def _newest(location: Location) -> Location:
    """The newest metadata file: the one that version-hint.text names, else the one of the highest number."""
    folder = location / "metadata"
    names = [n for n in folder.files() if n.endswith(".metadata.json")]
    if "version-hint.text" in folder.files():
        hint = (folder / "version-hint.text").read_bytes()[:256].decode(errors="replace").strip()
        for name in (hint, f"v{hint}.metadata.json", f"{hint}.metadata.json"):
            if name in names:
                return folder / name
    numbers = {n: int(m[1]) for n in names if (m := re.match(r"v?(\d+)", n))}
    newest = [n for n in numbers if numbers[n] == max(numbers.values())]
    if len(newest) != 1:
        raise FctError(
            f"source: expected one newest metadata file in {folder}, got {', '.join(sorted(newest or names)[:3])}; "
            "name the one that the catalog has"
        )
    return folder / newest[0]
