"""The compiled search: an int8 shadow of the gallery is scanned, what its proven error bound leaves is scored in
float64 (csrc/cpu/topk.h)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fct import _C
from fct.ops.transform.cpu_backend import _rows, isa
from fct.progress import Report
from fct.rows import Rows
from fct.spaces import METRICS

__all__ = ["Shadow", "build_shadow", "extend_shadow", "ranks_cpu", "topk_cpu"]

_SAMPLE = 65_536  # rows whose mean is the shift
_LARGEST = 1e12  # as in topk.cpp
_PACKED_AT_ONCE = 1 << 26  # values of one compiled call that packs
_SLICE = 1 << 16  # queries of one compiled call: bounds what their candidates take


@dataclass(frozen=True)
class Shadow:
    """A gallery in 8 bits.

    tiles: (t, 4 * ceil(d / 4) * 64) uint8, 64 rows a tile. meta: (t, 260) float32, scales and error bounds.
    shift: (d,) float32, taken off each row first. usable: False where a norm is beyond what float32 products bear.
    """

    tiles: Any
    meta: Any
    shift: Any
    n: int
    metric: str

    @cached_property  # it reads all of meta, which every query would feel
    def usable(self) -> bool:
        return bool(self.n == 0 or float(self.meta[:, -4:-1].max()) <= _LARGEST**2 / 2) and bool(
            self.n == 0 or float(self.meta[:, -3].max()) <= _LARGEST
        )

    @property
    def nbytes(self) -> int:
        return int(self.tiles.nbytes + self.meta.nbytes + self.shift.nbytes)


def _shift(gallery: Rows, metric: str) -> Any:
    """The mean of a sample, for cosine of its normalised rows. Any vector is right; a mean makes the bound tight."""
    step = max(1, gallery.n // _SAMPLE)
    values = gallery[::step].float32() if gallery.scale is None else gallery[: min(gallery.n, _SAMPLE)].float32()
    if metric == "cosine":
        norm = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
        values = values / np.where(norm > 0, norm, 1)
    mean = values.mean(axis=0, dtype=np.float64) if len(values) else np.zeros(gallery.d)
    return np.clip(mean, -1e30, 1e30).astype(np.float32)


def _pack(gallery: Rows, metric: str, shift: Any, first: int, threads: int, report: Report | None) -> tuple[Any, Any]:
    """(tiles, meta) of rows first..n; first is a multiple of the tile."""
    count = gallery.n - first
    tiles = -(-count // _C.shadow_tile)
    packed = np.empty((tiles, -(-gallery.d // 4) * 4 * _C.shadow_tile), np.uint8)
    meta = np.empty((tiles, _C.shadow_meta), np.float32)
    step = max(1, _PACKED_AT_ONCE // (gallery.d * _C.shadow_tile)) * _C.shadow_tile
    for begin in range(0, count, step):  # between two, Python hears Ctrl-C
        tile = begin // _C.shadow_tile
        _C.shadow_pack(
            _rows(gallery),
            gallery.n,
            METRICS.index(metric),
            first + begin,
            min(step, count - begin),
            _C.array_address(shift),
            _C.array_address(packed[tile:]),
            _C.array_address(meta[tile:]),
            threads,
            isa(),
        )
        if report is not None:
            report(min(begin + step, count) / count)
    return packed, meta


def why_not_shadow(gallery: Rows) -> str:
    """Why this gallery is searched without a shadow; empty when it can have one."""
    if gallery.d > _C.shadow_max_dim:
        return f"{gallery.d} dimensions are more than the {_C.shadow_max_dim} whose 8-bit products int32 holds"
    return ""


def build_shadow(gallery: Rows, metric: str, *, threads: int, report: Report | None = None) -> Shadow:
    shift = _shift(gallery, metric)
    tiles, meta = _pack(gallery, metric, shift, 0, threads, report)
    return Shadow(tiles, meta, shift, gallery.n, metric)


def extend_shadow(shadow: Shadow, gallery: Rows, *, threads: int, report: Report | None = None) -> Shadow:
    """The shadow of a gallery that has grown: rows shadow.n..gallery.n are packed, and the last tile again."""
    whole = shadow.n // _C.shadow_tile
    tiles, meta = _pack(gallery, shadow.metric, shadow.shift, whole * _C.shadow_tile, threads, report)
    return Shadow(
        np.concatenate([shadow.tiles[:whole], tiles]),
        np.concatenate([shadow.meta[:whole], meta]),
        shadow.shift,
        gallery.n,
        shadow.metric,
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
) -> tuple[Any, Any, dict[str, int]]:
    """(distances, indices, counts): what was rescored, and how many queries went through every row."""
    distances = np.empty((queries.n, k), np.float32)
    indices = np.empty((queries.n, k), np.int64)
    counts = {"rescored": 0, "exhausted": 0}
    for start in range(0, queries.n, _SLICE):
        part = queries[start : start + _SLICE]
        rescored, exhausted = _C.topk(
            _rows(part),
            part.n,
            _rows(gallery),
            gallery.n,
            0 if shadow is None else _C.array_address(shadow.tiles),
            0 if shadow is None else _C.array_address(shadow.meta),
            0 if shadow is None else _C.array_address(shadow.shift),
            METRICS.index(metric),
            k,
            start if same_items else -1,
            _C.array_address(distances[start:]),
            _C.array_address(indices[start:]),
            threads,
            isa(),
            None if report is None else _within(report, start / queries.n, part.n / queries.n),
        )
        counts["rescored"] += rescored
        counts["exhausted"] += exhausted
    return distances, indices, counts


def _within(report: Report, start: float, part: float) -> Report:
    return lambda share: report(start + part * share)


def ranks_cpu(
    queries: Rows,
    gallery: Rows,
    query_labels: Any,
    gallery_labels: Any,
    metric: str,
    same_items: bool,
    *,
    threads: int,
    report: Report | None = None,
) -> tuple[Any, Any]:
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
            METRICS.index(metric),
            0 if same_items else -1,
            _C.array_address(first),
            _C.array_address(precision),
            threads,
            isa(),
            report,
        )
    return first, precision
