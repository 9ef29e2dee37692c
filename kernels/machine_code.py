"""Compiles the kernels for targets that are not in the room, and reads the machine code.

``python -m fct.kernels.machine_code [TARGET...]`` prints one JSON line per kernel,
precision and target: registers, spilled
bytes, shared memory, and the instructions that matter, in all and in the innermost loop that multiplies.
No GPU is needed; Triton's wheel carries ptxas and the disassembler. Not to be run with TRITON_INTERPRET set.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from fct.kernels import topk as search
from fct.kernels import transform as kernels
from fct.kernels.configs import TARGETS, Tile, tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = ["cases", "compile_case", "main", "read_sass"]

_TYPES = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "i8", "fp8": "fp8e4nv"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MMA = re.compile(r"(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTCHMMA|UTCIMMA|UTCQMMA)")
_SPECIAL = re.compile(r"(LDGSTS|UTMALDG|UBLKCP|LDL|STL)")
DIMS = {"d": 128, "hidden": 256, "branch": 256, "joined": 512, "inner": 2048, "d_new": 128}


def cases() -> Iterator[tuple[str, str, str, Tile]]:
    """(kernel, precision, target, tile): the paper's shape at 128 dimensions, the first choice of the table."""
    for target in TARGETS:
        for kernel, width in (("branches", DIMS["branch"]), ("linear", DIMS["inner"]), ("final", DIMS["d_new"])):
            for precision in _TYPES:
                eight_bit = precision in ("int8", "fp8")
                if kernel == "branches" and eight_bit:
                    continue  # the branches compute in bfloat16
                if precision == "fp8" and target in ("sm_80", "sm_86", "gfx942"):
                    continue
                yield kernel, precision, target, tiles(kernel, precision, target, width=width)[0]
        for precision in ("fp32", "bf16"):
            yield "scan", precision, target, search.tile(precision)


def _signature(kernel: str, precision: str, target: str, tile: Tile) -> tuple[Any, dict[str, str], dict[str, Any]]:
    import triton.language as tl

    kind = _TYPES[precision]
    exact = "ieee" if target.startswith("gfx") else "tf32x3"
    product = {"PRECISION": exact if precision == "fp32" else "ieee", "UPCAST": False}
    if kernel == "scan":
        return search.scan, *search.signature(kind, tile, product)
    if kernel == "branches":
        types = {"row0_ptr": "*i64", "n_rows": "i32", "out_ptr": f"*{kind}", "stride_out": "i64", "next_ptr": "*fp32"}
        constants: dict[str, Any] = {
            "COMPUTE": {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}[precision],
            "BM": tile.m, "BK": tile.k, "BH": tile.hidden, "BN": tile.n, **product,
        }  # fmt: skip
        for name in ("old", "side"):
            types |= {f"{name}_ptr": "*fp32", f"{name}_scale_ptr": "*fp32", f"stride_{name}": "i64"}
            types |= {f"{name}_w{i}": f"*{kind}" for i in (1, 2)} | {f"{name}_b{i}": "*fp32" for i in (1, 2)}
            facts = {"D": 128, "PITCH1": 128, "H": 256, "PITCH2": 256, "N": 256, "SCALE": 0, "RELU1": True,
                     "RELU2": True}  # fmt: skip
            constants |= {f"{name.upper()}_{k}": v for k, v in facts.items()}
        return kernels.branches, types, constants
    operand = (lambda rows: f"tensordesc<{kind}[{rows},{tile.k}]>") if tile.tma else (lambda rows: f"*{kind}")
    types = {"n_rows": "i32", "stride_a": "i64", "stride_w": "i64", "stride_out": "i64", "scale_ptr": "*fp32",
             "bias_ptr": "*fp32", "a_ptr": operand(tile.m), "w_ptr": operand(tile.n)}  # fmt: skip
    constants = {"K": DIMS["inner"], "SCALED": precision in ("int8", "fp8"), "INT8": precision == "int8",
                 "BM": tile.m, "BN": tile.n, "BK": tile.k, "TMA": tile.tma, **product}  # fmt: skip
    if kernel == "linear":
        types |= {"next_ptr": "*fp32", "out_ptr": f"*{kind}"}
        return kernels.linear, types, constants | {"N": DIMS["inner"], "RELU": True, "GROUP": 8}
    types |= {"row0_ptr": "*i64", "out_ptr": "*fp32", "out_scale_ptr": "*fp32"}
    return kernels.final, types, constants | {"N": DIMS["d_new"], "RELU": False, "NORMALISE": True, "OUT_SCALE": 0}


def compile_case(kernel: str, precision: str, target: str, tile: Tile) -> dict[str, Any]:
    """Compiles one case and says what came out; nothing is launched."""
    function, types, constants = _signature(kernel, precision, target, tile)
    signature = {n: types.get(n, "constexpr") for n in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(function.arg_names)
        if n in types and n != "n_rows" and not types[n].startswith("tensordesc")
    }
    amd = target.startswith("gfx")
    place = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    built = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=place,
        options={"num_warps": tile.warps, "num_stages": min(tile.stages, 2) if amd else tile.stages},
    )
    facts: dict[str, Any] = {"kernel": kernel, "precision": precision, "target": target, "tile": vars(tile)}
    facts["shared"] = int(built.metadata.shared)
    if amd:
        text = built.asm["amdgcn"]
        spills = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)
        return facts | {"spilled": sum(map(int, spills)), "matrix": dict(Counter(re.findall(r"v_mfma_\w+", text)))}
    return facts | read_sass(built.asm["cubin"])


def read_sass(cubin: bytes) -> dict[str, Any]:
    """registers, spilled (bytes of stack), matrix and special instructions, and ``loop``: the multiplying loop's."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    lines: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            pending.append(label[1])
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            at = int(found[1], 16)
            labels |= dict.fromkeys(pending, at)
            pending = []
            lines.append((at, found[2]))
    jumps = []
    for at, text in lines:
        if (jump := re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", text)) and labels.get(jump[1], at + 1) <= at:
            jumps.append((labels[jump[1]], at))
    multiplying = [at for at, text in lines if _MMA.search(text)]
    loops = [(b - a, a, b) for a, b in jumps if any(a <= m <= b for m in multiplying)]
    _, low, high = min(loops, default=(0, 0, 1 << 40))
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "spilled": int(re.findall(r"STACK:(\d+)", usage)[-1]) + int(re.findall(r"LOCAL:(\d+)", usage)[-1]),
        "matrix": dict(Counter(_name(t) for _, t in lines if _MMA.search(t))),
        "special": dict(Counter(m[0] for _, t in lines if (m := _SPECIAL.search(t)))),
        "loop": dict(Counter(_name(t) for at, t in lines if _MMA.search(t) and low <= at <= high)),
    }


def _name(text: str) -> str:
    found = re.search(r"\b[A-Z]\w*MMA[\w.]*", text)
    return found[0] if found else text


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    for case in cases():
        if len(sys.argv) > 1 and case[2] not in sys.argv[1:]:
            continue
        try:
            facts = compile_case(*case)
        except Exception as error:  # a target that the compiler refuses is a row too
            kernel, precision, target, tile = case
            facts = {"kernel": kernel, "precision": precision, "target": target, "tile": vars(tile)}
            facts["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
