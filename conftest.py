"""For tests and benchmarks alike: what is marked ``gpu`` is skipped, with the reason, where no GPU can run; what is
marked ``slow`` may warn."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):  # Ray, Spark and others start processes; what they say is shown, no error
            item.add_marker(pytest.mark.filterwarnings("default", "error::fct.FctWarning"), append=False)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from fct.ops.device.state import why_no_gpu

    why = why_no_gpu("cuda:0")
    if why:  # these measure silicon; the code that they run is tested on a stand-in by tests/test_gpu_benchmark.py
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no GPU to run on: " + "; ".join(why)))
