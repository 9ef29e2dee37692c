"""The compiled search: an int8 shadow of the gallery is scanned, what its proven error bound leaves is scored in
float64 (csrc/cpu/topk.h)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from fct import _C
from fct.native_codes import METRIC_CODES
from fct.ops.isa import isa
from fct.ops.search.levels import Levels, fit_levels
from fct.ops.transform.cpu_backend import _rows
from fct.progress import Report
from fct.rows import Rows
from fct.types import Array, Int64s

__all__ = ["Shadow", "build_shadow", "extend_shadow", "ranks_cpu", "topk_cpu"]

_SAMPLE = 65_536  # rows whose mean is the shift
_HALVED = 4096  # rows, below which the shadow lies in the caches, whole or not
_FITTED = 2048  # rows that levels are fitted on
_LARGEST = 1e12  # as in topk.cpp
_PACKED_AT_ONCE = 1 << 26  # values of one compiled call that packs
_SLICE = 1 << 16  # queries of one compiled call: bounds what their candidates take


class Guard(Protocol):
    """Of a shadow that lies in a file: ``verify`` raises ArtifactError where it is damaged."""

    def verify(self) -> None: ...


@dataclass(frozen=True)
class Shadow:
    """A gallery in 8 bits.

    tiles: (t, 4 * ceil(d / 4) * 64) uint8, 64 rows a tile. meta: (t, 260) float32, scales and error bounds.
    shift: (d,) float32, taken off each row first. With ``levels``, tiles are (t, head * 64), meta (t, 196), and
    tails (n, 12 + 4 * ceil((d - head) / 4)) uint8 holds the rest of each row behind its own facts. In halves, tiles and
    low are (t, 4 * ceil(d / 8) * 64), the high and the low four bits, and high_error (t, 64) what
    the high halves alone may be off by.
    usable: False where a norm is beyond what float32 products bear.
    """

    tiles: Array
    meta: Array
    shift: Array
    n: int
    metric: str
    levels: Levels | None = None
    tails: Array | None = None
    guard: Guard | None = None
    low: Array | None = None
    high_error: Array | None = None

    @cached_property  # it reads all of meta, which every query would feel
    def usable(self) -> bool:
        if self.n == 0:
            return True
        if self.guard is not None:
            self.guard.verify()
        # The last is the longest row with levels, else 0.
        _, norm, half, length = (float(x) for x in self.meta[:, -4:].max(axis=0))
        return half <= _LARGEST**2 / 2 and norm <= _LARGEST and length <= _LARGEST

    @property
    def nbytes(self) -> int:
        arrays = [self.tiles, self.meta, self.shift]
        if self.levels is not None and self.tails is not None:
            arrays += [self.tails, self.levels.down, self.levels.up]
        if self.low is not None and self.high_error is not None:
            arrays += [self.low, self.high_error]
        return int(sum(array.nbytes for array in arrays))

    def code(self) -> tuple[int, int, int, float, int]:
        """The levels as the compiled search takes them."""
        return _code(self.levels, self.tails)


def _code(levels: Levels | None, tails: Array | None) -> tuple[int, int, int, float, int]:
    if levels is None or tails is None:
        return 0, 0, 0, 0.0, 0
    down, up = _C.array_address(levels.down), _C.array_address(levels.up)
    return levels.head, down, up, levels.loss, _C.array_address(tails)


def _shift(gallery: Rows, metric: str) -> Array:
    """The mean of a sample, for cosine of its normalised rows. Any vector is right; a mean makes the bound tight."""
    step = max(1, gallery.n // _SAMPLE)
    values = gallery[::step].float32() if gallery.scale is None else gallery[: min(gallery.n, _SAMPLE)].float32()
    if metric == "cosine":
        norm = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
        values = values / np.where(norm > 0, norm, 1)
    mean = values.mean(axis=0, dtype=np.float64) if len(values) else np.zeros(gallery.d)
    return np.clip(mean, -1e30, 1e30).astype(np.float32)


def _sampled(gallery: Rows, metric: str, shift: Array) -> Array:
    """(m, d) float64: rows spread over the gallery, as they are scanned. Drawn, lest its order has a period."""
    at = np.unique(np.random.default_rng(0).integers(0, gallery.n, _FITTED))
    scale = gallery.scale[at] if gallery.scale is not None and gallery.scale.shape[0] == gallery.n else gallery.scale
    values = Rows(gallery.values[at], gallery.dtype, scale, gallery.device, gallery.kind).float32().astype(np.float64)
    if metric == "cosine":
        norm = np.linalg.norm(values, axis=1, keepdims=True)
        values /= np.where(norm > 0, norm, 1)
    away: Array = values - shift
    return away


def _pack(
    gallery: Rows,
    metric: str,
    shift: Array,
    levels: Levels | None,
    halves: bool,
    first: int,
    threads: int,
    report: Report | None,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """(tiles, meta, tails, low, high_error) of rows first..n; first is a multiple of the tile."""
    count = gallery.n - first
    tiles = -(-count // _C.shadow_tile)
    width, facts, rest = widths(gallery.d, None if levels is None else levels.head, halves)
    packed = np.empty((tiles, width), np.uint8)
    meta = np.empty((tiles, facts), np.float32)
    tails = np.empty((count, rest), np.uint8)
    low = np.empty((tiles, width), np.uint8) if halves else None
    high_error = np.empty((tiles, _C.shadow_tile), np.float32) if halves else None
    step = max(1, _PACKED_AT_ONCE // (gallery.d * _C.shadow_tile)) * _C.shadow_tile
    for begin in range(0, count, step):  # between two, Python hears Ctrl-C
        tile = begin // _C.shadow_tile
        _C.shadow_pack(
            _rows(gallery),
            gallery.n,
            METRIC_CODES[metric],
            first + begin,
            min(step, count - begin),
            _C.array_address(shift),
            _code(levels, tails),
            _C.array_address(packed[tile:]),
            _C.array_address(meta[tile:]),
            _C.array_address(tails[begin:]),
            0 if low is None else _C.array_address(low[tile:]),
            0 if high_error is None else _C.array_address(high_error[tile:]),
            threads,
            isa(),
        )
        if report is not None:
            report(min(begin + step, count) / count)
    return packed, meta, tails, low, high_error


def widths(d: int, head: int | None, halves: bool = False) -> tuple[int, int, int]:
    """Bytes of a tile, its facts, and bytes of a row's tail. head: of a shadow with levels, None without."""
    if halves:
        return -(-d // 8) * 4 * _C.shadow_tile, _C.shadow_meta, 0
    if head is None:
        return -(-d // 4) * 4 * _C.shadow_tile, _C.shadow_meta, 0
    rest = _C.shadow_tail_facts + -(-(d - head) // 4) * 4
    return head * _C.shadow_tile, _C.shadow_head_meta, rest


def why_not_shadow(gallery: Rows) -> str:
    """Why this gallery is searched without a shadow; empty when it can have one."""
    if gallery.d > _C.shadow_max_dim:
        return f"{gallery.d} dimensions are more than the {_C.shadow_max_dim} whose 8-bit products int32 holds"
    return ""


def build_shadow(
    gallery: Rows, metric: str, *, threads: int, levels: bool = False, halves: bool = True, report: Report | None = None
) -> Shadow:
    """levels: for a gallery that will be searched again and again. Two are fitted where they gain something, else the
    bytes are cut in halves, which single queries gain by, unless ``halves`` is False.
    """
    shift = _shift(gallery, metric)
    away = None if metric == "l2" else shift
    fitted = fit_levels(_sampled(gallery, metric, shift), away, gallery.n) if levels else None
    halves = halves and levels and fitted is None and gallery.n >= _HALVED
    tiles, meta, tails, low, high_error = _pack(gallery, metric, shift, fitted, halves, 0, threads, report)
    return Shadow(tiles, meta, shift, gallery.n, metric, fitted, tails, low=low, high_error=high_error)


def _joined(before: Array | None, new: Array | None, whole: int) -> Array | None:
    return None if before is None or new is None else np.concatenate([before[:whole], new])


def extend_shadow(shadow: Shadow, gallery: Rows, *, threads: int, report: Report | None = None) -> Shadow:
    """The shadow of a gallery that has grown: rows shadow.n..gallery.n are packed, and the last tile again."""
    if shadow.guard is not None:
        shadow.guard.verify()
    whole = shadow.n // _C.shadow_tile
    first = whole * _C.shadow_tile
    halves = shadow.low is not None
    tiles, meta, tails, low, high_error = _pack(
        gallery, shadow.metric, shadow.shift, shadow.levels, halves, first, threads, report
    )
    return Shadow(
        np.concatenate([shadow.tiles[:whole], tiles]),
        np.concatenate([shadow.meta[:whole], meta]),
        shadow.shift,
        gallery.n,
        shadow.metric,
        shadow.levels,
        tails if shadow.levels is None or shadow.tails is None else np.concatenate([shadow.tails[:first], tails]),
        low=_joined(shadow.low, low, whole),
        high_error=_joined(shadow.high_error, high_error, whole),
    )


def topk_cpu(
    queries: Rows,
    gallery: Rows,
    shadow: Shadow | None,
    k: int,
    metric: str,
    same_items: bool,
    *,
    threads: int,
    report: Report | None = None,
) -> tuple[Array, Array, dict[str, int]]:
    """(distances, indices, counts): candidates rescored, tails read, queries that went through every row."""
    if shadow is not None and shadow.guard is not None:
        shadow.guard.verify()
    distances = np.empty((queries.n, k), np.float32)
    indices = np.empty((queries.n, k), np.int64)
    counts = {"rescored": 0, "tails": 0, "exhausted": 0}
    for start in range(0, queries.n, _SLICE):
        part = queries[start : start + _SLICE]
        found = _C.topk(
            _rows(part),
            part.n,
            _rows(gallery),
            gallery.n,
            0 if shadow is None else _C.array_address(shadow.tiles),
            0 if shadow is None else _C.array_address(shadow.meta),
            0 if shadow is None else _C.array_address(shadow.shift),
            _code(None, None) if shadow is None else shadow.code(),
            0 if shadow is None or shadow.low is None else _C.array_address(shadow.low),
            0 if shadow is None or shadow.high_error is None else _C.array_address(shadow.high_error),
            METRIC_CODES[metric],
            k,
            start if same_items else -1,
            _C.array_address(distances[start:]),
            _C.array_address(indices[start:]),
            threads,
            isa(),
            None if report is None else _within(report, start / queries.n, part.n / queries.n),
        )
        for name, count in zip(counts, found, strict=True):
            counts[name] += count
    return distances, indices, counts


def _within(report: Report, start: float, part: float) -> Report:
    return lambda share: report(start + part * share)


def ranks_cpu(
    queries: Rows,
    gallery: Rows,
    query_labels: Int64s,
    gallery_labels: Int64s,
    metric: str,
    same_items: bool,
    *,
    threads: int,
    report: Report | None = None,
) -> tuple[Array, Array]:
    """As :func:`fct.ops.search.float64.ranks_on_device`; labels are int64 codes from 0."""
    classes = int(max(query_labels.max(initial=-1), gallery_labels.max(initial=-1))) + 1
    members = np.argsort(gallery_labels, kind="stable").astype(np.int64, copy=False)
    starts = np.zeros(classes + 1, np.int64)
    np.cumsum(np.bincount(gallery_labels, minlength=classes), out=starts[1:])
    codes = np.ascontiguousarray(query_labels, np.int64)
    first = np.empty(queries.n, np.int64)
    precision = np.empty(queries.n, np.float64)
    if queries.n:
        _C.ranks(
            _rows(queries),
            queries.n,
            _rows(gallery),
            gallery.n,
            _C.array_address(codes),
            _C.array_address(starts),
            _C.array_address(members),
            METRIC_CODES[metric],
            0 if same_items else -1,
            _C.array_address(first),
            _C.array_address(precision),
            threads,
            isa(),
            report,
        )
    return first, precision
