"""The scan kernel in Triton's interpreter: exact on integers, ties to the lower row, parts, own row left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from fct.kernels import topk as kernels

from fct import ref


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("n_q", "n_g", "d", "part"), [(1, 1, 1, 64), (5, 77, 9, 77), (17, 150, 37, 70)])
@pytest.mark.parametrize("l2", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_scan(rng: Any, dtype: str, n_q: int, n_g: int, d: int, part: int, l2: bool, same: bool) -> None:
    """Small integers: every product and every cost is exact, and ties abound."""
    device, keep = FakeDevice(), 16
    gallery = rng.integers(-2, 3, (n_g, d)).astype(np.float32)
    queries = gallery[:n_q].copy() if same else rng.integers(-2, 3, (n_q, d)).astype(np.float32)
    q, g = (device.rows(torch.from_numpy(x).to(getattr(torch, dtype)), pitch=d + 2).values for x in (queries, gallery))
    parts = -(-n_g // part)
    out = device.empty((parts, n_q, keep), "int64")
    kernels.scan[(-(-n_q // 16), parts)](
        q, q.stride(0), g, g.stride(0), device.upload((queries**2).sum(1)), device.upload((gallery**2).sum(1)), out,
        n_q, n_g, part, 0, D=d, KEEP=keep, L2=l2, SAME=same, BQ=16, BG=32, BK=32, PRECISION="ieee", UPCAST=True,
    )  # fmt: skip
    device.check_guards()
    k = min(keep, n_g - same)
    found = out.numpy()
    cost = ref.scores(queries, gallery, "l2" if l2 else "ip") * (1 if l2 else -1)
    if same:
        cost[np.arange(n_q), np.arange(n_q)] = np.inf
    want = np.argsort(cost, axis=1, kind="stable")[:, :k]
    rows = (found & 0xFFFFFFFF) + np.arange(parts)[:, None, None] * part
    bits = (found >> 32).astype(np.int32)
    costs = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(np.float32).astype(np.float64)
    empty = found == np.iinfo(np.int64).max
    costs, rows = (
        np.moveaxis(np.where(empty, big, x), 0, 1).reshape(n_q, -1) for x, big in ((costs, np.inf), (rows, -1))
    )
    order = np.lexsort((rows, costs), axis=1)[:, :k]
    np.testing.assert_array_equal(np.take_along_axis(rows, order, 1), want)
    np.testing.assert_array_equal(np.take_along_axis(costs, order, 1), np.take_along_axis(cost, want, 1))
