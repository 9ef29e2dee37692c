"""Between an Arrow column and an (n, d) block of rows: the child buffer is taken as it lies, never row by row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fct.gallery.interfaces import Batches
from fct.gallery.vector_types import codes_of, is_tensor, plain_type, plain_vectors
from fct.packed_int4 import PackedInt4
from fct.types import Array

__all__ = [
    "VECTOR_FORMATS",
    "VectorBlock",
    "column_type",
    "holds_float64",
    "is_packed_int4",
    "rebatch",
    "refuse_bytes_of_codes",
    "refuse_other_codes",
    "vector_array",
    "vector_block",
    "vector_dim",
    "vector_dtype",
    "vector_type",
]

VECTOR_FORMATS = ("fixed_size_list", "list", "binary", "tensor")
_CACHED = 1 << 15  # values rounded at a time
_DTYPES = {
    pa.float32(): np.float32, pa.float64(): np.float64, pa.float16(): np.float16, pa.uint8(): np.uint8,
    pa.int8(): np.int8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class VectorBlock:
    """values: (m, d) rows that have the right length, float32 or float16. rows: None when m is the column's length,
    else the m row indices they come from. bad: reason by row index for the others."""

    values: Array
    rows: Array | None
    bad: dict[int, str]


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def vector_type(kind: pa.DataType) -> str | None:
    """Which of VECTOR_FORMATS a column type is, or None when it cannot hold vectors.

    A tensor column (Arrow's fixed_shape_tensor, Ray's) is "tensor"; of what other types can be read as vectors
    (:mod:`fct.gallery.vector_types`), the list or bytes that they are read as.
    """
    if is_tensor(kind):
        plain = plain_type(kind)
        return None if plain.equals(kind) or vector_type(plain) is None else "tensor"
    codes = codes_of(kind)
    if codes is not None:  # bytes, so that no list of numbers beside it is taken for its like
        return None if codes[1] is None else "binary"
    kind = plain_type(kind)
    if pa.types.is_fixed_size_list(kind) and kind.value_type in _DTYPES:
        return "fixed_size_list"
    if _is_list(kind) and kind.value_type in _DTYPES:
        return "list"
    return "binary" if _is_binary(kind) else None


def vector_dtype(kind: pa.DataType, binary_dtype: str = "float32") -> str:
    """What a column's vectors are read as: float16 where that is stored, else float32.

    Raises:
        ValueError: the type cannot hold vectors.
    """
    form = vector_type(kind)
    if form is None:
        raise ValueError(f"vectors: expected a list or binary column, got {kind}")
    if form == "binary":
        return binary_dtype
    return "float16" if plain_type(kind).value_type == pa.float16() else "float32"


def is_packed_int4(kind: pa.DataType, d: int, binary_dtype: str = "float32") -> bool:
    """Whether a column of this type can only hold d 4-bit codes a row."""
    width = kind.byte_width if pa.types.is_fixed_size_binary(kind) else 0
    return bool(width == (d + 1) // 2 and width != d * np.dtype(binary_dtype).itemsize)


def refuse_other_codes(kind: pa.DataType, what: str) -> None:
    """Raises ValueError for a column of codes in a form that this version of fct does not read."""
    codes = codes_of(kind)
    if codes is not None and codes[1] is None:
        raise ValueError(
            f"{what}: expected floats, 8-bit integers or packed 4-bit codes (int4x128 of 64 bytes), got a column of "
            f"codes {codes[0]!r}, {kind}: a later version of fct may read them"
        )


def refuse_bytes_of_codes(kind: pa.DataType, values: Array, what: str) -> None:
    """Raises ValueError where bytes of one width were read as floats and are no floats: packed 4-bit codes have
    numbers beyond 1e18 everywhere among them, embeddings have none."""
    if not pa.types.is_fixed_size_binary(plain_type(kind)) or not values.size:
        return
    if np.mean(~(np.abs(values) < 1e18)) > 0.01:
        raise ValueError(
            f"{what}: {kind} read as {values.dtype} gives numbers like {np.nanmax(np.abs(values)):.3g}: packed 4-bit "
            "codes? Their number in a row is not known here; write them with PackedInt4.to_arrow(), whose type says it"
        )


def holds_float64(schema: pa.Schema, columns: Iterable[str]) -> bool:
    """Whether the vectors of any of these columns are rounded to float32 as they are read."""
    kinds = [plain_type(schema.field(name).type) for name in columns if name in schema.names]
    return any(getattr(kind, "value_type", None) == pa.float64() for kind in kinds)


def vector_dim(column: pa.Array, binary_dtype: str = "float32") -> int | None:
    """Length of the column's vectors: its type's, else its first non-null row's; None when there is no such row."""
    column, _ = plain_vectors(column)
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    if pa.types.is_fixed_size_binary(kind):
        return int(kind.byte_width // np.dtype(binary_dtype).itemsize)
    for value in column:
        if value.is_valid:
            size = len(value.as_py()) if _is_binary(kind) else len(value.values)
            return size // np.dtype(binary_dtype).itemsize if _is_binary(kind) else size
    return None


def vector_block(column: pa.Array, d: int, binary_dtype: str = "float32") -> VectorBlock:
    """The column's rows as an (n, d) block, without a copy when every row is whole.

    Rows that are null, hold a null or have another length are left out and named with the reason; whether values are
    finite is the caller's to check. 8-bit integers become float32, and so do 4-bit codes: a fixed-size binary column of
    ceil(d / 2) bytes (:class:`fct.PackedInt4`). float64 is rounded to it once, and a row with a value beyond its range
    is left out and named too.

    Raises:
        ValueError: the column's type cannot hold vectors of d elements.
    """
    refuse_other_codes(column.type, "vectors")
    column, odd = plain_vectors(column)
    if is_packed_int4(column.type, d, binary_dtype):
        packed = vector_block(column, column.type.byte_width, "uint8")
        codes = PackedInt4(packed.values.astype(np.uint8), d).codes("vectors")
        return VectorBlock(codes.astype(np.float32), packed.rows, packed.bad)
    layout = _layout(column, d, binary_dtype)
    bad = _broken_rows(column, layout, odd)
    rows = None
    if bad:
        good = np.ones(len(column), dtype=bool)
        good[list(bad)] = False
        rows = np.flatnonzero(good)
    values = _whole_rows(layout, layout.starts if rows is None else layout.starts[rows])
    if values.dtype in (np.uint8, np.int8):
        values = values.astype(np.float32)
    if values.dtype == np.float64:
        values, beyond = _rounded(values)
        if len(beyond):
            rows = np.arange(len(column)) if rows is None else rows
            bad |= dict.fromkeys(rows[beyond].tolist(), "beyond float32's range")
            rows, values = np.delete(rows, beyond), np.delete(values, beyond, axis=0)
    return VectorBlock(values, rows, bad)


class _Layout(NamedTuple):
    """Where a column's vectors lie: row i holds ``sizes[i]`` (None: ``step``) entries from ``starts[i]`` on. These are
    elements of ``child``, or bytes of ``column`` itself where that is binary."""

    column: pa.Array
    child: pa.Array | None
    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64] | None
    step: int
    dtype: np.dtype[np.generic]


