"""Fashion-MNIST: the embedded subset, or the full set where a folder of its idx files is given."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fct.checks import check_path
from fct.data.idx import read_idx
from fct.data.image_set import ImageSet
from fct.errors import ArtifactError

__all__ = ["CLASS_NAMES", "load_fashion_mnist"]

CLASS_NAMES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

_EMBEDDED = Path(__file__).parent / "embedded" / "fashion_mnist"
_PREFIX = {"train": "train", "test": "t10k"}


def load_fashion_mnist(split: str, root: str | os.PathLike[str] | None = None) -> ImageSet:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017, arXiv:1708.07747; MIT licence).

    Args:
        split: "train" or "test".
        root: a folder with ``train-images-idx3-ubyte`` and the others, plain, ``.gz`` or ``.xz``; Debian's package
            dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist. None: the subset that comes with fct,
            1,000 training and 300 test images of each class.

    Returns:
        images (n, 1, 28, 28), labels (n,), the ten class names.

    Raises:
        ValueError: another split. FileNotFoundError: no such files. ArtifactError: a file is truncated or foreign.

    Examples:
        >>> from fct.data import load_fashion_mnist
        >>> len(load_fashion_mnist("train"))
        10000
    """
    if split not in _PREFIX:
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    folder = _EMBEDDED if root is None else check_path(root, "root", "a path or None")
    image_file = _find(folder, f"{_PREFIX[split]}-images-idx3-ubyte")
    label_file = _find(folder, f"{_PREFIX[split]}-labels-idx1-ubyte")
    images, labels = read_idx(image_file, rank=3), read_idx(label_file, rank=1)
    if images.shape[1:] != (28, 28):
        raise ArtifactError(f"fashion-mnist: expected images of 28 x 28, {image_file} holds {images.shape[1:]}")
    if len(labels) != len(images):
        raise ArtifactError(
            f"fashion-mnist: expected {len(images)} labels to match the images, {label_file} has {len(labels)}"
        )
    if len(labels) and labels.max() > 9:
        raise ArtifactError(f"fashion-mnist: expected labels 0 to 9, {label_file} has {labels.max()}")
    return ImageSet(images[:, None], labels.astype(np.int64), CLASS_NAMES)


def _find(folder: Path, name: str) -> Path:
    for suffix in ("", ".gz", ".xz"):
        file = folder / (name + suffix)
        if file.is_file():
            return file
    raise FileNotFoundError(f"fashion-mnist: expected {name}, {name}.gz or {name}.xz in {folder}, got none")
