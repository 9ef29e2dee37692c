"""ImageSet: images of one size in memory, with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fct.types import Bools, Indices

__all__ = ["ImageSet"]


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images of one size with labels; yields (image, label) like any torch dataset.

    images: (n, c, h, w) uint8.
    labels: (n,) int64, positions in class_names.
    class_names: of all classes, also of those that a subset left out.

    Examples:
        >>> from fct.data import load_fashion_mnist
        >>> test = load_fashion_mnist("test")
        >>> test.images.shape, len(test.of_classes(range(5)))
        ((3000, 1, 28, 28), 1500)
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError(f"images: expected (n, c, h, w) uint8, got {self.images.shape} {self.images.dtype}")
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels: expected ({len(self.images)},) to match images, got {self.labels.shape}")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise ValueError(
                f"labels: expected 0 to {len(self.class_names) - 1}, got {self.labels.min()} to {self.labels.max()}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images[index].copy()), int(self.labels[index])

    def take(self, rows: Indices | Bools | slice) -> ImageSet:
        """The images of ``rows``: indices, a slice or a mask."""
        return ImageSet(self.images[rows], self.labels[rows], self.class_names)

    def of_classes(self, classes: Sequence[int] | range) -> ImageSet:
        """The images of these classes, in their order; labels and class_names stay as they are."""
        unknown = [c for c in classes if not 0 <= c < len(self.class_names)]
        if unknown:
            raise ValueError(f"classes: expected 0 to {len(self.class_names) - 1}, got {unknown}")
        return self.take(np.isin(self.labels, np.asarray(list(classes), np.int64)))

    def resized(self, size: int) -> ImageSet:
        """The images at (size, size), bilinear with antialiasing."""
        from torchvision.transforms.v2 import functional

        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size: expected a positive int, got {size!r}")
        if self.images.shape[2:] == (size, size):
            return self
        parts = torch.from_numpy(np.array(self.images)).split(4096)
        out = torch.cat([functional.resize(part, [size, size], antialias=True) for part in parts])
        return ImageSet(out.numpy(), self.labels, self.class_names)
