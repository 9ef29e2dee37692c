"""InputDigest: the checksum of the rows that a shard was made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from fct import _C
from fct.gallery.column_checksum import ColumnChecksum
from fct.gallery.vectors import VectorBlock

if TYPE_CHECKING:
    from fct._C import Xxh64


__all__ = ["InputDigest"]


class InputDigest:
    """XXH64 of the rows as they were read: vectors, side-information, every other column.

    Version 2 does not depend on how rows are cut into batches; version 1, of fct 0.1, did, and is kept so that what was
    begun with it can go on.
    """

    def __init__(self, version: int = 2) -> None:
        self.version = version
        self._first = _C.Xxh64()
        self._blocks: dict[int, Xxh64] = {}
        self._columns: dict[str, ColumnChecksum] = {}

    def block(self, number: int, block: VectorBlock, rows: int) -> Xxh64:
        """The stream that the values of the old vectors (0) or the side-information (1) are to be added to."""
        if self.version == 1:
            return self._first
        whole = np.ones(rows, bool)
        whole[list(block.bad)] = False
        self._columns.setdefault(f"{number}?", ColumnChecksum(_C.Xxh64)).update(pa.array(whole))
        return self._blocks.setdefault(number, _C.Xxh64())

    def rest(self, batch: pa.RecordBatch) -> None:
        """Adds every other column."""
        if self.version == 1:
            self._rest_of_0_1(batch)
            return
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            self._columns.setdefault(f"={name}", ColumnChecksum(_C.Xxh64)).update(column)

    def _rest_of_0_1(self, rest: pa.RecordBatch) -> None:
        # Serialised alone, a batch says which entries of a dictionary its rows are, and not what the entries say.
        for i, entry in enumerate(rest.schema):
            if pa.types.is_dictionary(entry.type):
                rest = rest.set_column(i, entry.name, rest.column(i).dictionary_decode())
        if rest.num_columns:
            body = rest.serialize()
            self._first.update(body.address, body.size)

    def hexdigest(self) -> str:
        """16 hex digits."""
        if self.version == 1:
            return f"{self._first.digest():016x}"
        parts = {f"{number}=": f"{stream.digest():016x}" for number, stream in self._blocks.items()}
        parts |= {name: column.hexdigest() for name, column in self._columns.items()}
        text = np.frombuffer("\n".join(f"{name!r} {parts[name]}" for name in sorted(parts)).encode(), np.uint8)
        whole = _C.Xxh64()
        whole.update(int(text.ctypes.data), text.nbytes)
        return f"{whole.digest():016x}"
