"""Arrays on disk, as the commands take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["load_npy"]


def load_npy(path: Path, name: str) -> Any:
    """A .npy file as a read-only memory map; nothing is unpickled."""
    import numpy as np

    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected a .npy file, found none at {path}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{name}: expected a whole .npy array, {path} is not: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name}: expected one .npy array, {path} is an archive of several")
    return array
