"""What a backfill to bare matrices leaves beside them in ``_rows/``: the other columns, or the numbers of the rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fct.atomic_files import checksum_bytes
from fct.errors import FctError
from fct.gallery.columns import pick_id_column
from fct.gallery.file_gallery import named_errors
from fct.gallery.interfaces import Piece, Source, rows_at_once
from fct.gallery.location import Location
from fct.gallery.matrix_files import ROW, BinSource, NpySource
from fct.gallery.stores import open_source

__all__ = ["BesideRows", "load_ids"]

_BATCH = 16384
_MARKER_BYTES = 64 << 20


class BesideRows:
    """What a backfill to bare matrices left beside them: the other columns, or the numbers of the rows that are there.

    first: the number in the old gallery of each piece's first row.
    """

    def __init__(self, source: Source, pieces: Sequence[Piece]) -> None:
        self._files: dict[str, Location] = {}
        self.schema = pa.schema([])
        self.first = [0, *np.cumsum([p.rows for p in pieces])[:-1].tolist()]
        if not isinstance(source, (NpySource, BinSource)) or not (source.location / "_fct/manifest.json").exists():
            return
        root = source.location
        there = set((root / "_rows").files())
        first = 0
        for i, piece in enumerate(pieces):
            stem = piece.name.rpartition(".")[0]
            if f"{stem}.parquet" in there:
                self._files[piece.name] = root / f"_rows/{stem}.parquet"
            number = stem.rpartition("-")[2]
            if not number.isdecimal():
                raise FctError(f"gallery: {root / piece.name} was made by no shard of the backfill here: move it away")
            self.first[i], first = first, first + _rows_in(root / f"_fct/done/{int(number):08d}.json")
        if self._files:
            one = next(iter(self._files.values()))
            with named_errors(one), one.open() as file:
                self.schema = pq.read_schema(file).remove_metadata()

    def table(self, piece: Piece) -> pa.Table | None:
        if piece.name not in self._files:
            return None
        place = self._files[piece.name]
        with named_errors(place), place.open() as file:
            found = pq.read_table(file)
        if len(found) != piece.rows or found.schema.names != self.schema.names:
            raise FctError(
                f"gallery: {place} has {len(found)} rows of {', '.join(found.schema.names)}, expected {piece.rows} of "
                f"{', '.join(self.schema.names)}, as {piece.name} has: run the backfill again"
            )
        return found


def _rows_in(marker: Location) -> int:
    """How many rows a shard had before some were rejected.

    Raises:
        FctError: the marker is not there, damaged or changed.
    """
    try:
        if marker.version().bytes > _MARKER_BYTES:
            raise ValueError(f"more than {_MARKER_BYTES:,} bytes")
        outer = json.loads(marker.read_bytes())
        body = outer["marker"].encode()
        if checksum_bytes(body) != outer["xxh64"]:
            raise ValueError("it does not match its checksum")
        rows = json.loads(body)["rows_in"]
        if type(rows) is not int or rows < 0:
            raise ValueError("rows_in is no number of rows")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FileNotFoundError) as error:
        raise FctError(f"gallery: {marker} is damaged ({error}): run the backfill again") from error
    return rows


def load_ids(location: object, wanted: str = "auto", *, name: str = "id_column") -> pa.Array | None:
    """A gallery's ids as they are stored, row by row; None where rows go by their number.

    Args:
        location: what :func:`fct.gallery.open_source` takes.
        wanted: a column, "auto" for the one that a backfill takes, or "" for none. Columns in ``_rows/`` count.
        name: the argument or option, for messages.

    Returns:
        (n,) of the column's type.
    """
    source = open_source(location)
    pieces = source.pieces()
    beside = BesideRows(source, pieces)
    schema = pa.schema([*source.schema, *(f for f in beside.schema if f.name not in source.schema.names)])
    column = pick_id_column(schema, wanted, name)
    if not column and wanted == "auto" and ROW in schema.names:
        column = ROW
    if not column:
        return None
    parts = list(_columns(source, pieces, beside, column))
    whole = pa.chunked_array(parts, schema.field(column).type).unify_dictionaries()
    return whole.combine_chunks() if whole.num_chunks != 1 else whole.chunk(0)


def _columns(source: Source, pieces: Sequence[Piece], beside: BesideRows, column: str) -> Iterator[pa.Array]:
    for piece, first in zip(pieces, beside.first, strict=True):
        if column in source.schema.names:
            yield from (
                batch.column(column) for batch in source.read(piece, 0, piece.rows, rows_at_once(source, piece, _BATCH))
            )
            continue
        more = beside.table(piece)
        if more is None:
            yield pa.array(np.arange(first, first + piece.rows))
        else:
            yield from more[column].chunks
