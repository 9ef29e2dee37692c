"""Rows of 4-bit codes, two to a byte: the smallest form that side-information is stored in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fct.types import Array, NumpyDType

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["PackedInt4", "codes_field", "int4_codes_of", "int4_field", "pack_int4"]

_FIELD = re.compile(r"int4x([1-9]\d{0,8})")
_ANY_CODES = re.compile(r"[a-z]{1,8}\d{1,2}x[1-9]\d{0,8}")


def int4_field(name: str, width: int) -> int | None:
    """How many 4-bit codes a field of this name and of ``width`` bytes holds; None where it is no such field."""
    match = _FIELD.fullmatch(name)
    d = int(match[1]) if match is not None else 0
    return d if d and width == (d + 1) // 2 else None


def codes_field(name: str) -> bool:
    """Whether a field's name says that it holds codes of some form: this one, or one that a later fct may have."""
    return _ANY_CODES.fullmatch(name) is not None


def int4_codes_of(dtype: NumpyDType) -> int | None:
    """How many 4-bit codes a record of this dtype holds, as :attr:`PackedInt4.records` has them; None for others."""
    names = dtype.names or ()
    field = dtype.fields[names[0]][0] if len(names) == 1 and dtype.fields is not None else None
    if field is None or field.subdtype is None or field.subdtype[0] != np.uint8 or len(field.shape) != 1:
        return None
    return int4_field(names[0], field.shape[0])


@dataclass(frozen=True, slots=True)
class PackedInt4:
    """(n, d) codes from -8 to 7 in (n, ceil(d / 2)) bytes; the even columns lie in the low halves.

    Code 2i is the low half of byte i, code 2i + 1 the high half, in two's complement; with an odd number of codes the
    last half is 0. ``records``, for an ``.npy``, are of one field, ``int4x64`` for 64 codes; ``to_arrow`` gives a
    struct of the same field. Bare bytes in a fixed-size binary column are read by backfills, since h says how many
    codes they are.

    A transformation is fitted on the codes as they are, so that no scale is stored: fct standardises every input
    dimension, which makes its unit irrelevant.

    Args:
        values: (n, ceil(d / 2)) uint8, numpy or torch on the CPU.
        d: how many codes a row holds.

    Examples:
        >>> import numpy as np
        >>> from fct.packed_int4 import pack_int4
        >>> packed = pack_int4(np.array([[-8, 7, 3]]))
        >>> packed.values.shape, packed.shape, packed.codes().tolist()
        ((1, 2), (1, 3), [[-8, 7, 3]])
    """

    values: Array
    d: int

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.values.shape[0]), self.d

    def __len__(self) -> int:
        return int(self.values.shape[0])

    def __getitem__(self, rows: slice | Array) -> PackedInt4:
        return PackedInt4(self.values[rows], self.d)

    @property
    def records(self) -> Array:
        """(n,) records of one field, ``int4x{d}`` of ceil(d / 2) bytes; ``numpy.save`` makes a packed ``.npy`` of them.

        ``numpy.load`` gives the same records, which every fct function takes in place of this object.
        """
        self.codes()  # refuses what is not packed so
        values = np.ascontiguousarray(self.values.detach().cpu() if hasattr(self.values, "detach") else self.values)
        return values.view([(f"int4x{self.d}", np.uint8, values.shape[1:])]).reshape(len(values))

    def to_arrow(self) -> pa.StructArray:
        """(n,) structs of one field, ``int4x{d}`` of ceil(d / 2) bytes: a column for Parquet, Arrow and tables.

        Its type says what it holds, wherever the column goes, so that no reader takes the bytes for numbers.

        Examples:
            >>> import numpy as np
            >>> from fct.packed_int4 import pack_int4
            >>> pack_int4(np.array([[-8, 7, 3]])).to_arrow().type
            StructType(struct<int4x3: fixed_size_binary[2]>)
        """
        import pyarrow as pa

        values = np.ascontiguousarray(self.records[f"int4x{self.d}"])
        width = values.shape[1]
        rows = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(values), [None, pa.py_buffer(values)])
        return pa.StructArray.from_arrays([rows], [f"int4x{self.d}"])

    @classmethod
    def of_records(cls, array: Array, name: str = "rows") -> PackedInt4:
        """Of :attr:`records`, without a copy. ValueError: other records."""
        d = int4_codes_of(array.dtype)
        if d is None or array.ndim != 1:
            names = array.dtype.names or ()
            later = "; a later fct may read these codes" if len(names) == 1 and codes_field(names[0]) else ""
            raise ValueError(
                f"{name}: expected (n,) records of one field int4xD of ceil(D / 2) bytes, as PackedInt4.records "
                f"makes them, or rows of numbers, got {array.shape} {array.dtype.descr}{later}"
            )
        return cls(array[f"int4x{d}"], d)

    def codes(self, name: str = "rows") -> Array:
        """(n, d) int8 codes.

        Raises:
            ValueError: values are not (n, ceil(d / 2)) uint8.
        """
        values = np.asarray(self.values.detach().cpu() if hasattr(self.values, "detach") else self.values)
        whole = isinstance(self.d, (int, np.integer)) and not isinstance(self.d, bool) and self.d >= 1
        if values.dtype != np.uint8 or values.ndim != 2 or not whole or values.shape[1] != (self.d + 1) // 2:
            want = f"(n, {(self.d + 1) // 2})" if whole else "d of at least 1 and (n, ceil(d / 2))"
            raise ValueError(
                f"{name}: expected {want} uint8 in PackedInt4 of d={self.d!r}, got {values.dtype} of {values.shape}"
            )
        out = np.empty((len(values), 2 * values.shape[1]), np.int8)
        out[:, 0::2] = values & 15
        out[:, 1::2] = values >> 4
        out -= (out > 7).astype(np.int8) * 16
        return np.ascontiguousarray(out[:, : self.d])


def pack_int4(codes: Array) -> PackedInt4:
    """(n, d) whole numbers from -8 to 7 as :class:`PackedInt4`.

    Raises:
        ValueError: another rank, or a number outside the range.
    """
    array = np.asarray(codes)
    if array.ndim != 2 or array.dtype.kind not in "iu" or array.shape[1] == 0:
        raise ValueError(f"codes: expected (n, d) whole numbers from -8 to 7, got {array.dtype} of {array.shape}")
    if array.size and (array.min() < -8 or array.max() > 7):
        raise ValueError(f"codes: expected whole numbers from -8 to 7, got some from {array.min()} to {array.max()}")
    n, d = array.shape
    halves = np.zeros((n, d + d % 2), np.uint8)
    halves[:, :d] = array.astype(np.int8).view(np.uint8) & 15
    return PackedInt4(halves[:, 0::2] | (halves[:, 1::2] << 4), d)
