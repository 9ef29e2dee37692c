"""RowReader: a gallery's rows by another way than a backfill reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from fct.gallery.interfaces import Source
from fct.types import Array

__all__ = ["BATCH_ROWS", "OwnReader", "RowReader", "WholeReader", "vector_batch"]

BATCH_ROWS = 8192


class RowReader(ABC):
    """Counts and reads the pieces of a gallery. by: whose reading it is, for messages."""

    by: str

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Rows of each piece. Raises FctError where they cannot be counted."""

    @abstractmethod
    def read(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows of a piece, in order, in any spelling; of these columns, those that it has."""


class WholeReader(ABC):
    """Reads a table whose rows come in no order, so that they can be compared as a whole alone."""

    by: str

    @abstractmethod
    def read(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Every row of the table once, in any order and spelling."""


class OwnReader(RowReader):
    """The source as fct reads it, where nothing else does."""

    by = "fct"

    def __init__(self, source: Source) -> None:
        self._source = source
        self._pieces = {piece.name: piece for piece in source.pieces()}

    def counts(self) -> dict[str, int]:
        return {name: piece.rows for name, piece in self._pieces.items()}

    def read(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        piece = self._pieces[name]
        for batch in self._source.read(piece, 0, piece.rows, BATCH_ROWS):
            yield batch.select(list(columns))


def vector_batch(block: Array) -> pa.RecordBatch:
    """(n, d) rows in any byte order as a batch of the one column ``vector``."""
    plain = np.ascontiguousarray(block, block.dtype.newbyteorder("="))
    column = pa.FixedSizeListArray.from_arrays(pa.array(plain.reshape(-1)), block.shape[1])
    return pa.record_batch([column], ["vector"])
