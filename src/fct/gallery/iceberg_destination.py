"""An Iceberg append by ``pyiceberg``: shards are Parquet files below the table, which one snapshot adds, last.

In a partitioned table a shard is a file for each partition that it has rows of.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from fct.errors import FctError
from fct.gallery.committed_files import (
    CONTENT,
    JOB,
    SPACE,
    VECTOR,
    CommittedFile,
    CommittedFiles,
    properties,
    shards_committed,
)
from fct.gallery.iceberg_catalog import IcebergAddress
from fct.gallery.iceberg_partitions import Partitions, PartitionWriter
from fct.gallery.interfaces import Batches, Shard
from fct.gallery.location import RetryPolicy
from fct.gallery.table_types import check_names, table_schema
from fct.spaces import EmbeddingSpace
from fct.terminal import plain_log
from fct.types import JsonDict

if TYPE_CHECKING:
    from pyiceberg.table import Table, Transaction


__all__ = ["IcebergDestination"]

_log = plain_log("fct.gallery")
_OURS = re.compile(r"part-\d+-([0-9a-f]{32})(-\d+)?\.parquet")  # a shard's file, by the run that wrote it


class IcebergDestination(CommittedFiles):
    """A table of a catalog: made where it is not there, else appended to, if its vectors are of the new space.

    A snapshot's properties name the job (``fct.job``) and which shards it holds, the table's the space (``fct.space``)
    and the column of the vectors (``fct.vector``).
    """

    kind = "iceberg"
    times = True
    shared = True

    def __init__(self, address: IcebergAddress, retry_policy: RetryPolicy) -> None:
        self.address, self.retry_policy = address, retry_policy
        catalog = address.open()
        table = address.load(catalog)
        self._location = address.location_of_table(catalog, table).rstrip("/")
        store = catalog.properties if table is None else table.io.properties
        super().__init__(address.folder(self._location, store, retry_policy))
        self._partitions = None if table is None else Partitions.of(table, self.title)
        self._mine = uuid.uuid4().hex  # of this process: no run writes over another's file

    @property
    def title(self) -> str:
        return f"the Iceberg table {self.address.url}"

    def stored(self, schema: pa.Schema) -> pa.Schema:
        check_names(schema, self.title, forbidden="")
        return table_schema(schema, self.title, times=self.times)

    def name_of(self, shard: Shard) -> str:
        return f"data/{shard.name}-{self._mine}{self.suffix}"

    def write(self, shard: Shard, batches: Batches, scratch: Path) -> tuple[Mapping[str, Path], JsonDict]:
        if self._partitions is None:
            return super().write(shard, batches, scratch)
        writer = PartitionWriter(self._partitions, scratch, shard.name, self.title)
        writer.write(self.as_stored(batches))
        whole = self.name_of(shard).removesuffix(self.suffix)
        made = {f"{whole}-{i}{self.suffix}": found for i, found in enumerate(writer.written.items())}
        files = [asdict(CommittedFile.made(name, rows, path)) for name, (path, rows) in made.items()]
        extra = {"files": files, "partitions": str(self._partitions)}
        return {name: path for name, (path, _) in made.items()}, extra

    def begin(self, schema: pa.Schema, space: EmbeddingSpace) -> None:
        stored, catalog = self.stored(schema), self.address.open()
        table = self.address.load(catalog)
        if table is None:
            catalog.create_namespace_if_not_exists(self.address.table[:-1])
            said = self.describes(stored, space)
            catalog.create_table(self.address.table, schema=_plain(stored), location=self._location, properties=said)
        else:
            self._check(table, stored, space)
            self._partitions = Partitions.of(table, self.title)
        super().begin(schema, space)

    def _check(self, table: Table, stored: pa.Schema, space: EmbeddingSpace) -> None:
        """Raises FctError for a table that these rows do not belong in."""
        said = table.properties.get(SPACE)
        if said is None and table.current_snapshot() is not None:
            raise FctError(
                f"destination: {self.title} has rows and does not say which model made its vectors; if it was {space}, "
                f"set its property {SPACE!r} to {json.dumps(space.to_dict(), sort_keys=True)}"
            )
        if said is not None and json.loads(said) != space.to_dict():
            raise FctError(f"destination: expected vectors of {space}, {self.title} holds those of {said}")
        mine, theirs = self.describes(stored, space)[VECTOR], table.properties.get(VECTOR)
        if theirs not in (None, mine):
            raise FctError(f"destination: expected vectors in the column {mine!r}, {self.title} has them in {theirs!r}")
        have = {f.name: f for f in table.schema().as_arrow()}
        mine_too = {f.name: f for f in _plain(stored)}
        lines = [f"{n}: only in the table" for n, f in have.items() if n not in mine_too and not f.nullable]
        lines += [f"{n}: not in the table" for n in mine_too if n not in have]
        lines += [
            f"{n}: {_spelling(f.type)}, {_spelling(have[n].type)} in the table"
            for n, f in mine_too.items()
            if n in have and _spelling(f.type) != _spelling(have[n].type)
        ]
        lines += [f"{n}: may not be null in the table" for n in mine_too if n in have and not have[n].nullable]
        if lines:
            raise FctError(f"destination: {self.title} has other columns: {'; '.join(lines)}")

    def commit(self, files: Sequence[CommittedFile], schema: pa.Schema, space: EmbeddingSpace) -> None:
        from pyiceberg.exceptions import CommitFailedException, CommitStateUnknownException

        said = properties(files, schema)
        for attempt in range(self.retry_policy.retries + 1):
            table = self.address.load(self.address.open())
            if table is None:
                raise FctError(f"destination: {self.title} is gone; start again, it is made anew")
            done = self._committed(table, files, said)
            if done == len(files):
                break
            new = files[done or 0 :]
            try:
                self._append(table, new, said, self.describes(schema, space))
                break
            except (CommitFailedException, CommitStateUnknownException) as error:
                if attempt == self.retry_policy.retries:
                    raise FctError(
                        f"destination: {self.title} could not be committed: {error}; all shards are there, start again"
                    ) from error
                _log.warning("destination: %s was not committed (%s); looking at it again", self.title, error)
        self._tidy(files)

    def finish(self, extras: Sequence[object], schema: pa.Schema, space: EmbeddingSpace) -> None:
        now = "" if self._partitions is None else str(self._partitions)
        then = {str(extra.get("partitions", "")) if isinstance(extra, dict) else "" for extra in extras}
        if then - {now}:
            raise FctError(
                f"destination: {self.title} was partitioned otherwise when its shards were written: by "
                f"{(then - {now}).pop() or 'nothing'}, and now by {now or 'nothing'}; start over with another journal"
            )
        super().finish(extras, schema, space)

    def _committed(self, table: Table, files: Sequence[CommittedFile], said: Mapping[str, str]) -> int | None:
        """How many of the files the table's snapshots hold already; None where no snapshot is of this job.

        Raises:
            FctError: another run appended the same rows.
        """
        done: int | None = None
        for snapshot in table.snapshots():
            found = {} if snapshot.summary is None else dict(snapshot.summary.additional_properties)
            count = shards_committed(found, files)
            if count is not None:
                done = max(done or 0, count)
            elif (found.get(JOB), found.get(CONTENT)) == (said[JOB], said[CONTENT]):
                raise FctError(
                    f"destination: {self.title} holds these very rows already, appended by another run of this "
                    f"backfill as snapshot {snapshot.snapshot_id}: nothing was appended again"
                )
        return done

    def _append(
        self, table: Table, new: Sequence[CommittedFile], said: Mapping[str, str], describes: Mapping[str, str]
    ) -> None:
        changed = {key: value for key, value in describes.items() if table.properties.get(key) != value}
        try:
            with table.transaction() as transaction:
                if changed:
                    transaction.set_properties(changed)
                with _quiet():
                    self._add(transaction, table, [f for f in new if f.rows], dict(said))
        except ValueError as error:
            raise FctError(f"destination: {self.title} could not be committed: {error}") from error

    def _add(self, transaction: Transaction, table: Table, new: Sequence[CommittedFile], said: dict[str, str]) -> None:
        """Adds the files as one snapshot; one without any where all rows were rejected, so that the job is there."""
        from pyiceberg.table import TableProperties

        places = [f"{self._location}/{f.name}" for f in new]
        if self._partitions is None:
            transaction.add_files(places, snapshot_properties=said)
            return
        if table.name_mapping() is None:  # our files name their columns, and do not number them
            mapping = table.schema().name_mapping.model_dump_json()
            transaction.set_properties({TableProperties.DEFAULT_NAME_MAPPING: mapping})
        with transaction.update_snapshot(snapshot_properties=said).fast_append() as snapshot:
            for file, place in zip(new, places, strict=True):
                snapshot.append_data_file(self._partitions.data_file(table, self.location / file.name, place))

    def _tidy(self, files: Sequence[CommittedFile]) -> None:
        """Takes away shards that were written twice: the table names the last ones alone."""
        names = {f.name.rpartition("/")[2] for f in files}
        runs = {found[1] for name in names if (found := _OURS.fullmatch(name))}
        for file in (self.location / "data").files():
            found = _OURS.fullmatch(file)
            if found and found[1] in runs and file not in names:
                (self.location / "data" / file).remove()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """pyiceberg warns once a file of columns without statistics, which vectors have no use for."""

    def without(record: logging.LogRecord) -> bool:
        return "statistics missing" not in record.getMessage()

    logger = logging.getLogger("pyiceberg.io.pyarrow")
    logger.addFilter(without)
    try:
        yield
    finally:
        logger.removeFilter(without)


def _plain(schema: pa.Schema) -> pa.Schema:
    """Fixed-size lists as lists, narrow integers as int32: what an Iceberg schema knows."""
    return pa.schema([pa.field(f.name, _iceberg(f.type)) for f in schema])


def _iceberg(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_integer(kind) and kind.bit_width < 32:
        return pa.int32()
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(kind.field(i).name, _iceberg(kind.field(i).type)) for i in range(kind.num_fields)])
    if pa.types.is_map(kind):
        return pa.map_(_iceberg(kind.key_type), _iceberg(kind.item_type))
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_iceberg(kind.value_type))
    return kind


def _spelling(kind: pa.DataType) -> str:
    """A type in words that are the same however it is spelled: large or not, whatever inner fields are called."""
    if pa.types.is_large_list(kind) or pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"list<{_spelling(kind.value_type)}>"
    if pa.types.is_map(kind):
        return f"map<{_spelling(kind.key_type)}, {_spelling(kind.item_type)}>"
    if pa.types.is_struct(kind):
        inner = (f"{kind.field(i).name}: {_spelling(kind.field(i).type)}" for i in range(kind.num_fields))
        return f"struct<{', '.join(inner)}>"
    return str(kind).removeprefix("large_")
