"""The kernels' own source under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, in the emulator."""

from __future__ import annotations

import cuda_support as support
import pytest

pytestmark = pytest.mark.slow


@support.needs_cxx
@pytest.mark.parametrize("schedule", [1, 2, 3])
@pytest.mark.parametrize("half", ["TOPK", "TRANSFORM"])
def test_address_and_undefined_behaviour(half: str, schedule: int) -> None:
    done = support.drive(support.driver(half, "asan"), "all", schedule)
    assert done.returncode == 0, done.stdout + done.stderr


@support.needs_cxx
@pytest.mark.parametrize("half, case", [("TOPK", "small"), ("TOPK", "equal-pair"), ("TRANSFORM", "small")])
def test_threads(half: str, case: str) -> None:
    done = support.drive(support.driver(half, "tsan"), case, 1)
    assert done.returncode == 0, done.stdout + done.stderr
