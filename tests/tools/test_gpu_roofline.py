"""Counting operations from instruction names."""

from __future__ import annotations

import pytest

from tools.gpu_roofline import issued_per_iteration

TILE = {"m": 128, "n": 256, "k": 64, "warps": 8}
NEEDED = 2 * 128 * 256 * 64


@pytest.mark.parametrize(
    "loop", [{"HMMA.16816.F32.BF16": 128}, {"HGMMA.64x256x16.F32.BF16": 4}, {"UTCHMMA": 4}]
)  # as the compiler emitted them for sm_80, sm_90 and sm_100
def test_instructions_add_up_to_the_tile(loop: dict[str, int]) -> None:
    assert issued_per_iteration({"tile": TILE, "precision": "bf16", "loop": loop}) == NEEDED


def test_an_unknown_instruction_is_refused() -> None:
    with pytest.raises(ValueError, match="known shape, got 'HMMA'"):
        issued_per_iteration({"tile": TILE, "precision": "bf16", "loop": {"HMMA": 1}})
