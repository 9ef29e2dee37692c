"""The images of an experiment: its two splits, as a network trains on them or reads them, and their fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TypeAlias

import numpy as np

from fct.data import ImageFolder, ImageSet, load_cifar100, load_fashion_mnist, load_image_folder
from fct.fit.images import Images
from fct.life.experiment import Experiment

__all__ = ["ImageSplit", "crop_of", "data_fingerprint", "load_split", "load_splits", "plain_images", "training_images"]

ImageSplit: TypeAlias = ImageSet | ImageFolder
_CROP = 0.85  # smallest side of a training crop of images in memory


def load_split(experiment: Experiment, split: str, root: str | os.PathLike[str] | None) -> ImageSet:
    """The "train" or "test" images of a data set that is read into memory as a whole."""
    if experiment.data.set == "fashion-mnist":
        return load_fashion_mnist(split, root)
    if root is None:
        raise ValueError(f"--data-root: expected the folder of the images of {experiment.name}, got none")
    return load_cifar100(split, root)


def load_splits(experiment: Experiment, root: str | os.PathLike[str] | None) -> tuple[ImageSplit, ImageSplit]:
    """(training images, test images).

    Raises:
        FileNotFoundError, ArtifactError, ValueError: the data is not there or not what it should be.
    """
    plan = experiment.data
    if root is None and plan.set != "fashion-mnist":
        raise ValueError(f"--data-root: expected the folder of the images of {experiment.name}, got none")
    if root is None or plan.set != "folder":
        return load_split(experiment, "train", root), load_split(experiment, "test", root)
    train = load_image_folder(root, plan.train)
    if plan.held_out is not None:
        return _held_out(train, plan.held_out, experiment.seed)
    test = load_image_folder(root, plan.test)
    if test.class_names != train.class_names:
        odd = sorted(set(test.class_names) ^ set(train.class_names))
        raise ValueError(f"data: expected the same classes in {plan.train} and {plan.test}, got only in one: {odd[:5]}")
    return train, test


def _held_out(images: ImageFolder, count: int, seed: int) -> tuple[ImageFolder, ImageFolder]:
    """The same in two parts: ``count`` images of each class, drawn by seed, are the second."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(images), bool)
    for label in range(len(images.class_names)):
        rows = np.flatnonzero(images.labels == label)
        if len(rows) <= count:
            raise ValueError(
                f"data.held_out: expected fewer than the {len(rows)} images of {images.class_names[label]!r}, "
                f"got {count}"
            )
        held[rng.permutation(rows)[:count]] = True
    return images.take(~held), images.take(held)


def crop_of(images: ImageSplit) -> float:
    """Images in memory are cropped a little in training; files were cropped when they were read."""
    return _CROP if isinstance(images, ImageSet) else 1.0


def plain_images(images: ImageSplit, size: int, workers: int = 0) -> Images:
    """As a network reads them that embeds them; ``workers``: processes that read files."""
    if isinstance(images, ImageSet):
        small = images.resized(size)
        return Images(small.images, small.labels)
    return Images(images.with_(size=size, random_crop=False), workers=workers)


def training_images(images: ImageSplit, size: int, workers: int = 0) -> Images:
    """As a network reads them that is trained on them."""
    if isinstance(images, ImageSet):
        return plain_images(images, size)
    return Images(images.with_(size=size, random_crop=True), workers=workers)


def data_fingerprint(*parts: ImageSplit) -> str:
    """Of labels and of images: their bytes in memory, or their files' names and sizes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part.class_names).encode())
        digest.update(np.ascontiguousarray(part.labels).tobytes())
        if isinstance(part, ImageSet):
            digest.update(np.ascontiguousarray(part.images).data)
        else:
            for file in part.files:
                digest.update(_name_and_size(file))
    return digest.hexdigest()


def _name_and_size(file: Path) -> bytes:
    return f"{file.parent.name}/{file.name} {file.stat().st_size}\n".encode()
