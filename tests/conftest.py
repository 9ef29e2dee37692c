from __future__ import annotations

import os

# GPU kernels run in Triton's interpreter here; it must be chosen before the first import of triton.
os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import numpy as np
import pytest

# The same examples in every run, so that a clone that passed once passes again; look for new ones with
# `pytest --hypothesis-profile explore`.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile("same")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
