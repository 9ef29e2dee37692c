"""Processors with matrix tiles (AMX): torch's library uses them, our kernels do not. Who is faster is measured."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from fct import _C
from fct.artifact.transformation import Transformation
from fct.ops.backend import TransformBackend
from fct.ops.processors import default_threads
from fct.ops.weights import packed
from fct.rows import rows_of

if TYPE_CHECKING:
    pass


__all__ = ["torch_is_faster"]

_ROWS = 2048
_TURNS = 3
_measured: dict[object, bool] = {}


def torch_is_faster(ours: TransformBackend, h: Transformation, precision: str, torch: TransformBackend) -> bool:
    """Whether torch in bf16 takes less time for h's rows here than ``ours`` in ``precision``.

    Measured once in a process for every shape of h and precision, on 2,048 rows, and only where the processor has AMX
    (False elsewhere): the answer must not change from batch to batch, or a row's bits would.
    """
    if not _C.has_amx_bf16() or torch.why_not(h, "bf16", "cpu"):
        return False
    shape = tuple((name, layer.d_in, layer.d_out) for name, layer in h.layers())
    key = (ours.name, precision, shape)
    if key not in _measured:
        _measured[key] = _seconds(torch, h, "bf16") < _seconds(ours, h, precision)
    return _measured[key]


def _seconds(backend: TransformBackend, h: Transformation, precision: str) -> float:
    rng = np.random.default_rng(0)
    old = rows_of(rng.standard_normal((_ROWS, h.d_old), dtype=np.float32), "old")
    side = rows_of(rng.standard_normal((_ROWS, h.d_side), dtype=np.float32), "side") if h.uses_side_info else old
    out = rows_of(np.empty((_ROWS, h.d_new), np.float32), "out", finite=False)
    weights = packed(backend, h, precision, "cpu")
    spent = []
    for _ in range(_TURNS + 1):  # the first one warms up
        start = time.perf_counter()
        backend.run(weights, old, side, out, threads=default_threads())
        spent.append(time.perf_counter() - start)
    return min(spent[1:])
