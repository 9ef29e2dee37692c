"""Machine code of the Triton kernels for targets not in the room. One process compiles; nothing is launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from fct.kernels.configs import SHARED_MEMORY, TARGETS, family, tiles

# The tensor-core instruction of each target and precision, as the disassembler spells it.
MATRIX = {
    ("sm_80", "bf16"): "HMMA.16816.F32.BF16", ("sm_80", "fp16"): "HMMA.16816.F32",
    ("sm_80", "fp32"): "HMMA.1688.F32.TF32",
    ("sm_80", "int8"): "IMMA.16832.S8.S8", ("sm_90", "bf16"): "HGMMA.64x", ("sm_90", "fp16"): "HGMMA.64x",
    ("sm_90", "fp32"): "HGMMA.64x", ("sm_90", "int8"): "IGMMA.64x", ("sm_90", "fp8"): "QGMMA.64x",
    ("sm_100", "bf16"): "UTCHMMA", ("sm_100", "fp16"): "UTCHMMA", ("sm_100", "fp32"): "UTCHMMA",
    ("sm_100", "int8"): "UTCIMMA", ("sm_100", "fp8"): "UTCQMMA",
}  # fmt: skip


@pytest.fixture(scope="session", params=["sm_80", "sm_90", "sm_100"])
def compiled(request: Any) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "fct.kernels.machine_code", request.param],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.slow
def test_no_spill_and_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    wrong = []
    for facts in compiled:
        name = f"{facts['kernel']} {facts['precision']} {facts['target']}"
        if "error" in facts:
            wrong.append(f"{name}: {facts['error']}")
            continue
        target = facts["target"]
        if facts["spilled"] or {"LDL", "STL"} & set(facts["special"]):
            wrong.append(f"{name}: {facts['spilled']} bytes spilled, {facts['registers']} registers")
        if facts["shared"] > SHARED_MEMORY[target]:
            wrong.append(f"{name}: {facts['shared']} bytes of shared memory, {target} has {SHARED_MEMORY[target]}")
        if facts["kernel"] == "linear":
            want = MATRIX[target, facts["precision"]]
            if not any(want in found for found in facts["loop"]):
                wrong.append(f"{name}: expected {want} in the inner loop, got {facts['loop']}")
            copies = "UTMALDG" if facts["tile"]["tma"] else "LDGSTS"
            if copies not in facts["special"]:
                wrong.append(f"{name}: expected asynchronous copies ({copies}), got {facts['special']}")
        elif not facts["matrix"]:
            wrong.append(f"{name}: no tensor-core instruction")
    assert len(compiled) >= 12
    assert not wrong, "\n".join(wrong)


def test_table_is_pruned_by_shared_memory() -> None:
    for target in TARGETS:
        for kernel in ("branches", "linear", "final"):
            for precision in ("fp32", "bf16"):
                for width in (1, 17, 128, 256):
                    assert tiles(kernel, precision, target, width=width)
    assert family("sm_87") == "sm_86"
    assert family("sm_103") == "sm_100"
    assert family("sm_120") == "sm_89"
    with pytest.raises(ValueError, match="kernel: expected branches, linear or final, got 'x'"):
        tiles("x", "bf16", "sm_80", width=8)
