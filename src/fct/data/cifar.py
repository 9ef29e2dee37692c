"""CIFAR-100 from its published python pickles, read without trusting them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fct.checks import check_path
from fct.data.image_set import ImageSet
from fct.errors import ArtifactError

__all__ = ["load_cifar100"]

# What a pickled numpy array names; everything else is refused. Python 2's and numpy 2's spellings.
_ADMITTED = {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
} | {("numpy", "ndarray"), ("numpy", "dtype")}


def _latin1(text: str, encoding: str) -> bytes:
    """Python 3's pickles of protocol 2 spell bytes as a call of _codecs.encode; this one knows no other encoding."""
    if encoding not in ("latin1", b"latin1"):
        raise ArtifactError(f"pickle: expected bytes spelt as latin1, got {encoding!r}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if (module, name) not in _ADMITTED:
            raise ArtifactError(f"pickle: expected arrays and plain containers only, got {module}.{name}")
        return super().find_class(module, name)


def _unpickle(path: Path) -> dict[str, Any]:
    try:
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
    return {k.decode() if isinstance(k, bytes) else str(k): v for k, v in found.items()}


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
