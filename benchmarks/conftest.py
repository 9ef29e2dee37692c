"""What every benchmark shares: the machine's peaks, interleaved timing, and rows that say where they come from.

``pytest benchmarks/`` measures and writes ``benchmarks/report/``; ``--full`` runs the whole sweeps. A test first
checks that everybody's results are equal, then times them turn by turn (fct.bench.measure.interleave), then
records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reporting

from fct.bench.measure import Peaks, measure_peaks
from fct.ops.processors import default_threads

REPORT = Path(__file__).parent / "report"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fct")
    group.addoption("--full", action="store_true", help="Run the whole sweeps (an hour), not the ten-minute ones.")
    group.addoption("--report", default=str(REPORT), help="Folder for results.json, results.md and the plots.")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def threads() -> int:
    """FCT_NUM_THREADS or all processors; peers get the same number."""
    import torch

    count = default_threads()
    torch.set_num_threads(count)
    return count


@pytest.fixture(scope="session")
def peaks(threads: int, record: Callable[..., None]) -> Peaks:
    found = measure_peaks(threads)
    for (isa, precision), ops in found.by_isa.items():
        record("peaks", what=f"{precision} multiply-add, {isa}", threads=threads, gflops=ops / 1e9)
    record("peaks", what="memory reads (1 GB)", threads=threads, gb_per_s=found.memory / 1e9)
    record("peaks", what="cache reads (12 MB)", threads=threads, gb_per_s=found.l3 / 1e9)
    return found


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """``record(table, **fields)``: one row, saved with those before it, so that a run cut short leaves what it has;
    other tables are kept. The plots come at the end."""
    context = reporting.context(request.config.invocation_params.args)
    folder = Path(request.config.getoption("--report"))
    rows: list[dict[str, Any]] = []

    def add(table: str, **fields: Any) -> None:
        rows.append({"table": table, **fields, "context": context})
        reporting.save(rows, folder)

    yield add
    if rows:
        for path in reporting.write(rows, folder):
            print(f"\nwrote {path}")