def _layout(column: pa.Array, d: int, binary_dtype: str) -> _Layout:
    """Raises ValueError where the column's type cannot hold vectors of d elements."""
    kind, n = column.type, len(column)
    if pa.types.is_fixed_size_list(kind) and kind.value_type in _DTYPES:
        if kind.list_size != d:
            raise ValueError(f"vectors: expected {d} elements a row, got a column of {kind}")
        starts = (column.offset + np.arange(n, dtype=np.int64)) * d
        return _Layout(column, column.values, starts, None, d, np.dtype(_DTYPES[kind.value_type]))
    if _is_list(kind) and kind.value_type in _DTYPES:
        offsets = column.offsets.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
        return _Layout(column, column.values, offsets[:-1], np.diff(offsets), d, np.dtype(_DTYPES[kind.value_type]))
    if not _is_binary(kind):
        raise ValueError(f"vectors: expected a list or binary column, got {kind}")
    dtype: np.dtype[np.generic] = np.dtype(binary_dtype)
    step = d * dtype.itemsize
    if pa.types.is_fixed_size_binary(kind):
        if kind.byte_width != step:
            raise ValueError(f"vectors: expected {d} {binary_dtype} a row, got a column of {kind}")
        starts = (column.offset + np.arange(n, dtype=np.int64)) * step
        return _Layout(column, None, starts, None, step, dtype)
    offsets, ends = np.zeros(n + 1, np.int64), column.buffers()[1]
    if ends is not None and n:
        wide = np.int64 if pa.types.is_large_binary(kind) else np.int32
        offsets = np.frombuffer(ends, wide)[column.offset : column.offset + n + 1].astype(np.int64)
    return _Layout(column, None, offsets[:-1], np.diff(offsets), step, dtype)


