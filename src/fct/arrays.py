"""The one gate: every array that enters is checked and brought to a known layout here.

Rows are items, ``(n, d)``. NumPy arrays, torch tensors and anything with ``__dlpack__`` come in; the same kind on
the same device goes out. dtypes: float32, float16, bfloat16 (torch, or numpy with ml_dtypes), and int8 with a
scale as :class:`ScaledInt8`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fct import _C

__all__ = [
    "DTYPES",
    "Rows",
    "ScaledInt8",
    "check_dtype",
    "check_labels",
    "empty_like_kind",
    "nonfinite_rows",
    "rows_of",
]

# The order is csrc/cpu/rows.h's DType.
DTYPES = ("float32", "float16", "bfloat16", "int8")

_CHECKED_AT_ONCE = 1 << 26  # values of one compiled call


@dataclass(frozen=True, slots=True)
class ScaledInt8:
    """int8 rows and the scale that brings them back: row = values * scale.

    Args:
        values: (n, d) int8, numpy or torch.
        scale: a positive float; or (n,) / (n, 1), one per row; or (1, d), one per dimension. float32.

    Example:
        >>> import numpy as np, fct
        >>> fct.ScaledInt8(np.ones((2, 3), np.int8), 0.5).shape
        (2, 3)
    """

    values: Any
    scale: Any = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def __len__(self) -> int:
        return int(self.values.shape[0])


@dataclass(frozen=True, slots=True)
class Rows:
    """A checked block of rows, ready for a backend.

    values: (n, d) with stride 1 along d and any row stride. On the CPU always a numpy array (bfloat16 as its
        uint16 bits); on a GPU the torch tensor.
    dtype: one of DTYPES, what the values mean.
    scale: None, or float32 of shape (1, 1), (n, 1) or (1, d) for int8; numpy on the CPU, a tensor on a GPU.
    device: "cpu" or "cuda:0", ...
    kind: what came in and goes out: "numpy", "torch", or the name of another library that speaks DLPack.
    """

    values: Any
    dtype: str
    scale: Any
    device: str
    kind: str

    @property
    def n(self) -> int:
        return int(self.values.shape[0])

    @property
    def d(self) -> int:
        return int(self.values.shape[1])

    @property
    def row_stride(self) -> int:
        """Elements from one row to the next."""
        if self.kind_is_numpy:
            return int(self.values.strides[0] // self.values.itemsize) if self.n > 1 else self.d
        return int(self.values.stride(0)) if self.n > 1 else self.d

    @property
    def kind_is_numpy(self) -> bool:
        return isinstance(self.values, np.ndarray)

    @property
    def address(self) -> int:
        return int(self.values.ctypes.data) if self.kind_is_numpy else int(self.values.data_ptr())

    @property
    def dtype_code(self) -> int:
        return DTYPES.index(self.dtype)

    def __getitem__(self, part: slice) -> Rows:
        scale = self.scale
        if scale is not None and scale.shape[0] == self.n and self.n != 1:
            scale = scale[part]
        return Rows(self.values[part], self.dtype, scale, self.device, self.kind)

    def float32(self) -> Any:
        """The rows as float32, scale applied; numpy on the CPU, a tensor on a GPU. A copy unless float32 already."""
        if not self.kind_is_numpy:
            out = self.values.float()
        elif self.dtype == "bfloat16":
            out = (self.values.astype(np.uint32) << 16).view(np.float32)
        else:
            out = self.values.astype(np.float32, copy=False)
        return out if self.scale is None else out * self.scale


def check_dtype(dtype: str, name: str = "dtype") -> str:
    if dtype not in DTYPES:
        raise ValueError(f"{name}: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


def _is_torch(x: Any) -> bool:
    torch = sys.modules.get("torch")  # a tensor can only exist once torch is imported
    return torch is not None and isinstance(x, torch.Tensor)


def rows_of(
    x: Any,
    name: str,
    *,
    d: int | None = None,
    d_why: str = "",
    n: int | None = None,
    n_why: str = "",
    finite: bool = True,
    allow_empty: bool = True,
    report: Callable[[float], None] | None = None,
) -> Rows:
    """Checks ``x`` and brings it to :class:`Rows`; copies only where the last axis is not contiguous.

    Args:
        x: (n, d) array, tensor, DLPack object or ScaledInt8.
        name: the argument's name, for messages.
        d, n: expected sizes, with ``d_why``/``n_why`` appended to the message ("to match the transformation").
        finite: refuse NaN and infinities (integer dtypes have none).
        allow_empty: whether zero rows are fine.
        report: told the share of the rows that have been looked at, which a memory map may take long for.

    Raises:
        TypeError: not an array. ValueError: wrong rank, size, dtype or a non-finite value.
    """
    values, scale = (x.values, x.scale) if isinstance(x, ScaledInt8) else (x, None)
    kind, device, array, dtype = _unwrap(values, name)
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
        raise ValueError(f"{name}: expected int8 values in ScaledInt8, got {dtype}")
    array = _inner_contiguous(array)
    if scale is not None:
        scale = _check_scale(scale, shape, array, name)
    rows = Rows(array, dtype, scale, device, kind)
    if finite:
        bad = _first_nonfinite(rows, report)
        if bad >= 0:
            raise ValueError(f"{name}: expected finite values, got NaN or infinity in row {bad}")
    return rows


def _unwrap(x: Any, name: str) -> tuple[str, str, Any, str]:
    """(kind, device, array, dtype): numpy on the CPU, a torch tensor elsewhere."""
    if isinstance(x, np.ndarray):
        return _numpy(x, "numpy")
    if _is_torch(x):
        return _torch(x, "torch", name)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        kind = type(x).__module__.partition(".")[0]
        if int(x.__dlpack_device__()[0]) == 1:  # kDLCPU
            try:
                return _numpy(np.from_dlpack(x), kind)
            except (BufferError, RuntimeError, TypeError):
                pass  # bfloat16, say, which numpy has no name for
        import torch

        return _torch(torch.utils.dlpack.from_dlpack(x), kind, name)
    raise TypeError(f"{name}: expected a numpy array, a torch tensor or a DLPack object, got {type(x).__name__}")


def _numpy(x: np.ndarray[Any, Any], kind: str) -> tuple[str, str, Any, str]:
    dtype = x.dtype.name
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
        dtype = x.dtype.name
    if dtype == "bfloat16":
        x = x.view(np.uint16)
    return kind, "cpu", x.view(np.ndarray), dtype


def _torch(x: Any, kind: str, name: str) -> tuple[str, str, Any, str]:
    import torch

    x = x.detach()
    dtype = str(x.dtype).removeprefix("torch.")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {x.layout}")
    if x.device.type == "cpu":
        array = x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()
        return kind, "cpu", array, dtype
    if x.device.type != "cuda":
        raise ValueError(f"{name}: expected a tensor on cpu or cuda, got one on {x.device}")
    return kind, str(x.device), x, dtype


def _inner_contiguous(x: Any) -> Any:
    n, d = x.shape
    if isinstance(x, np.ndarray):
        step, size = x.strides, x.itemsize
        plain = (d <= 1 or step[1] == size) and (n <= 1 or (step[0] >= d * size and step[0] % size == 0))
        aligned = x.ctypes.data % size == 0
        return x if plain and aligned else np.ascontiguousarray(x)
    plain = (d <= 1 or x.stride(1) == 1) and (n <= 1 or x.stride(0) >= d)
    return x if plain else x.contiguous()


def _check_scale(scale: Any, shape: tuple[int, int], like: Any, name: str) -> Any:
    n, d = shape
    host = np.asarray(scale.detach().cpu() if _is_torch(scale) else scale, dtype=np.float32)
    if host.ndim == 0:
        host = host.reshape(1, 1)
    elif host.shape == (n,):
        host = host.reshape(n, 1)
    if host.shape not in ((1, 1), (n, 1), (1, d)):
        raise ValueError(f"{name}: expected a scale of shape (), ({n},) or (1, {d}), got {host.shape}")
    if host.size and not (np.isfinite(host).all() and (host > 0).all()):
        raise ValueError(f"{name}: expected positive finite scales, got values from {host.min()} to {host.max()}")
    host = np.ascontiguousarray(host)
    if isinstance(like, np.ndarray):
        return host
    import torch

    return torch.from_numpy(host).to(like.device)


def _first_nonfinite(rows: Rows, report: Callable[[float], None] | None) -> int:
    if rows.n == 0 or rows.dtype == "int8":
        return -1
    if rows.kind_is_numpy:
        step = max(1, _CHECKED_AT_ONCE // rows.d)
        for start in range(0, rows.n, step):  # between two, Python hears Ctrl-C
            part = rows[start : start + step]
            found = int(_C.first_nonfinite_row(part.address, part.dtype_code, part.n, part.d, part.row_stride))
            if found >= 0:
                return start + found
            if report is not None:
                report((start + part.n) / rows.n)
        return -1
    import torch

    bad = ~torch.isfinite(rows.values).all(dim=1)
    return int(bad.int().argmax()) if bool(bad.any()) else -1


def nonfinite_rows(rows: Rows) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(n,) bool: which rows of a CPU block hold a NaN or an infinity; for callers that set such rows aside."""
    flags = np.zeros(rows.n, dtype=np.uint8)
    if rows.n and rows.dtype != "int8":
        _C.nonfinite_rows(rows.address, rows.dtype_code, rows.n, rows.d, rows.row_stride, flags.ctypes.data)
    return flags.view(np.bool_)


def empty_like_kind(like: Rows, shape: tuple[int, int], dtype: str) -> tuple[Any, Rows]:
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


def _as_kind(tensor: Any, kind: str) -> Any:
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


def check_labels(labels: Any, name: str, n: int) -> np.ndarray[Any, Any]:
    """Labels as an (n,) numpy array of integers (or strings); raises ValueError on another length or rank."""
    array = np.asarray(labels.detach().cpu() if _is_torch(labels) else labels)
    if array.ndim != 1 or array.shape[0] != n:
        raise ValueError(f"{name}: expected ({n},), one label per row, got shape {array.shape}")
    if array.dtype.kind not in "iubUS":
        raise ValueError(f"{name}: expected integer or string labels, got dtype {array.dtype}")
    return array
