"""Certified-exact top-k by Triton kernels: a low-precision scan proposes, float64 sums of the rows themselves dispose.

Every row gets a bfloat16 or int8 shadow and the measured length of what the rounding lost; ``scan`` keeps, in each of
its lists, the candidates with the best *upper bounds*, so what a list dropped is no better than the worst it kept. The
candidates are scored exactly, and a query is certified when its k-th exact score beats every bound that was dropped.
One that is not gets all its candidates scored; one that still is not (near-ties, duplicates) goes through blocked
float64 products. The bounds are those of csrc/cuda/topk.cuh; their derivation is in KERNELS.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fct.errors import BackendError
from fct.extras import why_missing
from fct.native_codes import METRIC_CODES
from fct.ops.backend import GpuShadow, drop_own_rows
from fct.ops.device import state as devices
from fct.ops.search.float64 import merge_sorted, topk_blocked
from fct.ops.transform.triton_backend import scale_mode
from fct.rows import Rows

if TYPE_CHECKING:
    import torch

    from fct.kernels.tile_choices import Tile
    from fct.ops.device.state import Device, Kernel


__all__ = ["MAX_K", "Plan", "TritonSearch", "plan", "queries_at_once", "slots"]

MAX_K = 2048
_SLAB = 1 << 30  # gallery rows of one scan; its row numbers have 32 bits
_KEYS = 64 << 20  # bytes of one call's candidates
_WORST = (1 << 63) - 1
_BLOCK = 1 << 24  # values that are packed at once
_MOST, _LEAST = 1e15, 1e-15  # norms whose squares float32 bears with room to spare


def _slack(d: int) -> float:
    """What float32 sums of d products may lose, relative to |q| |g|: four times a truncating accumulator's worst."""
    return (d + 64) * 2.0**-21


@dataclass(frozen=True)
class Plan:
    """One launch of ``scan``. keep: candidates of each list; whole: every row of the gallery is one."""

    tile: Tile
    keep: int
    splits: int
    whole: bool

    @property
    def candidates(self) -> int:
        return self.keep * self.splits


