"""One dataset in several spellings: the one rule by which the schemas of a gallery's files become one, and batches too.

The rule (:data:`RULE` in a sentence, docs/galleries.md with examples). Columns go by name, in the first file's order;
those that only later files have come behind. A column of one type everywhere keeps it. Else:

- string, large_string, string_view and dictionaries of them are text; binary and its kin, bytes; list, large_list,
  list_view and fixed_size_list, lists (fixed-size lists of two lengths stay apart). The wider offsets win.
- Integers become the narrowest type that holds both; so do floats. A column of nulls takes the other's type.
- A column may be null where it may be in one file. A file without it reads as nulls, if it may be null where it is; a
  column of vectors has to be in every file.

Everything else is refused with the difference alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fct.errors import FctError

__all__ = ["RULE", "conform", "difference", "readable", "unify", "without_views"]

RULE = (
    "files spell their columns differently; read as one: by name, text, bytes and lists in the wider spelling, "
    "integers and floats in the wider type, null where a column is missing"
)
_SIGNED = (pa.int8(), pa.int16(), pa.int32(), pa.int64())
_UNSIGNED = (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
_FLOATS = (pa.float16(), pa.float32(), pa.float64())


def _views(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string_view(kind) or pa.types.is_binary_view(kind))


def readable(schema: pa.Schema) -> pa.Schema:
    """The schema as batches are handed on: views of text and bytes as plain ones, wherever they stand, since Arrow
    neither takes nor leaves out rows of them."""
    for i, field in enumerate(schema):
        schema = schema.set(i, field.with_type(_without_views(field.type)))
    return schema


def _without_views(kind: pa.DataType) -> pa.DataType:
    if _views(kind):
        return pa.large_string() if pa.types.is_string_view(kind) else pa.large_binary()
    if pa.types.is_dictionary(kind) and _views(kind.value_type):
        values = pa.string() if pa.types.is_string_view(kind.value_type) else pa.binary()
        return pa.dictionary(kind.index_type, values, kind.ordered)
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(_without_views(f.type)) for f in kind])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_inner(kind), kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return (pa.list_ if pa.types.is_list(kind) else pa.large_list)(_inner(kind))
    return kind


def _inner(kind: pa.DataType) -> pa.Field:
    return kind.value_field.with_type(_without_views(kind.value_type))


def unify(schemas: Sequence[pa.Schema], names: Sequence[str]) -> pa.Schema:
    """One schema for all, by the rule above. names: of the files, for messages.

    Raises:
        FctError: two of them cannot be one; says in what they differ.
    """
    first = schemas[0]
    if all(s is first or s.equals(first) for s in schemas):
        return first
    fields = {f.name: f for f in first}
    origin = dict.fromkeys(fields, names[0])
    for schema, name in zip(schemas, names, strict=True):
        if len(set(schema.names)) != len(schema.names) or (len(fields) != len(first.names) and schema is first):
            raise FctError(f"source: expected columns with names of their own, {name} has one twice")
        for field in schema:
            known = fields.setdefault(field.name, field)
            origin.setdefault(field.name, name)
            kind = known.type if known.type.equals(field.type) else _wider(known.type, field.type)
            if kind is None:
                raise FctError(
                    f"source: expected the same columns in every file, {name} has {field.name}: {field.type}, "
                    f"{origin[field.name]} has {field.name}: {known.type}"
                )
            fields[field.name] = pa.field(field.name, kind, known.nullable or field.nullable, known.metadata)
    for schema, name in zip(schemas, names, strict=True):
        for missing in (f for n, f in fields.items() if n not in schema.names):
            if not missing.nullable or _holds_floats(missing.type):
                why = "is a column of vectors" if _holds_floats(missing.type) else "may not be null"
                raise FctError(
                    f"source: expected the same columns in every file, {name} has no {missing.name!r}, which "
                    f"{why} in {origin[missing.name]}"
                )
    return pa.schema(fields.values(), metadata=first.metadata)


def difference(a: pa.Schema, b: pa.Schema) -> list[str]:
    """In what two schemas differ, a line for each column; [] where they are the same."""
    lines = [f"{f.name}: only in the first" for f in a if f.name not in b.names]
    lines += [f"{f.name}: only in the second" for f in b if f.name not in a.names]
    for field in a:
        if field.name not in b.names or field.equals(b.field(field.name)):
            continue
        other = b.field(field.name)
        if not field.type.equals(other.type):
            lines.append(f"{field.name}: {field.type}, {other.type}")
        if field.nullable != other.nullable:
            lines.append(f"{field.name}: " + ("may, may not" if field.nullable else "may not, may") + " be null")
    if not lines and a.names != b.names:
        lines.append(f"order: {', '.join(a.names)}; {', '.join(b.names)}")
    return lines


def _holds_floats(kind: pa.DataType) -> bool:
    element = getattr(kind, "value_type", None)
    return element is not None and pa.types.is_floating(element)


def _wider(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type that holds every value of both, or None."""
    if a.equals(b):
        return a
    if pa.types.is_null(a) or pa.types.is_null(b):
        return b if pa.types.is_null(a) else a
    a, b = _plain(a), _plain(b)
    if a.equals(b):
        return a
    for family, plain, large in (
        ({pa.string(), pa.large_string(), pa.string_view()}, pa.string(), pa.large_string()),
        ({pa.binary(), pa.large_binary(), pa.binary_view()}, pa.binary(), pa.large_binary()),
    ):
        if a in family and b in family:
            return large if large in (a, b) else plain
    if _is_bytes(a) and _is_bytes(b):  # fixed_size_binary among them
        return pa.large_binary() if pa.large_binary() in (a, b) else pa.binary()
    if _is_list(a) and _is_list(b):
        return _wider_list(a, b)
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        return _wider_struct(a, b)
    return _wider_number(a, b)


