"""Two columns of ids, matched on disk: hashed into partitions that fit into memory, each matched by itself."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fct.checks import shown
from fct.errors import BackfillError
from fct.types import Array

__all__ = ["IdPartitions", "Spill"]

_PARTITION_ROWS, _GATHERED, _SAID = 500_000, 32 << 20, 3
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Spill:
    """Rows in files by number, one file a number. No file is held open, so that there may be any number of them."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self._folder, self.schema = folder, schema
        self._held: list[tuple[pa.RecordBatch, Array]] = []
        self._bytes = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, batch: pa.RecordBatch, numbers: Array) -> None:
        """Each row goes to the file of its number."""
        self._held.append((batch, numbers))
        self._bytes += batch.nbytes
        if self._bytes > _GATHERED:
            self._write()

    def _write(self) -> None:
        if not self._held:
            return
        numbers = np.concatenate([n for _, n in self._held])
        order = np.argsort(numbers, kind="stable")
        rows = pa.Table.from_batches([b for b, _ in self._held]).take(pa.array(order)).combine_chunks()
        self._held, self._bytes = [], 0
        found, starts = np.unique(numbers[order], return_index=True)
        for number, start, end in zip(found.tolist(), starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
            with open(self._folder / str(number), "ab") as file:
                for batch in rows.slice(start, end - start).to_batches():
                    file.write(batch.serialize())

    def take(self, number: int) -> pa.Table:
        """The rows of one file, which is removed."""
        self._write()
        path, batches = self._folder / str(number), []
        if not path.exists():
            return self.schema.empty_table()
        with pa.OSFile(str(path)) as file:
            while file.tell() < file.size():
                batches.append(pa.ipc.read_record_batch(pa.ipc.read_message(file), self.schema))
        path.unlink()
        return pa.Table.from_batches(batches, schema=self.schema)


class IdPartitions:
    """Which row of the gallery each row of the side-information belongs to.

    folder: for its files. rows: of the gallery, about.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self._folder, self._count = folder, max(1, rows // _PARTITION_ROWS)
        self._spills: dict[bool, Spill] = {}
        self._rows = {False: 0, True: 0}
        self._nulls = {False: 0, True: 0}

    def add(self, ids: pa.Array, *, side: bool) -> None:
        """The next rows' ids, of the side-information or of the gallery."""
        if not (_whole(ids.type) or _bytes(ids.type)):
            raise BackfillError(
                f"side_join: expected ids that are whole numbers, text, bytes or times, got {ids.type}: name another "
                "column with id_column (--id-column)"
            )
        if isinstance(ids, pa.ExtensionArray):
            ids = ids.storage
        self._nulls[side] += ids.null_count
        first, self._rows[side] = self._rows[side], self._rows[side] + len(ids)
        rows = pa.array(np.arange(first, first + len(ids)))
        batch = pa.record_batch([ids, rows], names=["id", "row"])
        if side not in self._spills:
            self._spills[side] = Spill(self._folder / ("side-ids" if side else "ids"), batch.schema)
        self._spills[side].add(batch, _partition(ids, self._count))

    def targets(self) -> Array:
        """(rows of the side-information,) int64, in a file: the gallery's row that each belongs to.

        Raises:
            BackfillError: ids that are missing, left over, twice or null on either side; with counts, by name.
        """
        targets: Array = np.empty(0, np.int64)
        if self._rows[True]:
            targets = np.memmap(self._folder / "targets", np.int64, "w+", shape=(self._rows[True],))
        trouble = _Trouble(self._nulls)
        for number in range(self._count):
            here, there = (self._spills[s].take(number) if s in self._spills else None for s in (False, True))
            ids, others = (_column(t) for t in (here, there))
            trouble.twice("the source", ids)
            trouble.twice("the side-information", others)
            if here is None or there is None or ids is None or others is None:
                trouble.missing(ids, others)
                continue
            at = pc.index_in(ids, value_set=others)
            trouble.missing(ids.filter(pc.is_null(at)), others.filter(pc.invert(pc.is_in(others, value_set=ids))))
            if not trouble:
                targets[there.column("row").to_numpy()[at.to_numpy()]] = here.column("row").to_numpy()
        trouble.refuse()
        return targets


class _Trouble:
    """What keeps two columns of ids from being joined one to one: how many, and the first few."""

    def __init__(self, nulls: dict[bool, int]) -> None:
        self._found: dict[str, tuple[int, list[str]]] = {}
        for side, where in ((False, "the source"), (True, "the side-information")):
            if nulls[side]:
                self._found[f"null in {where}"] = (nulls[side], [])

    def __bool__(self) -> bool:
        return bool(self._found)

    def _add(self, what: str, ids: pa.Array) -> None:
        if len(ids):
            count, names = self._found.get(what, (0, []))
            more = [shown(i.as_py()) for i in ids[: max(0, _SAID - len(names))]]
            self._found[what] = (count + len(ids), names + more)

    def twice(self, context: str, ids: pa.Array | None) -> None:
        if ids is not None and len(ids):
            coded = ids.drop_null().dictionary_encode()
            counts = np.bincount(coded.indices.to_numpy(), minlength=len(coded.dictionary))
            self._add(f"more than once in {context}", coded.dictionary.filter(pa.array(counts > 1)))

    def missing(self, ids: pa.Array | None, others: pa.Array | None) -> None:
        """ids: of the gallery alone. others: of the side-information alone."""
        for found, what in ((ids, "missing in the side-information"), (others, "not in the source")):
            if found is not None:
                self._add(what, found.drop_null())

    def refuse(self) -> None:
        if not self._found:
            return
        parts = [
            f"{count:,} {'id' if count == 1 else 'ids'} {what}" + (f" ({', '.join(names)})" if names else "")
            for what, (count, names) in self._found.items()
        ]
        raise BackfillError(
            "side_source: expected each id of the source once, and no others, to join by id: " + "; ".join(parts)
        )


def _column(table: pa.Table | None) -> pa.Array | None:
    return None if table is None else table.combine_chunks().column("id").combine_chunks()


def _whole(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_temporal(kind)) and not pa.types.is_interval(kind)


def _bytes(kind: pa.DataType) -> bool:
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    found = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(f(kind) for f in (*found, pa.types.is_fixed_size_binary))


def _partition(ids: pa.Array, count: int) -> Array:
    """(n,) int64 from 0 to count - 1; the same for the same id, however its batch is cut."""
    if count == 1:
        return np.zeros(len(ids), np.int64)
    if _whole(ids.type):
        bits = 64 if pa.types.is_integer(ids.type) else ids.type.bit_width
        kind = ids.type if pa.types.is_integer(ids.type) else pa.int64() if bits == 64 else pa.int32()
        numbers = pc.fill_null(ids.cast(kind), 0).to_numpy(zero_copy_only=False).astype(np.uint64)
        found: Array = ((numbers * _MIX >> np.uint64(32)) % np.uint64(count)).astype(np.int64)
        return found
    if isinstance(ids, pa.ExtensionArray):
        ids = ids.storage
    plain = ids.cast(pa.large_binary()).to_pylist()
    return np.array([zlib.crc32(value or b"") % count for value in plain], np.int64)
