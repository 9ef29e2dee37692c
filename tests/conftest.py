from __future__ import annotations

import os

# GPU kernels run in Triton's interpreter here; it must be chosen before the first import of triton.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
