from __future__ import annotations

import os

# GPU kernels run in Triton's interpreter here; it must be chosen before the first import of triton.
os.environ["TRITON_INTERPRET"] = "1"

from collections import Counter

import hypothesis
import numpy as np
import pytest

# The same examples in every run, so that a clone that passed once passes again; look for new ones with
# `pytest --hypothesis-profile explore`.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``grid(n)`` every n-th case stays; the others are slow ones.

    n shares no factor with the numbers of values, so that each value of each parameter is among those that stay.
    """
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("grid")
        if mark is not None:
            name = item.nodeid.partition("[")[0]
            if seen[name] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
