"""Which column of a gallery is meant: the one named, the one that fct marked, one of a usual name, or the only one."""

from __future__ import annotations

import pyarrow as pa

from fct.gallery.interfaces import VECTOR_KEY
from fct.gallery.vectors import refuse_other_codes, vector_type

__all__ = ["ID_NAMES", "SIDE_NAMES", "VECTOR_NAMES", "pick_column", "pick_id_column"]

VECTOR_NAMES = ("old", "vector", "embedding", "emb", "features")
SIDE_NAMES = ("side", "side_info", "side_information")
ID_NAMES = ("id", "_id", "pk", "key", "uid")


def pick_column(schema: pa.Schema, wanted: str, names: tuple[str, ...], what: str, *, without: str = "") -> str:
    """The column of vectors asked for, or the only one that can hold vectors, or the one with a usual name.

    Args:
        schema: the gallery's. wanted: a column's name, or "auto".
        names: usual names, in lower case: VECTOR_NAMES, SIDE_NAMES or both. Where VECTOR_NAMES are among them a column
            of another name will do when it is the only list, or the only binary column.
        what: the argument to name in a message. without: a column that is not meant.

    Returns:
        The name; "" where SIDE_NAMES alone were asked for and there is none.

    Raises:
        ValueError: no such column, one that cannot hold vectors, none, or several; codes that this version does not
        read, in a column that is meant.
    """
    for field in schema:
        if field.name != without and (field.name == wanted or (wanted == "auto" and field.name.lower() in names)):
            refuse_other_codes(field.type, f"{what}: column {field.name!r}")
    able = [f.name for f in schema if vector_type(f.type) and f.name != without]
    if wanted != "auto":
        if wanted not in schema.names:
            raise ValueError(f"{what}: expected a column of the gallery ({', '.join(schema.names)}), got {wanted!r}")
        if wanted not in able:
            raise ValueError(
                f"{what}: expected a list or binary column, {wanted!r} is {schema.field(wanted).type}{_hint(schema)}"
            )
        return wanted
    vectors = VECTOR_NAMES[0] in names
    marked = (schema.metadata or {}).get(VECTOR_KEY, b"").decode(errors="replace")
    if vectors and marked in able:
        return str(marked)
    usual = [n for n in able if n.lower() in names]
    lists = [n for n in able if vector_type(schema.field(n).type) != "binary"]
    for found in (usual, *((lists, able) if vectors else ())):
        if len(found) == 1:
            return str(found[0])
    if not vectors and not usual:
        return ""
    if not able:
        there = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(
            f"{what}: expected a list of floats or 8-bit integers, or a binary column, got {there}{_hint(schema)}"
        )
    raise ValueError(f"{what}: expected the name of a column, since several could be meant: {', '.join(able)}")


def _hint(schema: pa.Schema) -> str:
    for field in schema:
        element = getattr(field.type, "value_type", None)
        if element is not None and pa.types.is_decimal(element):
            return f"; in DuckDB write {field.name} as {field.name}::FLOAT[]: a literal like [0.1, 0.2] holds decimals"
    return ""


def pick_id_column(schema: pa.Schema, wanted: str = "auto", what: str = "id_column") -> str:
    """The column of ids: the one asked for, else the first of ID_NAMES that is there, else "".

    Raises:
        ValueError: no column of that name.
    """
    if wanted == "auto":
        return next((n for n in ID_NAMES if n in schema.names), "")
    if wanted and wanted not in schema.names:
        raise ValueError(f"{what}: expected a column of the gallery ({', '.join(schema.names)}), got {wanted!r}")
    return wanted
