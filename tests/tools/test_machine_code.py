"""Machine code of the Triton kernels for targets not in the room. Another process compiles; nothing is launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from fct.kernels.tile_choices import SHARED_MEMORY, TARGETS, family, tiles

# The tensor-core instruction of each target and precision, as the disassembler spells it.
MATRIX = {
    ("sm_80", "bf16"): "HMMA.16816.F32.BF16", ("sm_80", "fp16"): "HMMA.16816.F32",
    ("sm_80", "fp32"): "HMMA.1688.F32.TF32",
    ("sm_80", "int8"): "IMMA.16832.S8.S8", ("sm_90", "bf16"): "HGMMA.64x", ("sm_90", "fp16"): "HGMMA.64x",
    ("sm_90", "fp32"): "HGMMA.64x", ("sm_90", "int8"): "IGMMA.64x", ("sm_90", "fp8"): "QGMMA.64x",
    ("sm_100", "bf16"): "UTCHMMA", ("sm_100", "fp16"): "UTCHMMA", ("sm_100", "fp32"): "UTCHMMA",
    ("sm_100", "int8"): "UTCIMMA", ("sm_100", "fp8"): "UTCQMMA",
    ("sm_89", "fp8"): "QMMA.16832.F32.E4M3.E4M3", ("gfx942", "bf16"): "v_mfma_f32", ("gfx942", "fp16"): "v_mfma_f32",
    ("gfx942", "fp32"): "v_mfma_f32", ("gfx942", "int8"): "v_mfma_i32",
}  # fmt: skip
MATRIX |= {(t, p): MATRIX["sm_80", p] for t in ("sm_86", "sm_89") for p in ("bf16", "fp16", "fp32", "int8")}
# What runs on plain cores by design: rows are moved, or summed in float64 (rescore).
NO_PRODUCT = ("ingest", "normalise", "rescore")
# Hopper's wgmma takes 64 rows at least: what works on fewer (fp32 branches, few queries) stays on mma.sync there.
NO_COPIES = {("branches", "fp32", "sm_90")}  # its operands are split into three TF32 parts on their way


def compiled_for(*targets: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "tools.machine_code", *targets],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return [json.loads(line) for line in ran.stdout.splitlines()]


def check(facts: dict[str, Any]) -> list[str]:
    """What is wrong with one kernel's machine code."""
    kernel, precision, target = facts["kernel"], facts["precision"], facts["target"]
    name = f"{kernel} {precision} {target} ({facts['gallery']})"
    if "error" in facts:
        return [f"{name}: {facts['error']}"]
    wrong = []
    if facts["spilled"] or {"LDL", "STL"} & set(facts["special"]):
        wrong.append(f"{name}: {facts['spilled']} bytes spilled, {facts.get('registers')} registers")
    if facts["shared"] > SHARED_MEMORY[target]:
        wrong.append(f"{name}: {facts['shared']} bytes of shared memory, {target} has {SHARED_MEMORY[target]}")
    if kernel in NO_PRODUCT:
        return wrong
    if not facts["matrix"]:
        wrong.append(f"{name}: no tensor-core instruction")
    if kernel.split()[0] in ("linear", "final"):
        want = MATRIX[target, precision]
        if not any(want in found for found in facts["loop" if "loop" in facts else "matrix"]):
            wrong.append(f"{name}: expected {want} in the inner loop, got {facts.get('loop')}")
    if target.startswith("sm_") and (kernel, precision, target) not in NO_COPIES:
        copies = "UTMALDG" if facts["tile"]["tma"] else "LDGSTS"
        if copies not in facts["special"]:
            wrong.append(f"{name}: expected asynchronous copies ({copies}), got {facts['special']}")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_spill_and_tensor_cores(target: str) -> None:
    compiled = compiled_for(target)
    wrong = [line for facts in compiled for line in check(facts)]
    assert not wrong, "\n".join(wrong)
    # branches and final in each of six gallery dtypes in bf16, and at fp32 rows in the other precisions
    others = 4 if ("fp8" in {f["precision"] for f in compiled}) else 3
    want = {"scan": 18, **dict.fromkeys(("rescore", "ingest", "normalise"), 6)}
    want |= dict.fromkeys(("branches", "final", "first_layers"), 6 + others)
    want |= dict.fromkeys(("linear", "linear of a small h", "final of a small h"), 1 + others)
    assert Counter(f["kernel"] for f in compiled) == want
    assert (others == 4) == (target in ("sm_89", "sm_90", "sm_100"))


def test_the_checker_rejects() -> None:
    good = {
        "kernel": "linear", "precision": "bf16", "target": "sm_80", "gallery": "fp32", "spilled": 0, "registers": 9,
        "shared": 1000, "matrix": {"HMMA.16816.F32.BF16": 1}, "loop": {"HMMA.16816.F32.BF16": 1},
        "special": {"LDGSTS": 1}, "tile": {"tma": False},
    }  # fmt: skip
    assert check(good) == []
    for change, said in (
        ({"spilled": 8}, "8 bytes spilled"),
        ({"special": {"LDGSTS": 1, "LDL": 1}}, "spilled"),
        ({"shared": 1 << 20}, "bytes of shared memory"),
        ({"loop": {"HMMA.16816.F32": 1}}, "expected HMMA.16816.F32.BF16"),
        ({"matrix": {}, "loop": {}}, "no tensor-core instruction"),
        ({"special": {}}, "asynchronous copies"),
        ({"error": "refused"}, "refused"),
    ):
        assert any(said in line for line in check(good | change)), change


@pytest.mark.slow
def test_why_fp8_is_offered_from_sm_89_on() -> None:
    """The compiler's own reason, so that the table of precisions changes when the compiler does."""
    code = (
        "from tools.machine_code import compile_case\n"
        "for target in ('sm_80', 'sm_86'):\n"
        "    try:\n        compile_case('linear', 'fp8', target)\n"
        "    except Exception as error:\n        print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.count("fp8e4nv not supported in this architecture") == 2, ran.stdout


def test_table_is_pruned_by_shared_memory() -> None:
    for target in TARGETS:
        for kernel in ("branches", "first_layers", "linear", "final"):
            for precision in ("fp32", "bf16"):
                for width in (1, 17, 128, 256):
                    assert tiles(kernel, precision, target, width=width)
    assert family("sm_87") == "sm_86"
    assert family("sm_103") == "sm_100"
    assert family("sm_120") == "sm_89"
    with pytest.raises(ValueError, match="kernel: expected branches, first_layers, linear or final, got 'x'"):
        tiles("x", "bf16", "sm_80", width=8)
