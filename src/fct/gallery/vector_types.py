"""Columns that hold vectors by another name: what each is read as, a plain list or bytes.

Tensors (Arrow's fixed_shape_tensor, Ray's, datasets' Array2D, daft's struct of data and shape) count as vectors where
all dimensions but one are 1; views and dictionaries are taken apart; a list of two-byte binaries is ClickHouse's
Array(BFloat16); a struct of one field ``int4x{d}`` holds packed 4-bit codes (:meth:`fct.PackedInt4.to_arrow`).
"""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fct.gallery.schemas import without_views
from fct.packed_int4 import PackedInt4, codes_field, int4_field

__all__ = ["codes_of", "is_tensor", "plain_type", "plain_vectors"]

_RAY = ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2")


def is_tensor(kind: pa.DataType) -> bool:
    """Whether a column type is a tensor of a fixed shape, which readers hand on as one array."""
    name = getattr(kind, "extension_name", "")
    return name == "arrow.fixed_shape_tensor" or name in _RAY


def codes_of(kind: pa.DataType) -> tuple[str, int | None] | None:
    """(name, how many 4-bit codes a row holds) of a column of codes that says so itself; None in place of a number: of
    another form than this version reads. None for all other columns."""
    if not pa.types.is_struct(kind) or kind.num_fields != 1 or not codes_field(kind.field(0).name):
        return None
    inner = kind.field(0)
    width = inner.type.byte_width if pa.types.is_fixed_size_binary(inner.type) else 0
    return inner.name, int4_field(inner.name, width)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that :func:`plain_vectors` makes of a column of ``kind``; itself where that is nothing special."""
    if isinstance(kind, pa.BaseExtensionType):
        shape = tuple(getattr(kind, "shape", None) or ())
        if is_tensor(kind) and sum(n != 1 for n in shape) > 1:
            return kind  # rows of several vectors
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_list_view(kind):
        return plain_type(pa.list_(kind.value_field))
    if pa.types.is_large_list_view(kind):
        return plain_type(pa.large_list(kind.value_field))
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if _is_nested(kind):
        return kind.value_type
    if _is_bfloat16(kind):
        return pa.list_(pa.float32())
    if _is_shaped(kind):
        return kind.field("data").type
    codes = codes_of(kind)
    return kind if codes is None or codes[1] is None else pa.list_(pa.int8(), codes[1])


def _is_any_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_nested(kind: pa.DataType) -> bool:
    """A list of lists of numbers: datasets' Array2D."""
    return _is_any_list(kind) and _is_any_list(kind.value_type) and pa.types.is_primitive(kind.value_type.value_type)


def _is_bfloat16(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    value = kind.value_type
    return bool(pa.types.is_binary(value) or (pa.types.is_fixed_size_binary(value) and value.byte_width == 2))


def _is_shaped(kind: pa.DataType) -> bool:
    """daft's Tensor: struct<data: list, shape: list>."""
    names = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    return names == ["data", "shape"] and all(_is_any_list(kind.field(n).type) for n in names)


def plain_vectors(column: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    """(the column as a plain list or binary array, reasons by row where it is null there and was not before)."""
    kind = column.type
    if plain_type(kind).equals(kind):
        return column, {}
    if isinstance(column, pa.ExtensionArray):
        return plain_vectors(column.storage)
    if pa.types.is_dictionary(kind):
        values, odd = plain_vectors(column.dictionary)
        plain = values.take(column.indices)
        places = column.indices.to_numpy(zero_copy_only=False) if odd else []
        return plain, {i: odd[int(at)] for i, at in enumerate(places) if at == at and int(at) in odd}
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return plain_vectors(without_views(column))
    if pa.types.is_binary_view(kind):
        return column.cast(pa.large_binary()), {}
    if _is_nested(kind):
        return _of_one_row(column)
    if codes_of(kind) is not None:
        return _of_codes(column), {}
    return _of_bfloat16(column) if _is_bfloat16(kind) else _of_shape(column)


def _of_codes(column: pa.Array) -> pa.Array:
    """The codes, one a byte; null where the struct or its bytes are."""
    rows = column.flatten()[0]  # with the struct's own nulls
    n, width, d = len(rows), rows.type.byte_width, plain_type(column.type).list_size
    data = rows.buffers()[1]
    held = np.zeros((n, width), np.uint8)
    if data is not None and n:
        held = np.frombuffer(data, np.uint8)[rows.offset * width : (rows.offset + n) * width].reshape(n, width)
    codes = pa.array(PackedInt4(held, d).codes("vectors").ravel())
    valid = pa.array(np.asarray(rows.is_valid())).buffers()[1] if rows.null_count else None
    return pa.Array.from_buffers(pa.list_(pa.int8(), d), n, [valid], children=[codes])


def _of_one_row(column: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    """Each row's only list; null where a row has none or several."""
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    n = len(column)
    if not column.null_count and (lengths == 1).all():
        return column.flatten(), {}
    there = np.asarray(column.is_valid())
    one = there & (lengths == 1)
    starts = np.cumsum(np.where(there, np.nan_to_num(lengths), 0).astype(np.int64))
    indices = pa.array(starts - 1, mask=~one)
    odd = {int(i): f"expected one list in a row, got {int(lengths[i])}" for i in np.flatnonzero(there & ~one)}
    return column.flatten().take(indices) if n else column.flatten(), odd


def _of_bfloat16(column: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    flat = column.flatten()
    sizes = pc.fill_null(pc.binary_length(flat), 2).to_numpy(zero_copy_only=False)
    ends = np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy())])
    holes = flat.null_count > 0
    if (sizes != 2).any():  # no two-byte numbers: those rows hold something else
        flat = pa.array([v if v is not None and len(v) == 2 else None for v in flat.to_pylist()], pa.binary())
        holes = True
    half = np.frombuffer(b"".join(v or b"\0\0" for v in flat.to_pylist()), "<u2") if holes else _two_bytes(flat)
    values = (half.astype(np.uint32) << 16).view(np.float32)
    child = pa.array(values, mask=np.asarray(flat.is_null()) if holes else None)
    mask = column.is_null() if column.null_count else None
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), child, mask=mask), {}


def _two_bytes(flat: pa.Array) -> np.ndarray:
    if pa.types.is_fixed_size_binary(flat.type):
        return np.frombuffer(flat.buffers()[1], "<u2")[flat.offset : flat.offset + len(flat)]
    first = np.frombuffer(flat.buffers()[1], np.int32)[flat.offset]
    return np.frombuffer(flat.buffers()[2], np.uint8)[first : first + 2 * len(flat)].view("<u2")


def _of_shape(column: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    """daft's data; null where its shape is not that of one vector."""
    data, shape = column.flatten()  # with the struct's own nulls in both
    shapes = shape.to_pylist()
    odd = {}
    for i, (dims, size) in enumerate(zip(shapes, pc.list_value_length(data).to_pylist(), strict=True)):
        if dims is None or size is None:
            continue
        if sum(n != 1 for n in dims) > 1 or math.prod(dims) != size:
            odd[i] = f"expected a tensor that is one vector, got shape {tuple(dims)} of {size} values"
    if odd:
        good = pa.array([i not in odd for i in range(len(column))])
        data = pc.if_else(good, data, pa.nulls(len(column), data.type))
    return data, odd
