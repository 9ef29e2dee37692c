"""CMC and mAP against the loop that everybody writes: a numpy argsort and scikit-learn's average precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fct
from fct.report.measure import interleave, timing_fields


def loop(x: Any, labels: Any, queries: int) -> tuple[float, float]:
    """(CMC top-1, mAP) of the first ``queries`` rows against all."""
    from sklearn.metrics import average_precision_score

    squares = (x.astype(np.float64) ** 2).sum(axis=1)
    hits, precision = [], []
    for i in range(queries):
        distance = (squares - 2.0 * (x @ x[i])).astype(np.float32)
        match = labels == labels[i]
        order = np.argsort(distance, kind="stable")
        hits.append(match[order[order != i][0]])
        others = np.arange(len(x)) != i
        precision.append(average_precision_score(match[others], -distance[others]))
    return float(np.mean(hits)), float(np.mean(precision))


@pytest.mark.parametrize("classes", [10, 1000])
def test_evaluate(classes: int, full: bool, threads: int, record: Callable[..., None]) -> None:
    n, d = 10_000, 128
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    x = (rng.standard_normal((classes, d))[labels] + 3 * rng.standard_normal((n, d))).astype(np.float32)
    part = n if full else 500  # the loop's cost is the same for every query
    got = fct.evaluate(x, x, labels, same_items=True, threads=threads)
    cmc1, mean_ap = loop(x, labels, part)
    assert np.mean(got.first_match[:part] == 0) == pytest.approx(cmc1, abs=2e-3)
    assert np.mean(got.average_precision[:part]) == pytest.approx(mean_ap, abs=1e-5)
    fns: dict[str, Callable[[], Any]] = {
        "fct.evaluate": lambda: fct.evaluate(x, x, labels, same_items=True, threads=threads, bootstrap=0),
        "fct.evaluate, 1000 resamples": lambda: fct.evaluate(x, x, labels, same_items=True, threads=threads),
        "numpy + scikit-learn loop": lambda: loop(x, labels, part),
    }
    for name, timing in interleave(fns, rounds=3).items():
        queries = part if name.startswith("numpy") else n
        record("evaluate", who=name, queries=queries, gallery=n, d=d, classes=classes, threads=threads,
               us_per_query=1e6 * timing.median / queries, **timing_fields(timing, rows=queries))  # fmt: skip
