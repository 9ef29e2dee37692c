"""A pruned search on paper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fct.bench.data_sheets import GPUS
from tools.gpu_pruning import Counted, counted, times

A100 = GPUS[0]
CASE = Counted("even", 1, 1_000_000, 128, 64, 0.002)


def test_one_query_is_bound_by_bytes() -> None:
    found = times(A100, CASE)
    assert found.whole == pytest.approx(1e6 * 144 / 2039e3)
    # 64 values and 16 bytes of facts a row, then three sectors of each of the 2,000 rows left over.
    assert found.pruned == pytest.approx((1e6 * 80 + 2000 * 96) / 2039e3)
    assert found.gain == pytest.approx(1.8, abs=0.01)


def test_a_thousand_queries_are_bound_by_products_and_by_what_is_left_over() -> None:
    many = replace(CASE, queries=1000)
    found = times(A100, many)
    assert found.whole == pytest.approx(2 * 1e9 * 128 / 624e6)
    assert found.pruned == pytest.approx(2 * 1e9 * 64 / 624e6 + 2e6 * 96 / 2039e3)
    assert times(A100, replace(many, left=0.2)).gain < 1 < times(A100, replace(many, left=0.0)).gain


def test_the_reports_rows_are_read() -> None:
    row: dict[str, Any] = {
        "table": "search sets: what was read",
        "set": "a",
        "gallery": 10,
        "d": 50,
        "left_after_first_level": 0.5,
    }
    rows = [{**row, "queries": 1, "kind": "halves"}, {**row, "queries": 9, "kind": "levels, 16 directions first"}]
    assert counted(rows) == [Counted("a", 1, 10, 50, 25, 0.5), Counted("a", 9, 10, 50, 16, 0.5)]
    assert counted([{**row, "queries": 1, "kind": "flat"}, {"table": "other"}]) == []
    assert counted(rows)[0].tail == 64
