"""A shadow as a file: a header, checksums, and arrays that can be memory-mapped.

``fctshadow2``, the header's length (8 bytes), the header (JSON), its XXH64 (8 bytes), zeros up to 64; then the arrays,
each on a boundary of 64, the last of which holds an XXH64 of every mebibyte of the others. ``fctshadow1`` had no
checksums, no levels and no halves; it can still be read.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from fct import _C
from fct.atomic_files import atomic_path
from fct.errors import ArtifactError
from fct.ops.search.cpu_search import Shadow, widths
from fct.ops.search.levels import Levels
from fct.rows import DTYPES
from fct.spaces import METRICS
from fct.types import Array, JsonDict

__all__ = ["ShadowHeader", "read_shadow", "write_shadow"]

_OLD, _NEW = b"fctshadow1", b"fctshadow2"
_ALIGN = 64
_BLOCK = 1 << 20
_MOST_HEADER = 1 << 20
# A shadow up to so many bytes is verified when it is opened, a larger one before it is first searched.
_AT_ONCE = 1 << 30


@dataclass(frozen=True)
class ShadowHeader:
    """What a shadow's file says of the rows it was made from; space: as :meth:`fct.EmbeddingSpace.to_dict` has it."""

    n: int
    d: int
    metric: str
    dtype: str
    fingerprint: str
    space: JsonDict | None


def write_shadow(path: Path, header: ShadowHeader, shadow: Shadow) -> None:
    """Beside, and then in place of, what is there."""
    arrays = {"tiles": shadow.tiles, "meta": shadow.meta, "shift": shadow.shift}
    if shadow.levels is not None and shadow.tails is not None:
        arrays |= {"tails": shadow.tails, "down": shadow.levels.down, "up": shadow.levels.up}
    if shadow.low is not None and shadow.high_error is not None:
        arrays |= {"low": shadow.low, "high_error": shadow.high_error}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    arrays["sums"] = np.concatenate([_sums(array) for array in arrays.values()])
    levels = None if shadow.levels is None else {"head": shadow.levels.head, "loss": shadow.levels.loss}
    cut = {"levels": levels, "halves": shadow.low is not None}
    text = json.dumps(vars(header) | cut | {"sums": _xxh64(arrays["sums"])}).encode()
    lead = _NEW + len(text).to_bytes(8, "little") + text
    lead += _xxh64(np.frombuffer(lead, np.uint8)).to_bytes(8, "little")
    with atomic_path(path) as part, open(part, "wb") as file:
        file.write(lead + b"\0" * (-len(lead) % _ALIGN))
        for array in arrays.values():
            array.tofile(file)
            file.write(b"\0" * (-array.nbytes % _ALIGN))


