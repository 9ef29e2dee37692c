"""Compiles the kernels for targets that are not in the room, and reads the machine code.

``python -m tools.machine_code [TARGET...]`` prints one JSON line per kernel, precision, target and gallery dtype:
registers, spilled bytes, shared memory, and the instructions that matter, in all and in the innermost loop that
multiplies. As many processes compile as there are processors, up to eight.
No GPU is needed; Triton's wheel carries ptxas and the disassembler. Not to be run with TRITON_INTERPRET set.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fct.kernels import search_kernels as search
from fct.kernels import transform_kernels as kernels
from fct.kernels.tile_choices import TARGETS, Tile, tiles

__all__ = ["GALLERY", "blocks_per_processor", "cases", "compile_case", "main", "read_sass"]

_TYPES = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "i8", "fp8": "fp8e4nv"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MMA = re.compile(r"(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTCHMMA|UTCIMMA|UTCQMMA)")
_SPECIAL = re.compile(r"(LDGSTS|UTMALDG|UBLKCP|LDL|STL)")
DIMS = {"d": 128, "hidden": 256, "branch": 256, "joined": 512, "inner": 2048, "d_new": 128}


# The gallery's dtypes: what an element is, and how its scale lies (kernels.transform's SCALE_*).
GALLERY = {"fp32": ("fp32", 0), "fp16": ("fp16", 0), "bf16": ("bf16", 0), "int8, one scale": ("i8", 1),
           "int8, scale a row": ("i8", 2), "int8, scale a dimension": ("i8", 3)}  # fmt: skip
Case = tuple[str, str, str, Tile, str]


def cases() -> Iterator[Case]:
    """(kernel, precision, target, tile, gallery): the paper's shape at 128 dimensions, the first choice of the table.

    Every kernel in every precision; those that read or write the gallery also in each of its dtypes.
    """
    for target in TARGETS:
        without_fp8 = target in ("sm_80", "sm_86", "gfx942")
        for kernel, width in (("branches", DIMS["branch"]), ("linear", DIMS["inner"]), ("final", DIMS["d_new"])):
            for precision in _TYPES:
                if precision == "fp8" and without_fp8:
                    continue
                tile = tiles(kernel, precision, target, width=width)[0]
                for gallery in GALLERY if kernel != "linear" and precision == "bf16" else ("fp32",):
                    yield kernel, precision, target, tile, gallery
        for precision in ("bf16", "int8"):
            for keep, width, queries in search.CASES[precision]:
                tile = search.tile(precision, keep, target, width=width, queries=queries)
                yield "scan", precision, target, tile, f"keep {keep}, {width} wide"
        for gallery in GALLERY:
            yield "rescore", "fp32", target, search.RESCORE, gallery
            yield "ingest", "bf16", target, Tile(32, 128, 0, 4, 1), gallery
            yield "normalise", "fp32", target, Tile(8, 512, 0, 8, 1), gallery


def _signature(
    kernel: str, precision: str, target: str, tile: Tile, gallery: str
) -> tuple[Any, dict[str, str], dict[str, Any]]:
    import triton.language as tl

    kind = _TYPES[precision]
    if kernel == "scan":
        keep, width = (int(x) for x in re.findall(r"\d+", gallery))
        return search.scan, *search.signature(kind, tile, keep, width)
    element, scale = GALLERY[gallery]
    if kernel == "rescore":
        return search.rescore, *search.rescore_signature(element, scale)
    exact = "ieee" if target.startswith("gfx") else "tf32x3"
    product = {"PRECISION": exact if precision == "fp32" else "ieee", "UPCAST": False}
    block = {"BM": tile.m, "BN": tile.n, "UPCAST": False}
    if kernel == "ingest":
        types = {"row0_ptr": "*i64", "n_rows": "i32", "x_ptr": f"*{element}", "scale_ptr": "*fp32", "stride_x": "i64",
                 "out_ptr": f"*{kind}", "stride_out": "i64"}  # fmt: skip
        return kernels.ingest, types, {"D": DIMS["d"], "PART": DIMS["d"], "SCALE": scale, "EXACT": True, **block}
    if kernel == "normalise":
        types = {"row0_ptr": "*i64", "n_rows": "i32", "y_ptr": "*fp32", "stride_y": "i64", "out_ptr": f"*{element}",
                 "out_scale_ptr": "*fp32", "stride_out": "i64"}  # fmt: skip
        return kernels.normalise, types, {"N": tile.n, "OUT_SCALE": scale, **block}
    if kernel == "branches":
        inner = "bf16" if precision in ("int8", "fp8") else kind
        types = {"row0_ptr": "*i64", "n_rows": "i32", "out_ptr": f"*{kind}", "stride_out": "i64", "next_ptr": "*fp32"}
        types |= {"shift_ptr": "*fp32"}
        constants: dict[str, Any] = {
            "COMPUTE": {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}[inner],
            "EXACT": precision != "fp32", "BM": tile.m, "BK": tile.k, "BH": tile.hidden, "BN": tile.n, **product,
        }  # fmt: skip
        for name in ("old", "side"):
            types |= {f"{name}_ptr": f"*{element}", f"{name}_scale_ptr": "*fp32", f"stride_{name}": "i64"}
            types |= {f"{name}_w1": "*fp32" if inner == "fp32" else "*bf16", f"{name}_w2": f"*{inner}"}
            types |= {f"{name}_b{i}": "*fp32" for i in (1, 2)}
            facts = {"D": 128, "PART": 128, "H": 256, "PITCH2": 256, "N": 256, "SCALE": scale, "RELU1": True,
                     "RELU2": True}  # fmt: skip
            constants |= {f"{name.upper()}_{k}": v for k, v in facts.items()}
        return kernels.branches, types, constants
    operand = (lambda rows: f"tensordesc<{kind}[{rows},{tile.k}]>") if tile.tma else (lambda rows: f"*{kind}")
    types = {"n_rows": "i32", "stride_a": "i64", "stride_w": "i64", "stride_out": "i64", "scale_ptr": "*fp32",
             "bias_ptr": "*fp32", "a_ptr": operand(tile.m), "w_ptr": operand(tile.n)}  # fmt: skip
    constants = {"K": DIMS["inner"], "SCALED": precision in ("int8", "fp8"), "INT8": precision == "int8",
                 "BM": tile.m, "BN": tile.n, "BK": tile.k, "TMA": tile.tma, **product}  # fmt: skip
    if kernel == "linear":
        types |= {"next_ptr": "*fp32", "shift_ptr": "*fp32", "out_ptr": f"*{kind}"}
        return kernels.linear, types, constants | {"N": DIMS["inner"], "RELU": True, "GROUP": 8}
    types |= {"row0_ptr": "*i64", "out_ptr": f"*{element}", "out_scale_ptr": "*fp32"}
    return kernels.final, types, constants | {"N": DIMS["d_new"], "RELU": False, "NORMALISE": True, "OUT_SCALE": scale}


def compile_case(kernel: str, precision: str, target: str, tile: Tile, gallery: str = "fp32") -> dict[str, Any]:
    """Compiles one case and says what came out; nothing is launched."""
    function, types, constants = _signature(kernel, precision, target, tile, gallery)
    signature = {n: types.get(n, "constexpr") for n in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(function.arg_names)
        if n in types and n not in ("n_rows", "n_q", "n_g", "splits", "count") and not types[n].startswith("tensordesc")
    }
    amd = target.startswith("gfx")
    place = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    built = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=place,
        options={"num_warps": tile.warps, "num_stages": min(tile.stages, 2) if amd else tile.stages},
    )
    facts: dict[str, Any] = {"kernel": kernel, "precision": precision, "target": target, "tile": vars(tile)}
    facts |= {"gallery": gallery, "shared": int(built.metadata.shared)}
    if amd:
        text = built.asm["amdgcn"]
        spills = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)
        matrix = dict(Counter(re.findall(r"v_mfma_\w+", text)))
        return facts | {"spilled": sum(map(int, spills)), "special": {}, "matrix": matrix}
    (found,) = read_sass(built.asm["cubin"]).values()
    return facts | found


def read_sass(cubin: bytes) -> dict[str, dict[str, Any]]:
    """Of each function: registers, spilled (bytes of stack), static_shared (bytes), matrix and special instructions,
    and ``loop``: the multiplying loop's matrix instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", "-ndf", file.name)  # no dataflow analysis: the same text, in less time
    texts = dict(re.findall(r"\.section\s+\.text\.(\S+?),.*?\n(.*?)(?=\n\s*\.section\s|\Z)", sass, re.DOTALL))
    resources = re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage)
    return {name: _function(texts[name], line) for name, line in resources}


