"""Precision that retrieval cannot feel: int8's activation ranges, and what each faster precision does to retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fct.artifact.layers import BRANCHES, SKIP, Layer
from fct.artifact.tolerance import PrecisionEffect
from fct.artifact.transformation import Transformation
from fct.errors import BackendError
from fct.metrics import RetrievalMetrics, evaluate
from fct.ops.backend import PRECISIONS
from fct.rows import check_labels, rows_of
from fct.search import topk
from fct.transform import check_inputs, transform_batch
from fct.types import Array, Floats, JsonDict, LabelsLike, RowsLike

if TYPE_CHECKING:
    import torch

__all__ = ["calibrate", "measure_precisions"]

_MOST_ROWS = 16_384  # more rows move the ranges no further
_CHUNK = 1_024


def calibrate(h: Transformation, old: RowsLike, side_info: RowsLike | None) -> Transformation:
    """h with activation ranges for int8: each layer's lowest and highest input, channel by channel.

    Args:
        h: the transformation.
        old: (n, d_old) rows like those that will be transformed; every n/16,384-th is used where there are more.
        side_info: (n, d_side), or None for an h fitted without side-information.

    Returns:
        A copy of h with ``calibration`` filled. Measured effects are dropped: they were of the old ranges.

    Raises:
        ValueError: rows that do not match h, or none.

    Examples:
        >>> import numpy as np, fct
        >>> from fct.fit.precision_choice import calibrate
        >>> h = fct.Transformation.random(8, 4, 16, inner=32)
        >>> h = calibrate(h, np.ones((5, 8), np.float32), np.ones((5, 4), np.float32))
        >>> h.calibration["mixer.0"].shape
        (2, 64)
    """
    old_rows, side_rows = check_inputs(old, side_info, h)
    if old_rows.n == 0:
        raise ValueError(f"old: expected at least one row to calibrate on, got (0, {old_rows.d})")
    ranges: JsonDict = {}

    def see(name: str, x: Floats) -> None:
        seen = np.stack([x.min(axis=0), x.max(axis=0)])
        if name in ranges:
            seen = np.stack([np.minimum(ranges[name][0], seen[0]), np.maximum(ranges[name][1], seen[1])])
        ranges[name] = seen

    def chain(branch: str, x: Floats) -> Floats:
        layer: Layer
        for i, layer in enumerate(getattr(h, branch)):
            see(f"{branch}.{i}", x)
            x = x @ layer.weight.T + layer.bias
            if layer.relu:
                x = np.maximum(x, 0)
        return x

    step = max(1, old_rows.n // _MOST_ROWS)
    chosen = np.arange(0, old_rows.n, step)[:_MOST_ROWS]
    for begin in range(0, len(chosen), _CHUNK):
        part = slice(int(chosen[begin]), int(chosen[min(begin + _CHUNK, len(chosen)) - 1]) + 1)
        parts: list[Floats] = [_host(rows[part].float32())[::step] for rows in (old_rows, side_rows)]
        joined = np.concatenate([chain(branch, x) for branch, x in zip(BRANCHES, parts, strict=False)], axis=1)
        chain("mixer", joined)
        if h.skip is not None:
            see(SKIP, np.concatenate(parts, axis=1) if h.uses_side_info else parts[0])
    return h.with_(calibration=ranges, precisions={k: v for k, v in h.precisions.items() if k != "int8"})


def measure_precisions(
    h: Transformation,
    old: RowsLike,
    side_info: RowsLike | None,
    queries_new: RowsLike,
    labels: LabelsLike | None = None,
    *,
    precisions: Sequence[str] = ("bf16", "int8"),
    progress: bool = True,
) -> Transformation:
    """h with the measured effect of each precision on retrieval, against fp32 on the same rows.

    Queries are the new model's embeddings, the gallery is h's output: the setting after a backfill.

    Args:
        h: the transformation; int8 is measured only where it is calibrated.
        old, side_info: (n, d_old) and (n, d_side) or None: held-out rows, which h was not fitted on.
        queries_new: (n, d_new) the new model's embeddings of the same items.
        labels: (n,) classes; None: each query's own item is its one match.
        precisions: which to measure.
        progress: show a bar on stderr for a search that lasts more than two seconds.

    Returns:
        A copy of h with ``precisions`` filled. A precision that no backend can run is left out.

    Raises:
        ValueError: rows that do not match h or each other, an unknown precision.

    Examples:
        >>> import numpy as np, fct
        >>> from fct.fit.precision_choice import measure_precisions
        >>> h = fct.Transformation.random(8, 4, 16, inner=32)
        >>> x = np.random.default_rng(0).standard_normal((50, 28), dtype=np.float32)
        >>> h = measure_precisions(h, x[:, :8], x[:, 8:12], x[:, 12:], precisions=["bf16"])
        >>> h.precisions["bf16"].top10_kept > 0.5
        True
    """
    for precision in precisions:
        if precision not in PRECISIONS:
            raise ValueError(f"precisions: expected some of {', '.join(PRECISIONS)}, got {precision!r}")
    old_rows, _ = check_inputs(old, side_info, h)
    why = "to match the transformation"
    queries = rows_of(queries_new, "queries_new", d=h.d_new, d_why=why, n=old_rows.n, n_why="to match old")
    if queries.n == 0:
        raise ValueError(f"queries_new: expected at least one row to measure on, got (0, {h.d_new})")
    wanted = _host(queries.float32())
    classes = np.arange(queries.n) if labels is None else check_labels(labels, "labels", queries.n)
    same_items = labels is not None  # a query's own item would match by itself
    metric = h.new_space.metric
    k = min(10, queries.n)

    def retrieve(precision: str) -> tuple[Array, RetrievalMetrics]:
        mapped = transform_batch(old, side_info, h, precision=precision, progress=progress)
        gallery = _host(rows_of(mapped, "gallery").float32())
        nearest = topk(wanted, gallery, k, metric=metric, progress=progress).indices
        figures = evaluate(
            wanted, gallery, classes, metric=metric, same_items=same_items, bootstrap=0, progress=progress
        )
        return nearest, figures

    base, before = retrieve("fp32")
    effects = dict(h.precisions)
    for precision in precisions:
        try:
            found, after = retrieve(precision)
        except BackendError:
            continue
        kept = float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(base, found, strict=True)]))
        effects[precision] = PrecisionEffect(
            top10_kept=kept,
            map_change=_difference(after.map, before.map),
            cmc1_change=_difference(after.cmc1, before.cmc1),
        )
    return h.with_(precisions=effects)


def _difference(after: float, before: float) -> float:
    """after - before; 0 where neither has a value (no query has a match)."""
    return 0.0 if np.isnan(after) and np.isnan(before) else float(after - before)


def _host(x: Array | torch.Tensor) -> Floats:
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()
