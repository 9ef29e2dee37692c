"""The idx format of MNIST and Fashion-MNIST: a magic number, big-endian sizes, bytes."""

from __future__ import annotations

import gzip
import lzma
import math
import os
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fct.errors import ArtifactError

__all__ = ["read_idx"]


def read_idx(path: str | os.PathLike[str], *, rank: int | None = None) -> NDArray[np.uint8]:
    """The uint8 array in an idx file: plain, gzip (.gz) or xz (.xz).

    Args:
        path: the file.
        rank: the number of dimensions it must have (3 for images, 1 for labels); None for any.

    Raises:
        FileNotFoundError. ArtifactError: not an idx file of bytes, another rank, truncated, or with bytes to spare.

    Source: the format's description on <http://yann.lecun.com/exdb/mnist/>: two zero bytes, a type (8: unsigned
    byte), the rank, then one big-endian uint32 for each dimension.
    """
    file = Path(path)
    try:
        packed = file.read_bytes()
        data = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(file.suffix, bytes)(packed)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ArtifactError(f"idx: expected a whole {file.suffix} file, {file} is not: {error}") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ArtifactError(
            f"idx: expected the magic 00 00 08 of an idx file of bytes, {file} has {data[:3].hex(' ')!r}"
        )
    dims = data[3]
    if rank is not None and dims != rank:
        raise ArtifactError(f"idx: expected {rank} dimensions, {file} has {dims}")
    if len(data) < 4 + 4 * dims:
        raise ArtifactError(f"idx: expected {dims} sizes, {file} ends after {len(data)} bytes: it is truncated")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dims, offset=4))
    want, got = math.prod(shape), len(data) - 4 - 4 * dims
    if got != want:
        fault = "truncated" if got < want else "longer than its sizes say"
        raise ArtifactError(f"idx: expected {want} bytes for shape {shape}, {file} holds {got}: it is {fault}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)
