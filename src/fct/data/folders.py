"""Folders of images, one folder a class, as ImageNet-1k, Places-365 and VGGFace2 are laid out by their publishers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fct.checks import check_path, check_text
from fct.types import Bools, Indices

__all__ = ["ImageFolder", "every_image", "load_image_folder"]

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


class ImageFolder:
    """Image files with labels; yields ((3, size, size) uint8, label), read when asked for.

    The shorter side is brought to ``size * 8 / 7`` (256 for 224) and the centre is cut out; with ``random_crop`` a
    random part of 25 % to 100 % of the area instead, as classifiers are trained.

    files: the images. labels: (n,) int64. class_names: of all classes, also of those that a subset left out.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: NDArray[np.int64],
        class_names: tuple[str, ...],
        *,
        size: int,
        random_crop: bool = False,
    ) -> None:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size: expected a positive int, got {size!r}")
        self.files, self.labels, self.class_names = list(files), labels, class_names
        self.size, self.random_crop = size, random_crop

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image, UnidentifiedImageError
        from torchvision.transforms.v2 import functional

        path = self.files[index]
        try:
            with Image.open(path) as opened:
                image = functional.pil_to_tensor(opened.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"images: expected an image, {path} is none that can be read: {error}") from error
        image = self._randomly_cropped(image) if self.random_crop else self._centre(image)
        return image, int(self.labels[index])

    def _centre(self, image: torch.Tensor) -> torch.Tensor:
        from torchvision.transforms.v2 import functional

        image = functional.resize(image, [max(self.size, round(self.size * 8 / 7))], antialias=True)
        cut: torch.Tensor = functional.center_crop(image, [self.size, self.size])
        return cut

    def _randomly_cropped(self, image: torch.Tensor) -> torch.Tensor:
        from torchvision.transforms import v2

        cropped: torch.Tensor = v2.RandomResizedCrop(self.size, scale=(0.25, 1.0), antialias=True)(image)
        return cropped

    def of_classes(self, classes: Sequence[int] | range) -> ImageFolder:
        """The images of these classes; labels and class_names stay as they are."""
        unknown = [c for c in classes if not 0 <= c < len(self.class_names)]
        if unknown:
            raise ValueError(f"classes: expected 0 to {len(self.class_names) - 1}, got {unknown}")
        return self.take(np.flatnonzero(np.isin(self.labels, np.asarray(list(classes), np.int64))))

    def take(self, rows: Indices | Bools | slice) -> ImageFolder:
        """The images of ``rows``: indices, a slice or a mask."""
        index = np.arange(len(self))[rows]
        files = [self.files[i] for i in index]
        return ImageFolder(files, self.labels[index], self.class_names, size=self.size, random_crop=self.random_crop)

    def with_(self, *, size: int | None = None, random_crop: bool | None = None) -> ImageFolder:
        """The same files at another size, or cropped another way."""
        crop = self.random_crop if random_crop is None else random_crop
        return ImageFolder(self.files, self.labels, self.class_names, size=size or self.size, random_crop=crop)


def load_image_folder(root: str | os.PathLike[str], split: str, *, size: int = 224) -> ImageFolder:
    """The images of ``root/split/…/class/file``.

    Classes are sorted by name, so that the train and val folders of a set agree. Known layouts: ``train/n01440764/``
    (ImageNet-1k, VGGFace2), ``train/a/airfield/`` and ``train/f/field/cultivated/`` (Places-365, high resolution),
    ``train/airfield/`` (places365_standard). A class is any
    folder that holds images; its name is its path below the split, single letters above it left out, joined by "-".

    Args:
        root: the data set's folder.
        split: "train", "val", "test" or any folder in it.
        size: side of the square images that come out.

    Raises:
        FileNotFoundError: no such folder. ValueError: a folder without any image.
    """
    root = check_path(root, "root")
    folder = root / check_text(split, "split", "the name of a folder")
    if not folder.is_dir():
        there = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        raise FileNotFoundError(
            f"data: expected the folder {folder}, got only {', '.join(there) or 'nothing'} in {root}"
        )
    by_class: dict[str, list[Path]] = {}
    for path in _images(folder):
        if path.parent == folder:
            raise ValueError(f"data: expected images in folders of classes, got {path} outside any")
        *above, own = path.parent.relative_to(folder).parts
        by_class.setdefault("-".join([*(part for part in above if len(part) > 1), own]), []).append(path)
    if not by_class:
        raise ValueError(f"data: expected images in folders of classes in {folder}, got none")
    names = tuple(sorted(by_class))
    labels = np.repeat(np.arange(len(names), dtype=np.int64), [len(by_class[name]) for name in names])
    return ImageFolder([path for name in names for path in by_class[name]], labels, names, size=size)


def every_image(folder: str | os.PathLike[str], *, size: int = 224) -> ImageFolder:
    """Every image in a folder and below, in the order of their paths, without classes.

    Raises:
        FileNotFoundError: no such folder. ValueError: a folder without any image.
    """
    folder = check_path(folder, "folder")
    if not folder.is_dir():
        raise FileNotFoundError(f"data: expected a folder of images, got {folder}")
    files = sorted(_images(folder))
    if not files:
        raise ValueError(f"data: expected images in {folder}, got none")
    return ImageFolder(files, np.zeros(len(files), np.int64), ("image",), size=size)


def _images(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        yield from (Path(parent) / name for name in sorted(files) if Path(name).suffix.lower() in _SUFFIXES)
