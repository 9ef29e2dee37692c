"""The checker of every search is itself fed wrong answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from oracle import check_search, wrong_answers

import fct


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_wrong_answers_are_rejected(metric: str, rng: np.random.Generator) -> None:
    g, q = rng.standard_normal((300, 12), dtype=np.float32), rng.standard_normal((6, 12), dtype=np.float32)
    right = fct.topk(q, g, 9, metric=metric)
    check_search(*right, q, g, metric)
    for name, wrong in wrong_answers(*right, g).items():
        try:
            check_search(*wrong, q, g, metric)
        except AssertionError:
            continue
        pytest.fail(f"accepted: {name}")


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_wrong_rows_at_ties_are_rejected(metric: str, rng: np.random.Generator) -> None:
    """Row 250 is row 3 again: both as near, and only the lower index may stand first, or alone."""
    g = rng.standard_normal((300, 12), dtype=np.float32)
    g[3] *= 4  # the best of its own query for every metric
    g[250] = g[3]
    q = g[[3, 7]] + np.float32(0.01)
    d, i = (np.array(x) for x in fct.topk(q, g, 5, metric=metric))
    assert list(i[0, :2]) == [3, 250]
    check_search(d, i, q, g, metric)
    turned = i.copy()
    turned[0, :2] = 250, 3
    with pytest.raises(AssertionError, match="lower index first"):
        check_search(d, turned, q, g, metric)
    alone_d, alone_i = (np.array(x) for x in fct.topk(q, g, 1, metric=metric))
    alone_i[0, 0] = 250
    with pytest.raises(AssertionError, match="not the lowest"):
        check_search(alone_d, alone_i, q, g, metric)


def test_a_query_s_own_row_is_rejected(rng: np.random.Generator) -> None:
    x: Any = rng.standard_normal((50, 6), dtype=np.float32)
    check_search(*fct.topk(x, x, 4, same_items=True), x, x, "l2", same_items=True)
    with pytest.raises(AssertionError, match="own row"):
        check_search(*fct.topk(x, x, 4), x, x, "l2", same_items=True)
