"""Exact search and exact ranks from blocked matrix products: numpy on the CPU, torch on a CUDA device.

The path that is always there. Scores are summed in float64 and rounded to float32 once (see docs/retrieval.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fct.rows import Rows
from fct.types import Floats, Int64s, Values

__all__ = ["cost_blocks", "merge_sorted", "ranks_on_device", "topk_blocked"]

_BLOCK_BYTES = 128 << 20


def _float64(rows: Rows, metric: str) -> Values:
    values = rows.float32()
    values = values.astype(np.float64) if isinstance(values, np.ndarray) else values.double()
    if metric != "cosine":
        return values
    norm = (values * values).sum(1)[:, None] ** 0.5
    return values / (norm + (norm == 0))


def _cost(q: Values, g: Values, metric: str) -> Values:
    """Float32 costs, the smallest best: squared l2, or the negated product."""
    product = q @ g.T
    if metric != "l2":
        cost = -product
    else:
        cost = (q * q).sum(1)[:, None] - 2 * product + (g * g).sum(1)[None, :]
    if isinstance(cost, np.ndarray):
        return np.maximum(cost, 0).astype(np.float32) if metric == "l2" else cost.astype(np.float32)
    return (cost.clamp_(min=0) if metric == "l2" else cost).float()


def cost_blocks(
    queries: Rows, gallery: Rows, metric: str, same_items: bool, gallery_block: int
) -> Iterator[tuple[slice, slice, Values]]:
    """(query part, gallery part, costs): every gallery part of one query part before the next query part."""
    columns = max(1, min(gallery.n, gallery_block))
    step = max(1, min(queries.n, _BLOCK_BYTES // (24 * columns)))
    for q0 in range(0, queries.n, step):
        q_part = slice(q0, min(q0 + step, queries.n))
        q = _float64(queries[q_part], metric)
        for g0 in range(0, gallery.n, columns):
            g_part = slice(g0, min(g0 + columns, gallery.n))
            cost = _cost(q, _float64(gallery[g_part], metric), metric)
            if same_items:
                for i in range(max(q_part.start, g_part.start), min(q_part.stop, g_part.stop)):
                    cost[i - q0, i - g0] = np.inf
            yield q_part, g_part, cost


def topk_blocked(queries: Rows, gallery: Rows, k: int, metric: str, same_items: bool) -> tuple[Values, Values]:
    """((n, k) float32, (n, k) int64) of the k best; numpy, or tensors on the device of the rows."""
    sign = np.float32(1 if metric == "l2" else -1)
    parts: list[tuple[Values, Values]] = []
    best: tuple[Values, Values] | None = None
    for _, g_part, cost in cost_blocks(queries, gallery, metric, same_items, max(8192, 4 * k)):
        found = _best_of(cost, k, g_part.start)
        best = found if best is None else merge_sorted(best, found, k)
        if g_part.stop == gallery.n:
            parts.append(best)
            best = None
    if not queries.kind_is_numpy:
        import torch

        costs, ids = (torch.cat([p[i] for p in parts]) for i in (0, 1))
        return costs * float(sign), ids
    return np.concatenate([p[0] for p in parts]) * sign, np.concatenate([p[1] for p in parts])


def _best_of(cost: Values, k: int, offset: int) -> tuple[Values, Values]:
    """The k lowest of each row, by (cost, index)."""
    k = min(k, cost.shape[1])
    if not isinstance(cost, np.ndarray):
        values, order = cost.sort(dim=1, stable=True)
        return values[:, :k], order[:, :k] + offset
    worst = np.partition(cost, k - 1, axis=1)[:, k - 1]
    ids = np.empty((len(cost), k), np.int64)
    for i, row in enumerate(cost):
        inside = np.flatnonzero(row <= worst[i])
        ids[i] = inside[np.argsort(row[inside], kind="stable")[:k]]
    return np.take_along_axis(cost, ids, axis=1), ids + offset


def merge_sorted(a: tuple[Values, Values], b: tuple[Values, Values], k: int) -> tuple[Values, Values]:
    """The k lowest of two sorted lists; every index of ``a`` is below every one of ``b``, so a stable sort suffices."""
    costs: Values
    ids: Values
    if isinstance(a[0], np.ndarray):
        costs, ids = (np.concatenate([x, y], axis=1) for x, y in zip(a, b, strict=True))
        order = np.argsort(costs, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(costs, order, axis=1), np.take_along_axis(ids, order, axis=1)
    import torch

    costs, ids = (torch.cat([x, y], dim=1) for x, y in zip(a, b, strict=True))
    costs, order = costs.sort(dim=1, stable=True)
    return costs[:, :k], ids.gather(1, order[:, :k])


def ranks_on_device(
    queries: Rows, gallery: Rows, query_labels: Int64s, gallery_labels: Int64s, metric: str, same_items: bool
) -> tuple[Int64s, Floats]:
    """Per query, as numpy: rows before its first match (-1: no match) and its average precision (NaN: no match).

    For tensors: sorted and counted on their device, a block of queries at a time; labels are int64 codes, numpy.
    """
    import torch

    first = np.full(queries.n, -1, np.int64)
    ap = np.full(queries.n, np.nan)
    q_codes, g_codes = (torch.as_tensor(x, device=queries.device) for x in (query_labels, gallery_labels))
    for part, _, costs in cost_blocks(queries, gallery, metric, same_items, gallery.n):
        ordered, order = costs.sort(dim=1, stable=True)
        match = g_codes[order] == q_codes[part, None]
        last = torch.searchsorted(ordered, ordered, right=True) - 1  # of the rows that cost no more: ties come together
        counted = torch.ones_like(order)
        if same_items:
            counted[order == torch.arange(part.start, part.stop, device=queries.device)[:, None]] = 0
            match = match & (counted > 0)
        matches = match.cumsum(1)
        count = matches[:, -1]
        within = counted.cumsum(1)
        shares = torch.where(match, matches.gather(1, last).double() / within.gather(1, last).clamp(min=1), 0.0)
        position = within.gather(1, match.to(torch.uint8).argmax(1, keepdim=True)) - 1
        there = count > 0
        first[part] = torch.where(there, position[:, 0], -1).cpu().numpy()
        ap[part] = torch.where(there, shares.sum(1) / count.clamp(min=1), torch.nan).cpu().numpy()
    return first, ap