def _function(sass: str, usage: str) -> dict[str, Any]:
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
    used = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return {
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "static_shared": used["SHARED"],
        "matrix": dict(Counter(_name(t) for _, t in lines if _MMA.search(t))),
        "special": dict(Counter(m[0] for _, t in lines if (m := _SPECIAL.search(t)))),
        "loop": dict(Counter(_name(t) for at, t in lines if _MMA.search(t) and low <= at <= high)),
    }


def _name(text: str) -> str:
    found = re.search(r"\b[A-Z]\w*MMA[\w.]*", text)
    return found[0] if found else text


def blocks_per_processor(registers: int, threads: int, shared: int, target: str) -> int:
    """Blocks that one multiprocessor runs at once (CUDA programming guide, table of compute capabilities)."""
    from fct.kernels.tile_choices import SHARED_MEMORY, family

    place = family(target)
    most_threads = 1536 if place in ("sm_86", "sm_89") else 2048
    whole = SHARED_MEMORY[place] + 1024  # a block is charged 1 KiB besides its own
    warps = -(-threads // 32)
    of_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    return min(of_registers, most_threads // threads, whole // (shared + 1024), 32)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _row(case: Case) -> dict[str, Any]:
    try:
        return compile_case(*case)
    except Exception as error:  # a target that the compiler refuses is a row too
        kernel, precision, target, tile, gallery = case
        facts = {"kernel": kernel, "precision": precision, "target": target, "tile": vars(tile), "gallery": gallery}
        facts["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        return facts


def main() -> None:
    wanted = [case for case in cases() if len(sys.argv) < 2 or case[2] in sys.argv[1:]]
    workers = min(8, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for facts in pool.map(_row, wanted):
            sys.stdout.write(json.dumps(facts) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
