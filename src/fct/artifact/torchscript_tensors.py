"""The tensors of a TorchScript archive, read as data: no code of the archive runs, and torch is not needed.

Such an archive is a zip file. ``data.pkl`` in it is a pickle of the modules' attributes, whose tensors point at raw
numbers in ``data/``. Whatever else is in the pickle is refused by name.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fct.errors import ArtifactError
from fct.types import Array, JsonDict

__all__ = ["is_torchscript", "torchscript_tensors"]

_MOST_BYTES = 16 << 30  # of one tensor's numbers
_DTYPES = {
    "FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "LongStorage": "<i8", "IntStorage": "<i4",
    "ShortStorage": "<i2", "CharStorage": "<i1", "ByteStorage": "<u1", "BoolStorage": "<?",
}  # fmt: skip


@dataclass(eq=False)
class _Module:
    """A scripted module: its attributes by name."""

    attributes: JsonDict = field(default_factory=dict)

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"expected the attributes of a module, got {type(state).__name__}")
        self.attributes = state


def _tensor(values: Array, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Array:
    """``torch._utils._rebuild_tensor_v2`` for numpy; a view that leaves the storage is refused."""
    ints = (offset, *size, *stride)
    if not isinstance(values, np.ndarray) or len(size) != len(stride) or any(type(i) is not int or i < 0 for i in ints):
        raise pickle.UnpicklingError(f"expected a tensor's storage, sizes and strides, got {size} by {stride}")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if math.prod(size) else 0
    if last >= max(len(values), 1):
        raise pickle.UnpicklingError(f"a tensor of {size} by {stride} leaves its storage of {len(values)} numbers")
    steps = [s * values.itemsize for s in stride]
    tensor: Array = np.lib.stride_tricks.as_strided(values[offset:], size, steps).copy()
    return tensor


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(archive.open(f"{folder}/data.pkl"))
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> object:
        if module.startswith("__torch__"):
            return _Module
        known: dict[tuple[str, str], Callable[..., object]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("collections", "OrderedDict"): OrderedDict,
            **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")},
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in _DTYPES:
            return np.dtype(_DTYPES[name])
        raise pickle.UnpicklingError(f"expected plain tensors, found {module}.{name}")

    def persistent_load(self, pid: tuple[Any, ...]) -> Array:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], np.dtype)):
            raise pickle.UnpicklingError(f"expected a storage, found {str(pid)[:80]}")
        _, dtype, key, _, count = pid
        info = self._archive.getinfo(f"{self._folder}/data/{key}")
        if info.file_size > _MOST_BYTES or info.file_size != int(count) * dtype.itemsize:
            raise pickle.UnpicklingError(
                f"data/{key}: expected {count} numbers of {dtype}, found {info.file_size} bytes"
            )
        values: Array = np.frombuffer(self._archive.read(info), dtype)
        return values


def is_torchscript(path: Path) -> bool:
    """Whether the file is a zip with what only TorchScript writes."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.endswith("/constants.pkl") or "/code/" in name for name in names)


def torchscript_tensors(path: Path) -> dict[str, Array]:
    """Name -> array of every tensor among the modules' attributes: the state dict of that model.

    Raises ArtifactError for an archive that is damaged, or holds anything but plain tensors.

    Examples:
        >>> from pathlib import Path
        >>> from fct.artifact.torchscript_tensors import is_torchscript
        >>> is_torchscript(Path(__file__))
        False
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (data,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
            root = _Reader(archive, data.partition("/")[0]).load()
    except Exception as error:  # whatever a damaged or hostile pickle makes of the reader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"path: expected a whole TorchScript archive, {path} is not: {reason}") from error
    if not isinstance(root, _Module):
        raise ArtifactError(f"path: expected a scripted module, {path} holds a {type(root).__name__}")
    return dict(_walk(root, "", set()))


def _walk(module: _Module, prefix: str, above: set[int]) -> Iterator[tuple[str, Array]]:
    if id(module) in above:
        raise ArtifactError(f"path: expected a tree of modules, {prefix.rstrip('.')} contains itself")
    for name, value in module.attributes.items():
        if isinstance(value, np.ndarray):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module):
            yield from _walk(value, f"{prefix}{name}.", above | {id(module)})
