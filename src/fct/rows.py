"""The one gate: every array that enters is checked and brought to a known layout here.

Rows are items, ``(n, d)``. NumPy arrays, torch tensors and anything with ``__dlpack__`` come in; the same kind on
the same device goes out. dtypes: float32, float16, bfloat16 (torch, or numpy with ml_dtypes), and int8 with a
scale as :class:`ScaledInt8`.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fct import _C
from fct.checks import check_choice
from fct.codes import ScaledInt8, check_per_row, is_torch, signed
from fct.extras import need
from fct.native_codes import BYTES_OF, DTYPE_CODES
from fct.packed_int4 import PackedInt4
from fct.types import Array, Bools, OneKind, RowsLike, Values

if TYPE_CHECKING:
    import torch

    from fct._C import Xxh64


__all__ = [
    "BYTES_OF",
    "DTYPES",
    "Rows",
    "ScaledInt8",
    "check_backed",
    "check_dtype",
    "check_labels",
    "empty_like_kind",
    "nonfinite_rows",
    "rows_of",
]

DTYPES = tuple(DTYPE_CODES)
# numpy takes microseconds to spell out a dtype, which a single query would feel.
_NAMES = {np.dtype(name): name for name in ("float32", "float16", "int8")}

_CHECKED_AT_ONCE = 1 << 26  # values of one compiled call


@dataclass(frozen=True, slots=True)
class Rows:
    """A checked block of rows, ready for a backend.

    values: (n, d) with stride 1 along d and any row stride. On the CPU always a numpy array (bfloat16 as its
        uint16 bits); on a GPU the torch tensor.
    dtype: one of DTYPES, what the values mean.
    scale: None, or float32 of shape (1, 1), (n, 1) or (1, d) for int8; numpy on the CPU, a tensor on a GPU.
    offset: the same for what is added to int8 values times scale; None for nothing. Only :func:`rows_of` with
        ``codes=True`` leaves one.
    device: "cpu" or "cuda:0", ...
    kind: what came in and goes out: "numpy", "torch", or the name of another library that speaks DLPack.
    """

    values: Values
    dtype: str
    scale: Values
    device: str
    kind: str
    offset: Values = None

    @property
    def n(self) -> int:
        return int(self.values.shape[0])

    @property
    def d(self) -> int:
        return int(self.values.shape[1])

    @property
    def row_stride(self) -> int:
        """Elements from one row to the next."""
        n, d = self.values.shape
        if n <= 1:
            return int(d)
        return self.values.strides[0] // self.values.itemsize if self.kind_is_numpy else int(self.values.stride(0))

    @property
    def kind_is_numpy(self) -> bool:
        return isinstance(self.values, np.ndarray)

    @property
    def address(self) -> int:
        return _C.array_address(self.values) if self.kind_is_numpy else int(self.values.data_ptr())

    @property
    def dtype_code(self) -> int:
        return DTYPE_CODES[self.dtype]

    def __getitem__(self, part: slice) -> Rows:
        scale, offset = (
            x[part] if x is not None and x.shape[0] == self.n and self.n != 1 else x for x in (self.scale, self.offset)
        )
        return Rows(self.values[part], self.dtype, scale, self.device, self.kind, offset)

    @property
    def itemsize(self) -> int:
        return BYTES_OF[self.dtype]

    def overlaps(self, other: Rows) -> bool:
        """Whether some value of one lies in the memory of the other; columns of one wide array do not."""
        if not (self.n and other.n) or self.device != other.device:
            return False
        (a, wide_a, step_a), (b, wide_b, step_b) = (
            (r.address, r.d * r.itemsize, r.row_stride * r.itemsize) for r in (self, other)
        )
        if a + (self.n - 1) * step_a + wide_a <= b or b + (other.n - 1) * step_b + wide_b <= a:
            return False
        if 1 in (self.n, other.n) or step_a != step_b:
            return True
        apart = (b - a) % step_a
        return apart < wide_a or apart + wide_b > step_a

    def float32(self) -> Values:
        """The rows as float32, scale applied; numpy on the CPU, a tensor on a GPU. A copy unless float32 already."""
        if not self.kind_is_numpy:
            out = self.values.float()
        elif self.dtype == "bfloat16":
            out = (self.values.astype(np.uint32) << 16).view(np.float32)
        else:
            out = self.values.astype(np.float32, copy=False)
        out = out if self.scale is None else out * self.scale
        return out if self.offset is None else out + self.offset

    def without_offset(self) -> Rows:
        """These rows, or a float32 copy of codes that have an offset, for those that know a scale alone."""
        return self if self.offset is None else Rows(self.float32(), "float32", None, self.device, self.kind)


def check_dtype(dtype: str, name: str = "dtype") -> str:
    return check_choice(dtype, name, DTYPES)


def rows_of(
    x: RowsLike,
    name: str,
    *,
    d: int | None = None,
    d_why: str = "",
    n: int | None = None,
    n_why: str = "",
    finite: bool = True,
    allow_empty: bool = True,
    write: bool = False,
    codes: bool = False,
    report: Callable[[float], None] | None = None,
) -> Rows:
    """Checks ``x`` and brings it to :class:`Rows`; copies only where the last axis is not contiguous.

    Args:
        x: (n, d) array, tensor, DLPack object, ScaledInt8 or PackedInt4 (its records too).
        name: the argument's name, for messages.
        d, n: expected sizes, with ``d_why``/``n_why`` appended to the message ("to match the transformation").
        finite: refuse NaN and infinities (integer dtypes have none).
        allow_empty: whether zero rows are fine.
        write: what is written there must arrive in ``x``: refuse what would be copied, is read-only or records
            gradients.
        codes: leave 8-bit codes with an offset as they are; else they become float32 rows, a copy.
        report: told the share of the rows that have been looked at, which a memory map may take long for.

    Raises:
        TypeError: not an array. ValueError: wrong rank, size, dtype or a non-finite value.
    """
    if isinstance(x, np.ndarray) and x.dtype.names:
        x = PackedInt4.of_records(x, name)
    if isinstance(x, PackedInt4):
        x = ScaledInt8(x.codes(name))
    values, scale, offset = (x.values, x.scale, x.offset) if isinstance(x, ScaledInt8) else (x, None, None)
    kind, device, array, dtype = _unwrap(values, name)
    unsigned = isinstance(x, ScaledInt8) and dtype == "uint8"
    if unsigned:
        if write:
            raise ValueError(f"{name}: expected int8 values to write to, got uint8; wrap int8 ones in fct.ScaledInt8")
        array, dtype = signed(array), "int8"
    shape = tuple(int(s) for s in array.shape)
    want = f"({n if n is not None else 'n'}, {d if d is not None else 'd'})"
    if len(shape) != 2:
        raise ValueError(f"{name}: expected {want}, rows of embeddings, got shape {shape}")
    if d is not None and shape[1] != d:
        raise ValueError(f"{name}: expected {want}{' ' if d_why else ''}{d_why}, got {shape}")
    if n is not None and shape[0] != n:
        raise ValueError(f"{name}: expected {want}{' ' if n_why else ''}{n_why}, got {shape}")
    if shape[1] == 0:
        raise ValueError(f"{name}: expected at least one dimension, got {shape}")
    if shape[0] == 0 and not allow_empty:
        raise ValueError(f"{name}: expected at least one row, got {shape}")
    if dtype not in DTYPES:
        hint = "; convert with .astype('float32')" if dtype in ("float64", "int64", "int32") else ""
        raise ValueError(f"{name}: expected dtype float32, float16, bfloat16 or scaled int8, got {dtype}{hint}")
    if dtype == "int8" and scale is None:
        raise ValueError(
            f"{name}: expected int8 rows with a scale, got bare int8; wrap them in fct.ScaledInt8(values, scale)"
        )
    if dtype != "int8" and isinstance(x, ScaledInt8):
        raise ValueError(f"{name}: expected int8 or uint8 values in ScaledInt8, got {dtype}")
    tidy = _inner_contiguous(array)
    if write:
        _check_writable(values, array, tidy, name)
    array = tidy
    if scale is not None:
        scale = check_per_row(scale, "scale", shape, array, name)
        offset = check_per_row(offset, "offset", shape, array, name)
        if unsigned:
            offset = offset + 128 * scale
        offset = offset if bool((offset != 0).any()) else None
    rows = Rows(array, dtype, scale, device, kind, offset)
    if not (codes or write):
        rows = rows.without_offset()
    if finite:
        bad = _first_nonfinite(rows, report)
        if bad >= 0:
            raise ValueError(f"{name}: expected finite values, got NaN or infinity in row {bad}")
    return rows


def _unwrap(x: RowsLike, name: str) -> tuple[str, str, Values, str]:
    """(kind, device, array, dtype): numpy on the CPU, a torch tensor elsewhere."""
    if isinstance(x, np.ndarray):
        return _numpy(x, "numpy", name)
    if is_torch(x):
        return _torch(x, "torch", name)
    if not isinstance(x, type) and hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        kind = type(x).__module__.partition(".")[0]
        if int(x.__dlpack_device__()[0]) == 1:  # kDLCPU
            try:
                return _numpy(np.from_dlpack(x), kind, name)  # type: ignore[arg-type]
            except (BufferError, RuntimeError, TypeError):
                pass  # bfloat16, say, which numpy has no name for
        torch = need("torch", name)
        return _torch(torch.utils.dlpack.from_dlpack(x), kind, name)
    raise TypeError(f"{name}: expected a numpy array, a torch tensor or a DLPack object, got {type(x).__name__}")


def _numpy(x: Array, kind: str, name: str) -> tuple[str, str, Array, str]:
    if isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x):
        masked = np.count_nonzero(x.mask)
        raise ValueError(f"{name}: expected values without a mask, got {masked} masked; use .filled(...)")
    check_backed(x, name)
    if type(x) is not np.ndarray:  # a subclass may say what it likes; what its memory is, numpy itself knows
        x = np.ndarray.view(x, np.ndarray)
    dtype = _NAMES.get(x.dtype) or x.dtype.name
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
        dtype = x.dtype.name
    if dtype == "bfloat16":
        x = x.view(np.uint16)
    return kind, "cpu", x, dtype


def _torch(x: torch.Tensor, kind: str, name: str) -> tuple[str, str, Values, str]:
    import torch

    if x.is_nested or x.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
    x = x.detach().resolve_neg()
    # A subclass may say what it likes; what its memory is, the base class knows.
    real = vars(torch._C.TensorBase)["dtype"].__get__(x) if isinstance(x, torch.Tensor) else x.dtype
    dtype = str(real).removeprefix("torch.")
    if dtype not in (*DTYPES, "uint8"):
        return kind, str(x.device), x, dtype  # refused by name; numpy does not know them all
    if x.device.type == "cpu":
        array = x.view(torch.uint16).numpy() if dtype == "bfloat16" else x.numpy()
        return kind, "cpu", array, dtype
    if x.device.type != "cuda":
        raise ValueError(f"{name}: expected a tensor on cpu or cuda, got one on {x.device}")
    return kind, str(x.device), x, dtype


def _inner_contiguous(x: OneKind) -> OneKind:
    n, d = x.shape
    if isinstance(x, np.ndarray):
        if x.flags.c_contiguous and x.flags.aligned:
            return x
        step, size = x.strides, x.itemsize
        plain = (d <= 1 or step[1] == size) and (n <= 1 or (step[0] >= d * size and step[0] % size == 0))
        aligned = _C.array_address(x) % size == 0
        return x if plain and aligned else np.ascontiguousarray(x)
    plain = (d <= 1 or x.stride(1) == 1) and (n <= 1 or x.stride(0) >= d)
    return x if plain else x.contiguous()


def check_backed(array: Array, name: str) -> None:
    """Raises ValueError where a memory-mapped file has been truncated, or its map closed, since it was mapped.

    To read behind the end of the file would end the process (SIGBUS).
    """
    base: object = array
    offset = 0  # where the map begins in the file; numpy alone tells
    while isinstance(base, (np.ndarray, memoryview)):
        if isinstance(base, np.memmap) and isinstance(base.base, mmap.mmap):
            offset = base.offset - base.offset % mmap.ALLOCATIONGRANULARITY
        base = base.obj if isinstance(base, memoryview) else base.base
    if not isinstance(base, mmap.mmap) or not array.size:
        return
    try:
        size = base.size()
    except OSError:  # memory without a file
        return
    start = _C.array_address(np.frombuffer(base, np.uint8))
    ahead = sum(max(0, (n - 1) * step) for n, step in zip(array.shape, array.strides, strict=True))
    end = _C.array_address(array) + ahead + array.itemsize
    needed = offset + end - start
    if size < needed:
        raise ValueError(f"{name}: expected a mapped file of at least {needed} bytes, got {size}: it was truncated")


def _check_writable(given: object, array: object, tidy: object, name: str) -> None:
    if isinstance(given, np.ndarray) and not np.ndarray.view(given, np.ndarray).dtype.isnative:
        raise ValueError(f"{name}: expected values in this machine's byte order, got {given.dtype.str}")
    if is_torch(given) and given.requires_grad:
        raise ValueError(f"{name}: expected a tensor that records no gradients, got requires_grad=True; .detach() it")
    if tidy is not array or (is_torch(given) and given.is_neg()):
        raise ValueError(f"{name}: expected rows whose elements are contiguous, got a layout that would need a copy")
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")


def _first_nonfinite(rows: Rows, report: Callable[[float], None] | None) -> int:
    if rows.n == 0 or rows.dtype == "int8":
        return -1
    if rows.kind_is_numpy:
        step = max(1, _CHECKED_AT_ONCE // rows.d)
        for start in range(0, rows.n, step):  # between two, Python hears Ctrl-C
            part = rows if rows.n <= step else rows[start : start + step]
            found = int(_C.first_nonfinite_row(part.address, part.dtype_code, part.n, part.d, part.row_stride))
            if found >= 0:
                return start + found
            if report is not None:
                report((start + part.n) / rows.n)
        return -1
    import torch

    bad = ~torch.isfinite(rows.values).all(dim=1)
    return int(bad.int().argmax()) if bool(bad.any()) else -1


def nonfinite_rows(rows: Rows, checksum: Xxh64 | None = None) -> Bools:
    """(n,) bool: which rows of a CPU block hold a NaN or an infinity; for callers that set such rows aside.

    checksum: an ``_C.Xxh64`` that the rows are added to in the same pass; they must be contiguous.
    """
    flags = np.zeros(rows.n, dtype=np.uint8)
    if checksum is not None and rows.n:
        if not rows.values.flags.c_contiguous:
            raise ValueError("rows: expected contiguous rows for a checksum, got strided ones")
        _C.scan_rows(rows.address, rows.dtype_code, rows.n, rows.d, flags.ctypes.data, checksum)
    elif rows.n and rows.dtype != "int8":
        _C.nonfinite_rows(rows.address, rows.dtype_code, rows.n, rows.d, rows.row_stride, flags.ctypes.data)
    return flags.view(np.bool_)


def empty_like_kind(like: Rows, shape: tuple[int, int], dtype: str) -> tuple[Values, Rows]:
    """A new array of the kind and device that came in: (what the user gets, the same memory as Rows).

    dtype: "float32", "float16" or "bfloat16". bfloat16 for numpy callers needs ml_dtypes.
    """
    if dtype == "int8":
        raise ValueError("out: int8 output needs a buffer: pass out=fct.ScaledInt8(values, scale)")
    if like.device != "cpu":
        import torch

        out = like.values.new_empty(shape, dtype=getattr(torch, dtype))
        return _as_kind(out, like.kind), Rows(out, dtype, None, like.device, like.kind)
    bits = np.empty(shape, dtype=np.uint16 if dtype == "bfloat16" else dtype)
    rows = Rows(bits, dtype, None, "cpu", like.kind)
    if like.kind == "numpy":
        if dtype == "bfloat16":
            try:
                from ml_dtypes import bfloat16  # type: ignore[import-not-found,unused-ignore]
            except ImportError as error:
                raise ValueError(
                    "out: numpy has no bfloat16 of its own: install ml_dtypes, or pass torch tensors"
                ) from error
            return bits.view(bfloat16), rows
        return bits, rows
    import torch

    tensor = torch.from_numpy(bits)
    return _as_kind(tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor, like.kind), rows


def _as_kind(tensor: torch.Tensor, kind: str) -> Values:
    """A torch tensor handed over, without a copy, to the DLPack library that the input came from."""
    if kind == "torch":
        return tensor
    if kind == "numpy":
        return tensor.numpy()
    module = sys.modules.get(kind)
    for place in (module, getattr(module, "numpy", None), getattr(module, "dlpack", None)):
        if place is not None and hasattr(place, "from_dlpack"):
            return place.from_dlpack(tensor)
    return tensor


def check_labels(labels: object, name: str, n: int) -> Array:
    """Labels as an (n,) numpy array of integers (or strings); raises ValueError on another length or rank."""
    if is_torch(labels):
        dtype = str(labels.dtype).removeprefix("torch.")
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"{name}: expected integer or string labels, got dtype {dtype}")
        if labels.is_nested or str(labels.layout) != "torch.strided" or labels.device.type == "meta":
            raise ValueError(f"{name}: expected a dense tensor that holds values, got {labels.layout}, {labels.device}")
        labels = labels.detach().cpu()
    elif isinstance(labels, np.ma.MaskedArray) and np.ma.is_masked(labels):
        raise ValueError(f"{name}: expected labels without a mask, got {np.count_nonzero(labels.mask)} masked")
    try:
        array = np.asarray(labels)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected ({n},), one label per row, got {error}") from error
    if array.ndim != 1 or array.shape[0] != n:
        raise ValueError(f"{name}: expected ({n},), one label per row, got shape {array.shape}")
    if array.dtype.kind in "OT":  # text as pandas, polars, Arrow and numpy's StringDType hand it over
        array = _plain_labels(array, name)
    if array.dtype.kind not in "iubUS":
        raise ValueError(f"{name}: expected integer or string labels, got dtype {array.dtype}")
    check_backed(array, name)
    return array


def _plain_labels(array: Array, name: str) -> Array:
    """Labels that are Python objects as integers, or as text; anything else stays as it is, to be refused."""
    values = array.tolist()
    for kind, dtype in ((str, np.dtype(np.str_)), (int, np.dtype(np.int64))):
        other = next((i for i, value in enumerate(values) if not isinstance(value, kind)), None)
        if other is None:
            return np.array(values, dtype) if values else np.empty(0, dtype)
        if any(isinstance(value, kind) for value in values):
            raise ValueError(
                f"{name}: expected integer or string labels, got dtype {array.dtype}: {values[other]!r} in row {other}"
            )
    return array
