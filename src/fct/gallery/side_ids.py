"""Side-information in a gallery of its own is joined by position; where both sides have ids, they have to agree."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fct.errors import FctError
from fct.gallery.columns import pick_id_column
from fct.gallery.schemas import conform, unify

__all__ = ["columns_in_common", "id_column_of", "require_same_ids"]

_LIKE_IDS = re.compile(r"(?i:(?:^|[_\-. ])(?:id|uid|uuid|guid|key|pk))$|[a-z]I[dD]$")


def id_column_of(side: pa.Schema, id_column: str) -> str:
    """The side gallery's column of ids, for a gallery whose ids are ``id_column``; "" where either has none."""
    if not id_column or id_column in side.names:
        return id_column
    return pick_id_column(side)


def columns_in_common(gallery: pa.Schema, side: pa.Schema, id_column: str) -> list[tuple[str, str]]:
    """The pairs of columns (the gallery's, the side-information's) that have to say the same row by row.

    Those are the ids; where the gallery has no column of ids, those that both have under one name which ends as the
    names of ids do (``item_id``, ``docId``, ``product_key``).
    """
    if id_column:
        other = id_column_of(side, id_column)
        return [(id_column, other)] if other else []
    return [(name, name) for name in gallery.names if name in side.names and _LIKE_IDS.search(name)]


def require_same_ids(ids: pa.Array, others: pa.Array, first: int, column: str = "") -> None:
    """Compares the ids of rows that are joined. first: the number of the first of them, for the message.

    column: its name, where it was not said that it holds ids. One that is the same in all rows holds none.

    Raises:
        FctError: they differ; names the first difference.
    """
    if not ids.type.equals(others.type):
        a, b = (pa.schema([("id", column.type)]) for column in (ids, others))
        try:
            one = unify([a, b], ["the gallery", "the side-information"])
        except FctError as error:
            raise FctError(f"side_source: expected ids of the gallery's type: {error}") from error
        ids, others = (conform(pa.record_batch([c], names=["id"]), one).column(0) for c in (ids, others))
    if ids.equals(others) or (column and len(ids) > 1 and _constant(ids) and _constant(others)):
        return
    at = _first_difference(ids, others)
    if at is None:
        return
    raise FctError(
        f"side_source: expected the ids of the gallery, row by row, row {first + at} is {ids[at]} there and "
        f"{others[at]} in the side-information: join them by id with --side-join id (side_join='id')"
        + (f" and --id-column {column}" if column else "")
        + ", or bring one of them into the order of the other (in DuckDB: ORDER BY id)"
        + (f"; if {column!r} is no id of a row, leave it out of the side-information" if column else "")
    )


def _constant(column: pa.Array) -> bool:
    """Whether all rows have one value. Columns of types that are not compared so are not."""
    # Arrow finds the distinct values of most types and says by this error, which is its own name for it, that it does
    # not for lists and structs. Nothing is left undone here: such a column is then compared row by row, like any other.
    try:
        return len(pc.unique(column)) == 1
    except pa.ArrowNotImplementedError:
        return False


def _first_difference(ids: pa.Array, others: pa.Array) -> int | None:
    """Binary search over prefixes, which are compared whole; None where only NaN differs from itself."""
    low, high = 0, len(ids)
    while high - low > 1:
        middle = (low + high) // 2
        if ids.slice(low, middle - low).equals(others.slice(low, middle - low)):
            low = middle
        else:
            high = middle
    if pa.types.is_floating(ids.type):
        a, b = (np.asarray(column.to_numpy(zero_copy_only=False)) for column in (ids, others))
        where = np.flatnonzero(~((a == b) | (np.isnan(a) & np.isnan(b))))
        return int(where[0]) if len(where) else None
    return low
