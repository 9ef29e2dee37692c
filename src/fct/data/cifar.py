"""CIFAR-100 from its published python pickles, read without trusting them."""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fct.checks import check_path
from fct.data.image_set import ImageSet
from fct.errors import ArtifactError
from fct.types import Array, JsonDict

__all__ = ["load_cifar100"]

_DTYPES = {name: np.dtype(f"<{name}") for name in ("u1", "i4", "i8", "f4", "f8")}
_MOST_BYTES = 1 << 30  # of the file, and of what an array in it may say of itself
# Names that stand for an array in the published pickles, in Python 2's and numpy 2's spellings.
_CORE = ("numpy.core", "numpy._core")


class _PlainDtype:
    """A number's type as a pickle spells it: one of a few, and its byte order."""

    def __init__(self, name: Any, align: object = False, copy: object = False) -> None:
        name = name.decode("latin1") if isinstance(name, bytes) else name
        if not isinstance(name, str) or name not in _DTYPES:
            raise ArtifactError(f"pickle: expected numbers of {', '.join(_DTYPES)}, got {name!r}")
        self.dtype = _DTYPES[name]

    def __setstate__(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) >= 2 else None
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if order not in ("|", "<", "="):
            raise ArtifactError(f"pickle: expected little-endian numbers, got {order!r}")


class _PlainArray:
    """What a pickle says of an array: kept, and built from the plain bytes once all of it was checked."""

    def __init__(self) -> None:
        self.array: Array | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ArtifactError("pickle: expected an array's version, shape, dtype, order and bytes")
        _, shape, dtype, fortran, data = state
        self.array = _built(shape, dtype, data, fortran)


def _built(shape: Any, dtype: Any, data: Any, fortran: object) -> Array:
    sizes = isinstance(shape, tuple) and len(shape) <= 4
    if not sizes or any(not isinstance(n, int) or isinstance(n, bool) or not 0 <= n <= _MOST_BYTES for n in shape):
        raise ArtifactError("pickle: expected a shape of at most 4 whole numbers")
    if not isinstance(dtype, _PlainDtype) or not isinstance(data, bytes):
        raise ArtifactError("pickle: expected an array of plain numbers and their bytes")
    if fortran not in (False, 0):
        raise ArtifactError("pickle: expected an array in C order")
    want = math.prod(shape) * dtype.dtype.itemsize
    if want != len(data):
        raise ArtifactError(f"pickle: expected {want} bytes for an array of {shape}, got {len(data)}")
    array: Array = np.frombuffer(data, dtype.dtype).reshape(shape).copy()
    return array


def _reconstruct(kind: object, shape: Any, code: object) -> _PlainArray:
    if kind is not _PlainArray:
        raise ArtifactError("pickle: expected plain arrays only")
    return _PlainArray()


def _scalar(dtype: Any, data: Any) -> Any:
    return _built((), dtype, data, False)[()]


def _frombuffer(data: Any, dtype: Any, shape: Any, order: object) -> Array:
    return _built(shape, dtype, bytes(data) if isinstance(data, (bytearray, bytes)) else data, order in ("F", b"F"))


def _latin1(text: Any, encoding: object) -> bytes:
    """Python 3's pickles of protocol 2 spell bytes as a call of _codecs.encode; this one knows no other encoding."""
    if encoding not in ("latin1", b"latin1") or not isinstance(text, str):
        raise ArtifactError(f"pickle: expected bytes spelt as latin1, got {encoding!r}")
    return text.encode("latin1")


# Our own stand-ins alone: no numpy object is made, or restores itself, while the pickle is read.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _PlainArray,
    ("numpy", "dtype"): _PlainDtype,
    ("_codecs", "encode"): _latin1,
    **{(f"{core}.multiarray", "_reconstruct"): _reconstruct for core in _CORE},
    **{(f"{core}.multiarray", "scalar"): _scalar for core in _CORE},
    **{(f"{core}.numeric", "_frombuffer"): _frombuffer for core in _CORE},
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ADMITTED:
            raise ArtifactError(f"pickle: expected arrays and plain containers only, got {module}.{name}")
        return _ADMITTED[module, name]

    def persistent_load(self, pid: object) -> object:
        raise ArtifactError("pickle: expected arrays and plain containers only, got a reference to something else")


def _plain(value: object) -> object:
    """An array of the pickle as numpy's; anything else as it is."""
    if isinstance(value, _PlainArray):
        if value.array is None:
            raise ArtifactError("pickle: an array in it has no content")
        return value.array
    return value


def _unpickle(path: Path) -> JsonDict:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ArtifactError(f"expected at most {_MOST_BYTES:,} bytes")
        with open(path, "rb") as file:
            found = _ArraysOnly(file, encoding="bytes").load()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"cifar-100: expected {path}, got no such file") from error
    except ArtifactError as error:
        raise ArtifactError(f"cifar-100: {path} was refused: {error}") from error
    except Exception as error:  # a damaged pickle raises anything
        raise ArtifactError(f"cifar-100: expected a whole pickle, {path} is not: {error}") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"cifar-100: expected a dict in {path}, got {type(found).__name__}")
    return {k.decode("latin1") if isinstance(k, bytes) else str(k): _plain(v) for k, v in found.items()}


def load_cifar100(split: str, root: str | os.PathLike[str]) -> ImageSet:
    """CIFAR-100 (Krizhevsky, 2009) from the folder of ``cifar-100-python.tar.gz``.

    Args:
        split: "train" (50,000) or "test" (10,000).
        root: the folder with ``train``, ``test`` and ``meta``, or its parent.

    Returns:
        images (n, 3, 32, 32), fine labels (n,), the hundred class names.

    Raises:
        ValueError: another split. FileNotFoundError. ArtifactError: a file that is damaged, or that holds anything
        but arrays and plain containers (nothing in it is run).
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    folder = check_path(root, "root")
    if (folder / "cifar-100-python").is_dir():
        folder = folder / "cifar-100-python"
    batch, meta = _unpickle(folder / split), _unpickle(folder / "meta")
    try:
        data, labels = np.asarray(batch["data"]), np.asarray(batch["fine_labels"], np.int64)
        names = tuple(n.decode() if isinstance(n, bytes) else str(n) for n in meta["fine_label_names"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"cifar-100: expected data, fine_labels and fine_label_names in {folder}: {error}"
        ) from error
    if data.ndim != 2 or data.shape[1] != 3072 or data.dtype != np.uint8:
        raise ArtifactError(
            f"cifar-100: expected data (n, 3072) uint8 in {folder / split}, got {data.shape} {data.dtype}"
        )
    if labels.shape != data.shape[:1]:
        raise ArtifactError(f"cifar-100: expected {len(data)} labels in {folder / split}, got {labels.shape}")
    return ImageSet(data.reshape(-1, 3, 32, 32), labels, names)
