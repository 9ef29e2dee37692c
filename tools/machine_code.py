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
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton
from triton._utils import find_paths_if, get_iterable_path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fct.artifact.layers import Layer
from fct.artifact.transformation import Transformation
from fct.fit.precision_choice import calibrate
from fct.kernels import search_kernels as search
from fct.kernels.tile_choices import TARGETS, Tile
from fct.ops.device.state import Device
from fct.ops.transform.triton_backend import run_chunks
from fct.ops.transform.triton_weights import pack
from fct.rows import Rows

__all__ = ["GALLERY", "blocks_per_processor", "cases", "compile_case", "main", "read_sass"]

_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "bf16": "bf16", "int8": "i8"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MMA = re.compile(r"(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTCHMMA|UTCIMMA|UTCQMMA)")
_SPECIAL = re.compile(r"(LDGSTS|UTMALDG|UBLKCP|LDL|STL)")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
# The gallery's dtypes: of the elements, and the shape of an int8 scale for n rows of d dimensions.
GALLERY = {"fp32": ("float32", None), "fp16": ("float16", None), "bf16": ("bfloat16", None),
           "int8, one scale": ("int8", lambda n, d: (1, 1)), "int8, scale a row": ("int8", lambda n, d: (n, 1)),
           "int8, scale a dimension": ("int8", lambda n, d: (1, d))}  # fmt: skip
ROWS = 1 << 16
SMALL = "of a small h"  # branches of one layer, 128 wide, a mixer of one block of 512, a skip
Case = tuple[str, str, str, str]


def cases() -> Iterator[Case]:
    """(kernel, precision, target, gallery): the paper's shape at 128 dimensions and a small one, the first choice of
    the table.

    Every kernel in every precision; those that read or write the gallery also in each of its dtypes.
    """
    for target in TARGETS:
        without_fp8 = target in ("sm_80", "sm_86", "gfx942")
        for kernel in ("branches", "linear", "final", "first_layers", f"linear {SMALL}", f"final {SMALL}"):
            for precision in PRECISIONS:
                if precision == "fp8" and without_fp8:
                    continue
                several = "linear" not in kernel and SMALL not in kernel and precision == "bf16"
                for gallery in GALLERY if several else ("fp32",):
                    yield kernel, precision, target, gallery
        for precision in ("bf16", "int8"):
            for keep, width, queries in search.CASES[precision]:
                yield "scan", precision, target, f"keep {keep}, {width} wide, {queries} queries"
        for gallery in GALLERY:
            yield "rescore", "fp32", target, gallery
            yield "ingest", "bf16", target, gallery
            yield "normalise", "fp32", target, gallery


@dataclass(frozen=True)
class Launched:
    """A kernel and all that it is launched with."""

    kernel: Any
    arguments: dict[str, Any]
    warps: int
    stages: int


class Recorder(Device):
    """A device without memory of its own, for whose target kernels are compiled: notes what would be launched."""

    def __init__(self, target: str) -> None:
        self.name, self.index, self.model, self.target = "meta", 0, f"no {target}", target
        self.processors, self.l2_bytes, self.memory = 108, 40 << 20, 1 << 40
        self.launches: list[Launched] = []

    def launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, object], *, warps: int, stages: int
    ) -> None:
        self.launches.append(Launched(kernel, dict(arguments), warps, stages))

    def rows(self, d: int, gallery: str) -> Rows:
        dtype, scale_of = GALLERY[gallery]
        scale = None if scale_of is None else self.empty(scale_of(ROWS, d), "float32")
        return Rows(self.empty((ROWS, d), dtype), dtype, scale, "cuda:0", "torch")


