"""CMC and mAP against the loop that everybody writes: a numpy argsort and scikit-learn's average precision.

The loop runs in a process of its own, under the OpenBLAS kernels that suit it best.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct.bench.measure import interleave, timing_fields
from fct.bench.peers import Worker, best_setting, openblas_times


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


def loop_worker(folder: Path, queries: int, settings: Mapping[str, str]) -> Worker:
    source = (
        "import sys\nfrom typing import Any\nimport numpy as np\n"
        + inspect.getsource(loop)
        + "x, labels = (np.load(path) for path in sys.argv[1:3])\n"
        "def call(): return np.array(loop(x, labels, int(sys.argv[3])))\n"
    )
    return Worker(source, [str(folder / "x.npy"), str(folder / "labels.npy"), str(queries)], settings)


@pytest.mark.parametrize("classes", [10, 1000])
def test_evaluate(classes: int, full: bool, threads: int, record: Callable[..., None], tmp_path: Path) -> None:
    n, d = 10_000, 128
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    x = (rng.standard_normal((classes, d))[labels] + 3 * rng.standard_normal((n, d))).astype(np.float32)
    part = n if full else 500  # the loop's cost is the same for every query
    got = fct.evaluate(x, x, labels, same_items=True, threads=threads)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "labels.npy", labels)
    times = openblas_times(lambda settings: loop_worker(tmp_path, 50, settings), calls=2)
    best, settings = best_setting(times)
    for setting, seconds in times.items():
        record("evaluate settings of numpy", setting=setting, taken="yes" if setting == best else "", classes=classes,
               us_per_query=1e6 * seconds / 50)  # fmt: skip
    with loop_worker(tmp_path, part, settings) as worker:
        worker()
        cmc1, mean_ap = worker.result()
        assert np.mean(got.first_match[:part] == 0) == pytest.approx(cmc1, abs=2e-3)
        assert np.mean(got.average_precision[:part]) == pytest.approx(mean_ap, abs=1e-5)
        fns: dict[str, Callable[[], Any]] = {
            "fct.evaluate": lambda: fct.evaluate(x, x, labels, same_items=True, threads=threads, bootstrap=0),
            "fct.evaluate, 1000 resamples": lambda: fct.evaluate(x, x, labels, same_items=True, threads=threads),
            "numpy + scikit-learn loop": worker,
        }
        for name, timing in interleave(fns, rounds=3, pause=0.02).items():
            queries = part if name.startswith("numpy") else n
            record("evaluate", who=name, queries=queries, gallery=n, d=d, classes=classes, threads=threads,
                   us_per_query=1e6 * timing.median / queries, **timing_fields(timing, rows=queries))  # fmt: skip