def _plain(kind: pa.DataType) -> pa.DataType:
    while pa.types.is_dictionary(kind) or isinstance(kind, pa.BaseExtensionType):
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind.storage_type
    return kind


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) or _is_long_list(kind) or _is_short_list(kind))


def _is_long_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind))


def _is_short_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_list_view(kind))


def _wider_list(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    element = _wider(a.value_type, b.value_type)
    if element is None:
        return None
    if pa.types.is_fixed_size_list(a) and pa.types.is_fixed_size_list(b):
        return pa.list_(element, a.list_size) if a.list_size == b.list_size else None
    return pa.large_list(element) if _is_long_list(a) or _is_long_list(b) else pa.list_(element)


def _wider_struct(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    mine, theirs = ([kind.field(i) for i in range(kind.num_fields)] for kind in (a, b))
    if [f.name for f in mine] != [f.name for f in theirs]:
        return None
    kinds = [_wider(f.type, g.type) for f, g in zip(mine, theirs, strict=True)]
    if None in kinds:
        return None
    fields = zip(mine, theirs, kinds, strict=True)
    return pa.struct([pa.field(f.name, kind, f.nullable or g.nullable) for f, g, kind in fields])


def _wider_number(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    for family in (_SIGNED, _UNSIGNED, _FLOATS):
        if a in family and b in family:
            return family[max(family.index(a), family.index(b))]
    if a in _UNSIGNED and b in _SIGNED:
        a, b = b, a
    if a in _SIGNED and b in _UNSIGNED[:-1]:
        return _SIGNED[max(_SIGNED.index(a), _UNSIGNED.index(b) + 1)]
    return None


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch under the schema that :func:`unify` or :func:`readable` made of its own: the same values."""
    if batch.schema is schema or batch.schema.equals(schema):
        return batch
    columns = []
    for field in schema:
        at = batch.schema.get_field_index(field.name)
        if at < 0:
            columns.append(pa.nulls(batch.num_rows, field.type))
        else:
            columns.append(_cast(batch.column(at), field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if column.type.equals(kind):
        return column
    if isinstance(column, pa.ExtensionArray):
        return _cast(column.storage, kind)
    if pa.types.is_dictionary(column.type):
        values: pa.Array = column.dictionary
        if pa.types.is_dictionary(kind):
            return pa.DictionaryArray.from_arrays(column.indices, _cast(values, kind.value_type), ordered=kind.ordered)
        return _cast(values, kind).take(column.indices)
    if pa.types.is_dictionary(kind):  # Arrow makes none of a view
        return _cast(column, kind.value_type).dictionary_encode().cast(kind)
    return without_views(column).cast(kind)


def without_views(column: pa.Array) -> pa.Array:
    """A list_view or large_list_view as list or large_list; anything else as it is.

    Not by Array.cast: pyarrow 26.0.1 empties the last row (findings/pyarrow_list_view_cast.sh).
    """
    long = pa.types.is_large_list_view(column.type)
    if not long and not pa.types.is_list_view(column.type):
        return column
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64 if long else np.int32)
    made = pa.LargeListArray if long else pa.ListArray
    kind = (pa.large_list if long else pa.list_)(column.type.value_field)
    return made.from_arrays(ends, column.flatten(), type=kind, mask=column.is_null() if column.null_count else None)
