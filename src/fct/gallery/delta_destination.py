"""A new Delta table by ``deltalake``: shards are Parquet files in its folder, which its log names in one commit."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from fct.errors import FctError
from fct.extras import need
from fct.gallery.committed_files import (
    JOB,
    VECTOR,
    CommittedFile,
    CommittedFiles,
    digest,
    properties,
    shards_committed,
)
from fct.gallery.lance_dataset import lance_options
from fct.gallery.location import Location
from fct.gallery.table_types import check_names, table_schema
from fct.spaces import EmbeddingSpace
from fct.types import StorageOptions

if TYPE_CHECKING:
    from deltalake import DeltaTable


__all__ = ["DeltaDestination"]


class DeltaDestination(CommittedFiles):
    """The table at ``where``, which no other job made.

    The metadata of the vectors' column names the new space (``fct.space``) and the job: ``deltalake`` takes no table
    properties but Delta's own. What ``--follow`` adds later is appended in a commit of its own.
    """

    kind = "delta"
    times = False

    def __init__(self, location: Location, storage_options: StorageOptions | None = None) -> None:
        super().__init__(location)
        need("deltalake", f"destination: {location}, a Delta table,")
        self._options = lance_options(dict(storage_options or {}))

    @property
    def title(self) -> str:
        return "a Delta table"

    def stored(self, schema: pa.Schema) -> pa.Schema:
        check_names(schema, self.title)
        return table_schema(schema, self.title, times=self.times)

    def _table(self) -> DeltaTable | None:
        """The table that is there, or None."""
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError

        if not (self.location / "_delta_log").exists():
            return None
        try:
            if DeltaTable.is_deltatable(str(self.location), storage_options=self._options):
                return DeltaTable(str(self.location), storage_options=self._options)
        except (DeltaError, ValueError) as error:
            raise FctError(f"destination: the Delta table {self.location} cannot be read: {error}") from error
        return None

    def begin(self, schema: pa.Schema, space: EmbeddingSpace) -> None:
        self.stored(schema)
        table = self._table()
        if table is not None and JOB not in _said(table):
            raise self._taken()
        super().begin(schema, space)

    def _taken(self) -> FctError:
        return FctError(
            f"destination: expected a place for a new Delta table, {self.location} is one that this backfill did not "
            "make or whose shards it made otherwise: name another place, or take it away"
        )

    def commit(self, files: Sequence[CommittedFile], schema: pa.Schema, space: EmbeddingSpace) -> None:
        table = self._table()
        if table is None:
            self._write(None, files, files, schema, space)
            return
        first = shards_committed(_said(table), files)
        if first is None:
            raise self._taken()
        done = table.transaction_version(_run_of(files[:first]))
        done = first if done is None else int(done)
        if done > len(files):
            raise self._taken()
        if done < len(files):
            self._write(table, files[done:], files, schema, space, run=_run_of(files[:first]))

    def _write(
        self,
        table: DeltaTable | None,
        new: Sequence[CommittedFile],
        files: Sequence[CommittedFile],
        schema: pa.Schema,
        space: EmbeddingSpace,
        *,
        run: str = "",
    ) -> None:
        """One commit that adds ``new``, to a new table where there is none. run: Delta's name for who commits, under
        which the log keeps how far this run is."""
        from deltalake import CommitProperties, Schema
        from deltalake.exceptions import DeltaError
        from deltalake.transaction import AddAction, Transaction, create_table_with_add_actions

        said, now = properties(files, schema), int(time.time() * 1000)
        told = said | self.describes(schema, space)
        fields = [f.with_metadata(told) if f.name == told[VECTOR] and table is None else f for f in schema]
        adds = [AddAction(f.name, f.bytes, {}, now, True, json.dumps({"numRecords": f.rows})) for f in new if f.rows]
        how = CommitProperties(
            custom_metadata=dict(said), app_transactions=[Transaction(run or _run_of(files), len(files))]
        )
        try:
            columns = Schema.from_arrow(pa.schema(fields))
            if table is None:
                create_table_with_add_actions(
                    str(self.location), columns, adds, storage_options=self._options, commit_properties=how
                )
            else:
                table.create_write_transaction(list(adds), "append", table.schema(), commit_properties=how)
        except (DeltaError, ValueError) as error:
            raise FctError(
                f"destination: the Delta table {self.location} could not be committed: {error}; all shards are there, "
                "start again once this is put right"
            ) from error


def _said(table: DeltaTable) -> dict[str, str]:
    """What the table's first commit says of itself."""
    return next((dict(f.metadata) for f in table.schema().fields if JOB in f.metadata), {})


def _run_of(files: Sequence[CommittedFile]) -> str:
    return f"fct-{digest(files)[:32]}"