def _broken_rows(column: pa.Array, layout: _Layout, odd: dict[int, str]) -> dict[int, str]:
    """Why a row is no vector, by row. odd: reasons of rows that were made null as they were read."""
    good = np.ones(len(column), dtype=bool)
    bad: dict[int, str] = {}
    if column.null_count:
        null = np.asarray(column.is_null())
        bad |= dict.fromkeys(np.flatnonzero(null).tolist(), "null") | odd
        good &= ~null
    child, starts, sizes, step = layout.child, layout.starts, layout.sizes, layout.step
    if sizes is not None:
        wrong, width = good & (sizes != step), 1 if child is not None else layout.dtype.itemsize
        for i in np.flatnonzero(wrong).tolist():
            bad[i] = f"expected {step // width} elements, got {sizes[i] / width:g}"
        good &= ~wrong
    if child is not None and child.null_count:
        hollow = np.concatenate([[0], np.cumsum(np.asarray(child.is_null()))])
        where = np.flatnonzero(good)
        torn = where[hollow[starts[where] + step] > hollow[starts[where]]]
        bad |= dict.fromkeys(torn.tolist(), "holds a null element")
    return bad


def _whole_rows(layout: _Layout, starts: npt.NDArray[np.int64]) -> Array:
    """The rows that begin there, (rows, d): a view where one follows the other, else a copy."""
    child, step, dtype = layout.child, layout.step, layout.dtype
    if len(starts) == 0:
        return np.empty((0, step if child is not None else step // dtype.itemsize), dtype)
    buffer = layout.column.buffers()[-1] if child is None else child.buffers()[1]
    flat = np.frombuffer(buffer if buffer is not None else b"", np.uint8 if child is None else dtype)
    starts = starts + (0 if child is None else child.offset)
    if starts[-1] - starts[0] == (len(starts) - 1) * step and (np.diff(starts) == step).all():
        values = flat[starts[0] : starts[-1] + step]
        if child is None and values.ctypes.data % dtype.itemsize:
            values = np.frombuffer(values.tobytes(), dtype)
        return values.view(dtype).reshape(len(starts), -1)
    values = np.empty((len(starts), step), flat.dtype)
    for i, start in enumerate(starts.tolist()):
        values[i] = flat[start : start + step]
    return values.view(dtype)


def _rounded(values: Array) -> tuple[Array, Array]:
    """(float32, the rows in which a finite value became infinite), in blocks that stay in the cache."""
    out = np.empty(values.shape, np.float32)
    step, wide = max(1, _CACHED // max(1, values.shape[1])), []
    with np.errstate(over="ignore"):
        for start in range(0, len(values), step):
            block, made = values[start : start + step], out[start : start + step]
            made[...] = block
            # The largest magnitude settles it for a block; NaN compares false and is the caller's.
            if np.isinf(made.max(initial=0.0)) or np.isinf(made.min(initial=0.0)) or np.isnan(made.sum()):
                wide.append(start + np.flatnonzero((np.isinf(made) & np.isfinite(block)).any(axis=1)))
    return out, np.concatenate(wide) if wide else np.empty(0, np.int64)


def column_type(d: int, dtype: str, form: str) -> pa.DataType:
    value = pa.float16() if dtype == "float16" else pa.float32()
    if form == "tensor":
        return pa.fixed_shape_tensor(value, (d,))
    if form == "fixed_size_list":
        return pa.list_(value, d)
    return pa.list_(value) if form == "list" else pa.binary(d * np.dtype(dtype).itemsize)


def vector_array(values: Array, form: str = "fixed_size_list") -> pa.Array:
    """(n, d) float32 or float16 as an Arrow column of one of VECTOR_FORMATS, without a copy."""
    n, d = values.shape
    values = np.ascontiguousarray(values)
    kind = column_type(d, values.dtype.name, form)
    if form == "binary":
        return pa.FixedSizeBinaryArray.from_buffers(kind, n, [None, pa.py_buffer(values)])
    child = pa.Array.from_buffers(kind.value_type, n * d, [None, pa.py_buffer(values)])
    if form == "tensor":
        storage = pa.FixedSizeListArray.from_arrays(child, type=kind.storage_type)
        return pa.ExtensionArray.from_storage(kind, storage)
    if form == "fixed_size_list":
        return pa.FixedSizeListArray.from_arrays(child, type=kind)
    offsets = pa.py_buffer(np.arange(0, (n + 1) * d, d, dtype=np.int32)[: n + 1])
    return pa.Array.from_buffers(kind, n, [None, offsets], children=[child])


def rebatch(batches: Batches, rows: int) -> Batches:
    """The same rows in batches of exactly ``rows`` (the last may be shorter), however they were cut before."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        start = 0
        while batch.num_rows - start:
            take = min(rows - count, batch.num_rows - start)
            held.append(batch.slice(start, take))
            start, count = start + take, count + take
            if count == rows:
                yield held[0] if len(held) == 1 else pa.concat_batches(held)
                held, count = [], 0
    if held:
        yield held[0] if len(held) == 1 else pa.concat_batches(held)