def plan(n: int, k: int, kind: str, n_queries: int, device: Device, width: int = 128) -> Plan:
    """Lists so many that the contenders, which spread over them by chance, fill a quarter of each, and splits in whole
    waves of the device. Where the gallery has too few tiles for that, each list keeps a whole tile.

    width: elements of a shadow row.
    """
    from fct.kernels import search_kernels as kernels

    few, many = kernels.KEEPS
    contenders = 4 * (2 * k + 32)
    for keep in (few, many):
        tile = kernels.tile(kind, keep, device.target, width=width, queries=n_queries)
        tiles, wanted = math.ceil(n / tile.n), math.ceil(contenders / keep)
        if keep == many or (k <= 256 and wanted <= tiles):
            together = max(1, slots(tile, device) // math.ceil(n_queries / tile.m))
            splits = min(tiles, math.ceil(wanted / together) * together)
            return Plan(tile, keep, splits, splits == tiles and keep >= tile.n)
    raise AssertionError("no list is deep enough")


def slots(tile: Tile, device: Device) -> int:
    """Programs of ``scan`` that run at once: registers let one of eight warps, or two of four, on a multiprocessor."""
    return int(device.processors * (8 // tile.warps))


def queries_at_once(tile: Tile, device: Device) -> int:
    """Queries of one launch, 2,048 to 4,096: tiles of which a whole number of splits fills the device best.

    Then the query tiles of a part of the gallery run together and read it once.
    """
    at_once, most = slots(tile, device), 4096 // tile.m
    return int(tile.m * max(range(most, most // 2 - 1, -1), key=lambda tiles: at_once // tiles * tiles))


class TritonSearch:
    """Top-k on a GPU without compiled CUDA; the answer is that of :func:`fct.topk` on a CPU."""

    name = "triton"

    def __init__(self, *, slab: int = _SLAB) -> None:
        self.slab = slab

    def why_not(self, k: int, metric: str, device: str) -> list[str]:
        """Every reason why this search cannot run on this device; empty when it can."""
        why = [] if k <= MAX_K else [f"expected k up to {MAX_K}, got {k}"]
        if metric not in METRIC_CODES:
            why.append(f"has no metric {metric!r}")
        why += devices.why_no_gpu(device)
        return [*why, *why_missing("triton")]

    def prepare(self, gallery: Rows, metric: str, kind: str = "bf16") -> GpuShadow:
        """The gallery's shadow: "bf16" or "int8" rows and four floats a row that bound what the rounding lost.

        gallery: (n, d) on the device, n >= 1. Takes n * (2 d or d, rounded up to 128, + 16) bytes. Waits once, to
        learn whether every norm is one that float32 products bear.
        """
        shadow, meta, bounded = _pack(gallery, metric, kind, is_query=False)
        return GpuShadow(self.name, gallery, metric, kind, shadow, meta, bool(bounded.all()))

    def search(
        self, queries: Rows, gallery: GpuShadow, k: int, *, same_items: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """((n, k) float32 distances, (n, k) int64 rows) of the k best, ties by lower row; tensors on the device.

        1 <= k <= 2048. ``same_items`` leaves row i out of query i's answer and needs k <= 2047. Waits for the device,
        to learn which queries were certified.
        """
        if same_items:
            return drop_own_rows(*self.search(queries, gallery, k + 1))
        import torch

        place = devices.device_of(queries.device)
        rows, metric, width = gallery.rows, gallery.metric, gallery.shadow.shape[1]
        if queries.n == 0:
            return place.empty((0, k), "float32"), place.empty((0, k), "int64")
        if not gallery.usable:
            return topk_blocked(queries, rows, k, metric, False)
        slabs = [slice(at, min(at + self.slab, rows.n)) for at in range(0, rows.n, self.slab)]
        found = []
        start = 0
        while start < queries.n:
            p = plan(min(rows.n, self.slab), k, gallery.kind, min(queries.n - start, 4096), place, width)
            some = queries[start : start + max(1, min(queries_at_once(p.tile, place), _KEYS // (8 * p.candidates)))]
            shadow, meta, bounded = _pack(some, metric, gallery.kind, is_query=True)
            best: tuple[torch.Tensor, torch.Tensor] | None = None
            for slab in slabs:
                part = replace(gallery, rows=rows[slab], shadow=gallery.shadow[slab], meta=gallery.meta[slab])
                p = plan(part.n, k, gallery.kind, some.n, place, width)
                costs, ids = _Scan(some, shadow, meta, bounded, part, min(k, part.n), p, place).best()
                ids = ids + slab.start
                best = (costs, ids) if best is None else merge_sorted(best, (costs, ids), k)
            assert best is not None
            found.append(best)
            start += some.n
        costs, ids = (torch.cat([f[i] for f in found]) for i in (0, 1))
        return (costs if metric == "l2" else -costs), ids


class _Scan:
    """Some queries against one slab of the gallery."""

    def __init__(
        self,
        queries: Rows,
        shadow: torch.Tensor,
        meta: torch.Tensor,
        bounded: torch.Tensor,
        gallery: GpuShadow,
        k: int,
        p: Plan,
        device: Device,
    ) -> None:
        self.queries, self.shadow, self.meta, self.bounded = queries, shadow, meta, bounded
        self.gallery, self.k, self.plan, self.device = gallery, k, p, device

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """((n, k) costs, ascending, (n, k) rows of the slab), exact."""
        import torch

        keys = self._candidates()
        total = keys.shape[1]
        costs, ids, certain = self._settle(keys, min(total, 2 * self.k + 64))
        for count in (total, 0):
            open_ = torch.nonzero(~certain)[:, 0]
            if not len(open_):  # the one wait
                break
            if count:
                some = self._settle(keys[open_], count, open_)
            else:
                q = take(self.queries, open_)
                distances, rows = topk_blocked(q, self.gallery.rows, self.k, self.gallery.metric, False)
                some = (distances if self.gallery.metric == "l2" else -distances), rows, torch.ones_like(open_) > 0
            costs[open_], ids[open_], certain[open_] = some
        return costs, ids

    def _candidates(self) -> torch.Tensor:
        """(n, splits * keep) keys of ``scan``."""
        from fct.kernels import search_kernels as kernels
        from fct.kernels.kernel_arguments import Shadow

        q, g, p = self.queries, self.gallery, self.plan
        keys = self.device.empty((q.n, p.splits, p.keep), "int64")
        arguments = {
            "queries": Shadow(self.shadow, self.shadow.stride(0), self.meta),
            "gallery": Shadow(g.shadow, g.shadow.stride(0), g.meta), "out": keys, "n_q": q.n, "n_g": g.n,
            "splits": p.splits, "width": g.shadow.shape[1], "HELD": p.tile.k == g.shadow.shape[1], "KEEP": p.keep,
            "TILE": p.tile, "UPCAST": self.device.interpreted,
        }  # fmt: skip
        self._launch("scan", kernels.scan, (math.ceil(q.n / p.tile.m), p.splits), arguments, p.tile)
        return keys.view(q.n, -1)

    def _settle(
        self, keys: torch.Tensor, count: int, which: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Exact costs of the ``count`` best candidates: (costs, rows) of the k best, and which queries are certified.

        which: the queries that ``keys`` belongs to; None for all.
        """
        import torch

        n, total = keys.shape
        queries = self.queries if which is None else take(self.queries, which)
        bounded = self.bounded if which is None else self.bounded[which]
        # what any list dropped is no better than the last it kept; a list with free places dropped nothing
        lists = keys.view(n, self.plan.splits, self.plan.keep)
        dropped = torch.full_like(keys[:, 0], _WORST) if self.plan.whole else lists[:, :, -1].min(dim=1).values
        if count < total:
            keys = keys.topk(count, dim=1, largest=False, sorted=True).values
            dropped = torch.minimum(dropped, keys[:, -1])
        keys = keys.contiguous()
        costs = self._rescore(queries, keys)
        ids, order = torch.where(keys == _WORST, keys, keys & 0xFFFFFFFF).sort(dim=1)
        costs, order = costs.gather(1, order).sort(dim=1, stable=True)
        costs, ids = costs[:, : self.k], ids.gather(1, order[:, : self.k])
        certain = (dropped == _WORST) | (self._least(queries, dropped) > costs[:, -1])
        return costs, ids, certain & (bounded | (dropped == _WORST))

    def _least(self, queries: Rows, dropped: torch.Tensor) -> torch.Tensor:
        """(n,) float32: no row behind the key ``dropped`` costs less."""
        import torch

        bits = (dropped >> 32).to(torch.int32)
        cost = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32).double()  # -(q.g + bias), at least
        if self.gallery.metric == "l2":
            q = queries.float32().double()
            square = (q * q).sum(1)
            cost = square + 2 * cost - 1e-12 * (square + cost.abs())
        return cost.float()

    def _rescore(self, queries: Rows, keys: torch.Tensor) -> torch.Tensor:
        """(n, count) float32 costs of the candidates; infinity where there is none."""
        from fct.kernels import search_kernels as kernels
        from fct.kernels.kernel_arguments import Gallery

        n, count = keys.shape
        g, tile = self.gallery.rows, kernels.RESCORE
        costs = self.device.empty((n, count), "float32")
        arguments = {
            "queries": Gallery(queries.values, queries.scale, queries.row_stride),
            "gallery": Gallery(g.values, g.scale, g.row_stride), "keys": keys, "cost": costs, "count": count, "D": g.d,
            "METRIC": METRIC_CODES[self.gallery.metric], "Q_SCALE": scale_mode(queries), "G_SCALE": scale_mode(g),
            "TILE": tile,
        }  # fmt: skip
        self._launch("rescore", kernels.rescore, (n, math.ceil(count / tile.n)), arguments, tile)
        return costs

    def _launch(
        self, name: str, kernel: Kernel, grid: tuple[int, int], arguments: dict[str, object], tile: Tile
    ) -> None:
        place = self.device
        try:
            place.launch(kernel, grid, arguments, warps=tile.warps, stages=tile.stages)
        except Exception as error:
            if place.is_out_of_memory(error) or place.is_lost(error) or isinstance(error, BackendError):
                raise
            raise BackendError(
                f"{name}: the launch over {self.queries.n} queries and {self.gallery.n} rows, grid {grid}, {tile}, "
                f"failed on {place.name} ({place.model}): {error}"
            ) from error


def take(rows: Rows, which: torch.Tensor) -> Rows:
    """The rows numbered ``which``, as a copy."""
    scale = rows.scale
    if scale is not None and scale.shape[0] == rows.n and rows.n != 1:
        scale = scale[which]
    return Rows(rows.values[which], rows.dtype, scale, rows.device, rows.kind)


def _pack(rows: Rows, metric: str, kind: str, *, is_query: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(shadow, meta, bounded): (n, pitch) bfloat16 or int8, (n, 4) float32, and (n,) whether the bounds can be used.

    A gallery's meta is scale, bias, what was lost with the slack, and the shadow's length; a query's is scale, length
    and what was lost. Lengths are rounded up.
    """
    import torch

    place = devices.device_of(rows.device)
    n, d = rows.n, rows.d
    line = 128 if kind == "int8" else 64  # elements of 128 bytes
    shadow = place.empty((n, math.ceil(d / line) * line), "int8" if kind == "int8" else "bfloat16")
    meta = place.empty((n, 4), "float32")
    bounded = place.empty((n,), "bool")
    shadow[:, d:] = 0
    for start in range(0, n, max(1, _BLOCK // d)):
        part = slice(start, start + max(1, _BLOCK // d))
        x = rows[part].float32().double()
        length = (x * x).sum(1).sqrt()
        bounded[part] = (length == 0) | ((length > _LEAST) & (length < _MOST))
        if metric == "cosine":
            x = x / torch.where(length > 0, length, 1)[:, None]
            length = (length > 0).double()
        if kind == "int8":
            largest = x.abs().amax(1)
            scale = torch.where(largest > 0, largest / 127, 1).float()
            steps = (x / scale.double()[:, None]).round().clamp(-127, 127)
            shadow[part, :d] = steps.to(torch.int8)
            kept = steps * scale.double()[:, None]
        else:
            scale = torch.ones_like(length).float()
            shadow[part, :d] = x.to(torch.bfloat16)
            kept = shadow[part, :d].double()
        lost = (x - kept).square().sum(1).sqrt() * 1.001
        above = length * 1.001
        if is_query:
            facts = (scale, above, lost, above)
        else:
            bias = length.square() * (_slack(d) - 0.5) if metric == "l2" else torch.zeros_like(length)
            tiny = d * 4.7e-38  # products that float32 or the tensor core flushed to zero
            facts = (scale, bias + tiny, lost + _slack(d) * above, above + lost)
        meta[part] = torch.stack([f.float() for f in facts], dim=1)
    return shadow, meta, bounded