def read_shadow(path: Path) -> tuple[ShadowHeader, Shadow]:
    """The header and the shadow, memory-mapped. Raises ArtifactError, naming the file, where it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a shadow written by PreparedGallery.save, found no file at {path}")
    with open(path, "rb") as file:
        size = path.stat().st_size
        lead = file.read(len(_NEW) + 8)
        length = int.from_bytes(lead[len(_NEW) :], "little")
        if lead[: len(_NEW)] not in (_OLD, _NEW) or len(lead) < len(_NEW) + 8 or length > min(size, _MOST_HEADER):
            raise ArtifactError(f"{path}: expected a shadow written by PreparedGallery.save, got another file")
        text = file.read(length)
        new = lead.startswith(_NEW)
        check = file.read(8) if new else b""
    if new and check != _xxh64(np.frombuffer(lead + text, np.uint8)).to_bytes(8, "little"):
        _damaged(path, "its header is not the one that was written")
    header, levels, halves, sums = _header(path, text)
    start = -(-(len(lead) + length + len(check)) // _ALIGN) * _ALIGN
    want = _layout(header, levels, halves, new)
    end = start + sum(-(-_bytes(spec) // _ALIGN) * _ALIGN for spec in want.values())
    if size < end if new else size < end - _ALIGN:
        raise ArtifactError(f"{path}: expected {end} bytes of shadow, got {size}; the file is truncated or foreign")
    arrays, at = {}, start
    for name, spec in want.items():
        dtype, shape = spec
        arrays[name] = np.memmap(path, dtype, "r", at, shape) if math.prod(shape) else np.empty(shape, dtype)
        at += -(-_bytes(spec) // _ALIGN) * _ALIGN
    guard = None
    if new:
        found = arrays.pop("sums")
        if _xxh64(found) != sums:
            _damaged(path, "its checksums are not those that were written")
        guard = _Guard(path, arrays, found)
        if size <= _AT_ONCE:
            guard.verify()
    fitted = None
    if levels is not None:
        fitted = Levels(levels[0], np.array(arrays["down"]), np.array(arrays["up"]), levels[1])
    parts = (arrays["tiles"], arrays["meta"], arrays["shift"])
    low, high_error = arrays.get("low"), arrays.get("high_error")
    return header, Shadow(*parts, header.n, header.metric, fitted, arrays.get("tails"), guard, low, high_error)


class _Guard:
    """Compares a mapped shadow with its checksums, once, whoever comes first."""

    def __init__(self, path: Path, arrays: JsonDict, sums: Array) -> None:
        self._path, self._arrays, self._sums = path, arrays, sums
        self._lock, self._done = threading.Lock(), False

    def verify(self) -> None:
        """Raises ArtifactError where a byte is not what was written."""
        if self._done:
            return
        with self._lock:
            at = 0
            for name, array in () if self._done else self._arrays.items():
                for number, block in enumerate(_blocks(array)):
                    if _xxh64(block) != int(self._sums[at]):
                        _damaged(self._path, f"{name} differs from what was written in its mebibyte {number}")
                    at += 1
            self._done = True


def _damaged(path: Path, why: str) -> NoReturn:
    raise ArtifactError(
        f"{path}: expected the shadow that was saved, got a damaged file: {why}; prepare and save again"
    )


def _blocks(array: Array) -> Iterator[Array]:
    flat = array.reshape(-1).view(np.uint8)
    for at in range(0, len(flat), _BLOCK):
        yield flat[at : at + _BLOCK]


def _sums(array: Array) -> Array:
    return np.array([_xxh64(block) for block in _blocks(array)], np.uint64)


def _xxh64(array: Array) -> int:
    digest = _C.Xxh64()
    if array.nbytes:
        digest.update(_C.array_address(array), array.nbytes)
    return digest.digest()


def _bytes(spec: tuple[str, tuple[int, ...]]) -> int:
    return math.prod(spec[1]) * np.dtype(spec[0]).itemsize


def _layout(
    header: ShadowHeader, levels: tuple[int, float] | None, halves: bool, new: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every array's dtype and shape, in the order of the file."""
    n, d = header.n, header.d
    tile, facts, rest = widths(d, None if levels is None else levels[0], halves)
    tiles = -(-n // _C.shadow_tile)
    layout: dict[str, tuple[str, tuple[int, ...]]] = {
        "tiles": ("uint8", (tiles, tile)), "meta": ("float32", (tiles, facts)), "shift": ("float32", (d,)),
    }  # fmt: skip
    if levels is not None:
        head = levels[0]
        layout |= {"tails": ("uint8", (n, rest)), "down": ("float32", (d, head)), "up": ("float32", (head, d))}
    if halves:
        layout |= {"low": ("uint8", (tiles, tile)), "high_error": ("float32", (tiles, _C.shadow_tile))}
    if new:
        layout["sums"] = ("uint64", (sum(-(-_bytes(spec) // _BLOCK) for spec in layout.values()),))
    return layout


def _header(path: Path, text: bytes) -> tuple[ShadowHeader, tuple[int, float] | None, bool, int]:
    """The header, (head, loss) or None, whether in halves, the checksum of the checksums: types and sizes checked."""
    try:
        found = json.loads(text)
        names = ("n", "d", "metric", "dtype", "fingerprint", "space")
        header = ShadowHeader(**{name: found[name] for name in names})
        levels, halves, sums = found.get("levels"), found.get("halves", False), found.get("sums", 0)
        whole = [header.n, header.d, sums] + ([] if levels is None else [levels["head"]])
        fits = all(type(x) is int and 0 <= x < 1 << 64 for x in whole) and header.n < 1 << 48
        fits = fits and 1 <= header.d <= _C.shadow_max_dim and isinstance(header.fingerprint, str)
        fits = fits and header.metric in METRICS and header.dtype in DTYPES
        fits = fits and (header.space is None or isinstance(header.space, dict))
        fits = fits and type(halves) is bool and not (halves and levels is not None)
        if levels is not None:
            loss, head = levels["loss"], levels["head"]
            fits = fits and type(loss) is float and 0 < loss < 1 and 0 < head < header.d and head % 4 == 0
            levels = (head, loss)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path}: expected a shadow's header, got {type(error).__name__}: {error}") from error
    if not fits:
        raise ArtifactError(f"{path}: expected a shadow's header, got sizes, a metric or a dtype that no shadow has")
    return header, levels, halves, sums