def _launched(kernel: str, precision: str, target: str, gallery: str) -> Launched:
    """The last launch of the kernel, as the backend makes it for an h whose plan has the kernel."""
    device, name = Recorder(target), kernel.split()[0]
    h = Transformation.random(128, 128, 512 if kernel == "normalise" else 128, inner=2048, normalise=True)
    if kernel == "ingest":
        h = h.with_(old=(*h.old, Layer(np.eye(256), np.zeros(256))))
    if kernel == "first_layers" or SMALL in kernel:
        h = Transformation.random(128, 128, 128, inner=512, normalise=True, branch=128, blocks=1, skip=True)
        h = h.with_(length=0.995)
    h = calibrate(h, *np.random.default_rng(0).standard_normal((2, 64, 128), dtype=np.float32))
    packed = pack(h, precision, device)
    run_chunks(packed, *(device.rows(d, gallery) for d in (h.d_old, h.d_side, h.d_new)), chunk=ROWS)
    return [found for found in device.launches if found.kernel.fn.__name__ == name][-1]


def compile_case(kernel: str, precision: str, target: str, gallery: str = "fp32") -> dict[str, Any]:
    """Compiles one case and says what came out; nothing is launched."""
    if kernel in ("scan", "rescore"):
        return _compile_search(kernel, precision, target, gallery)
    found = _launched(kernel, precision, target, gallery)
    function, backend = found.kernel, make_backend(_gpu(target))
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, special, _ = bind(**found.arguments)
    # what Triton's own launch makes of them (JITFunction._pack_args)
    types, hints = [x[0] for x in special], ["" if x[0] == "constexpr" else x[1] for x in special]
    values = list(bound.values())
    constants = {at: get_iterable_path(values, at) for at in find_paths_if(types, lambda _, x: x == "constexpr")}
    hinted = find_paths_if(hints, lambda _, x: isinstance(x, str))
    attributes = {at: backend.parse_attr(get_iterable_path(hints, at)) for at in hinted}
    source = ASTSource(function, dict(zip(bound, types, strict=True)), constants, attributes)
    tile = found.arguments["TILE"]
    return _facts(kernel, precision, target, gallery, tile, source, found.warps, found.stages)


def _compile_search(kernel: str, precision: str, target: str, gallery: str) -> dict[str, Any]:
    if kernel == "rescore":
        tile, function = search.RESCORE, search.rescore
        element, scale = GALLERY[gallery]
        mode = 0 if scale is None else 1 + [(1, 1), (2, 1), (1, 2)].index(scale(2, 2))
        types, constants = search.rescore_signature(_TYPES[element], mode)
    else:
        keep, width, queries = (int(x) for x in re.findall(r"\d+", gallery))
        tile, function = search.tile(precision, keep, target, width=width, queries=queries), search.scan
        types, constants = search.signature(_TYPES[precision], tile, keep, width)
    signature = {n: types.get(n, "constexpr") for n in function.arg_names}
    leaves = find_paths_if(list(signature.values()), lambda _, x: x not in ("constexpr", "i32"))
    given: dict[Any, Any] = {(function.arg_names.index(n),): value for n, value in constants.items()}
    given |= dict.fromkeys(find_paths_if(list(types.values()), lambda _, x: x == "constexpr"))
    source = ASTSource(function, signature, given, {at: [["tt.divisibility", 16]] for at in leaves})
    return _facts(kernel, precision, target, gallery, tile, source, tile.warps, tile.stages)


def _gpu(target: str) -> GPUTarget:
    return GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)


def _facts(
    kernel: str, precision: str, target: str, gallery: str, tile: Tile, source: ASTSource, warps: int, stages: int
) -> dict[str, Any]:
    amd = target.startswith("gfx")
    options = {"num_warps": warps, "num_stages": min(stages, 2) if amd else stages}
    built = triton.compile(source, target=_gpu(target), options=options)
    facts: dict[str, Any] = {"kernel": kernel, "precision": precision, "target": target, "tile": tile._asdict()}
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
        facts: dict[str, Any] = dict(zip(("kernel", "precision", "target", "gallery"), case, strict=True))
        return facts | {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def main() -> None:
    wanted = [case for case in cases() if len(sys.argv) < 2 or case[2] in sys.argv[1:]]
    workers = min(8, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for facts in pool.map(_row, wanted):
            sys.stdout.write(json.dumps(facts) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
