"""Small pictures inside a page: of a folder of image files, or of an array of pixels."""

from __future__ import annotations

import base64
import io
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fct.checks import check_path
from fct.errors import FctError
from fct.extras import need
from fct.types import Array

if TYPE_CHECKING:
    from PIL.Image import Image


__all__ = ["Thumbnails"]

_SIDE = 96
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
_MOST_PIXELS = 50_000_000  # of one file: what it holds is decoded for a picture of 96 x 96


class Thumbnails:
    """The pictures of n items, made one by one as they are asked for.

    Args:
        images: a folder of image files, or an array: (n, height, width) or (n, height, width, 3), uint8, or floats from
            0 to 1; an ``.npy`` file of one likewise.
        n: how many items there are. ids: (n,) their ids, or None. A folder whose files are called by the ids
            (``17.jpg``) belongs to them by name; else its files belong in their order, where 2 comes before 10.

    Raises:
        ValueError: another number of images, an array of another shape or range. FileNotFoundError: nothing there.
        FctError: a file that is no image, or is too large (when it is asked for).
    """

    def __init__(self, images: Array | str | os.PathLike[str], n: int, ids: Sequence[str] | None = None) -> None:
        self._files: list[Path] = []
        self._pixels: Any = None
        if isinstance(images, (str, os.PathLike)):
            path = check_path(images, "images")
            if path.is_dir():
                self._files = _files_of(path, n, ids)
                return
            images = _loaded(path)
        self._pixels = _checked(np.asanyarray(images), n)

    def __getitem__(self, row: int) -> str:
        """The item's picture as a ``data:`` URL: JPEG, or PNG where that is smaller."""
        return _encoded(_opened(self._files[row]) if self._files else _of_pixels(self._pixels[row]))


def _files_of(folder: Path, n: int, ids: Sequence[str] | None) -> list[Path]:
    files = [f for f in folder.iterdir() if f.suffix.lower() in _SUFFIXES and f.is_file()]
    by_name: dict[str, Path] = {}
    for file in files:
        by_name.setdefault(file.stem, file)
    if ids is not None and any(one in by_name for one in ids):
        missing = [one for one in ids if one not in by_name]
        if missing:
            raise ValueError(
                f"images: expected a file for each of {n:,} ids, {folder} lacks {len(missing):,} "
                f"({', '.join(repr(one) for one in missing[:3])})"
            )
        return [by_name[one] for one in ids]
    if len(files) != n:
        raise ValueError(f"images: expected {n:,} image files, one for each pair, {folder} has {len(files):,}")
    return sorted(files, key=lambda f: [(int(t), "") if t.isdecimal() else (-1, t) for t in re.split(r"(\d+)", f.name)])


def _loaded(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"images: expected a folder of images or an .npy file, found none at {path}") from None
    except (ValueError, OSError, EOFError) as error:
        raise FctError(f"images: expected a folder of images or an .npy file, {path} is neither: {error}") from error


def _checked(pixels: Array, n: int) -> Any:
    if len(pixels) != n or pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[3] not in (1, 3)):
        want = f"({n}, height, width) or ({n}, height, width, 3)"
        raise ValueError(f"images: expected {want} to match the pairs, got {pixels.shape}")
    if pixels.dtype != np.uint8 and pixels.dtype.kind != "f":
        raise ValueError(f"images: expected uint8, or floats from 0 to 1, got {pixels.dtype}")
    return pixels


def _of_pixels(pixels: Array) -> Any:
    image = need("PIL.Image", "images")
    if pixels.dtype != np.uint8:
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError("images: expected uint8, or floats from 0 to 1, got floats beyond")
        pixels = np.round(np.asarray(pixels, np.float32) * 255).astype(np.uint8)
    return image.fromarray(
        np.ascontiguousarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    )


def _opened(path: Path) -> Any:
    image = need("PIL.Image", "images")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size: refused below, before anything is decoded
            opened = image.open(path)
        with opened:
            if opened.width * opened.height > _MOST_PIXELS:
                raise FctError(
                    f"images: expected at most {_MOST_PIXELS:,} pixels, {path} has {opened.width} x {opened.height}"
                )
            opened.draft("RGB", (2 * _SIDE, 2 * _SIDE))  # JPEG decodes no more than is needed
            transparent = opened.mode in ("RGBA", "LA", "P", "PA")
            return opened.convert("RGBA" if transparent else "L" if opened.mode in ("1", "L") else "RGB")
    except FctError:
        raise
    except Exception as error:  # decoders of damaged files raise what they like
        raise FctError(f"images: expected an image, {path} is none that can be read: {error}") from error


def _encoded(picture: Image) -> str:
    image = need("PIL.Image", "images")
    picture.thumbnail((_SIDE, _SIDE))
    if picture.mode == "RGBA":  # as on paper: the page may be dark
        white = image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture.getchannel("A"))
        picture = white
    found = []
    for kind, how in (("jpeg", {"quality": 80, "optimize": True}), ("png", {"optimize": True})):
        out = io.BytesIO()
        picture.save(out, kind, **how)
        found.append((len(out.getvalue()), kind, out.getvalue()))
    _, kind, data = min(found)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
