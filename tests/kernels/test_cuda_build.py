"""What the build made: machine code inspected for real targets, and answers on a machine without a driver."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cuda_support as support
import pytest

from fct import _C
from fct.ops.device.cuda_runtime import CudaRuntime

ARCHITECTURES = ["80", "89", "90a", "100"]


def _tool(name: str) -> str | None:
    found = shutil.which(name)
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.exists() else None


CUOBJDUMP = _tool("cuobjdump")
pytestmark = [support.needs_nvcc, pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump (CUDA toolkit or triton)")]

# kernel -> (registers for the intended blocks per multiprocessor, at most; instructions that must be there)
EXPECTED = {
    r"scan.*ShadowE0.*": (255, {"HMMA", "LDSM", "LDGSTS"}),
    r"scan.*ShadowE1.*": (255, {"IMMA", "LDSM", "LDGSTS"}),
    r"scan.*ILi1ELi1ELi4ELi6E.*": (96, set()),
    r"transform_small.*": (128, {"HMMA", "LDSM", "LDGSTS"}),
    r"rescore.*|exact_scan.*|make_shadow.*|select_keys.*|finish.*|merge_parts.*|convert_rows.*": (64, set()),
}


def usage(source: str, architecture: str) -> dict[str, dict[str, int]]:
    text = subprocess.run(
        [str(CUOBJDUMP), "--dump-resource-usage", str(support.cubin(source, architecture))],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text)
    return {name: {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)} for name, line in found}


def sass(source: str, architecture: str) -> dict[str, Counter[str]]:
    """Per kernel, how often each instruction stands in the machine code, by its name and by its name with widths."""
    text = subprocess.run(
        [str(CUOBJDUMP), "-sass", str(support.cubin(source, architecture))], capture_output=True, text=True, check=True
    ).stdout
    counts: dict[str, Counter[str]] = {}
    for part in re.split(r"Function : ", text)[1:]:
        name = part.split(None, 1)[0]
        ops = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", part)
        counts[name] = Counter(ops) + Counter(op.split(".")[0] for op in ops if "." in op)
    return counts


# Disassembling takes six seconds a file: one architecture stands for the others until the slow tests are run.
@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=[pytest.mark.slow] if a != "90a" else []) for a in ARCHITECTURES]
)
@pytest.mark.parametrize("source", ["topk", "transform"])
def test_machine_code(source: str, architecture: str) -> None:
    resources, instructions = usage(source, architecture), sass(source, architecture)
    assert set(resources) == set(instructions)
    assert len(resources) == {"topk": 15, "transform": 5}[source]
    for kernel, used in resources.items():
        count = instructions[kernel]
        assert used["STACK"] == used["LOCAL"] == 0, (kernel, used)
        assert count["LDL"] == count["STL"] == 0, kernel
        matched = [(ceiling, ops) for pattern, (ceiling, ops) in EXPECTED.items() if re.search(pattern, kernel)]
        assert matched, kernel
        for ceiling, ops in matched:
            assert used["REG"] <= ceiling, (kernel, used)
            assert ops <= set(count), (kernel, ops - set(count))
        if "LDGSTS" in count:  # every copy to shared memory moves 16 bytes past the registers
            assert count["LDGSTS"] == sum(n for op, n in count.items() if op.startswith("LDGSTS.") and ".128" in op), (
                kernel
            )


def test_the_module_answers_without_a_driver() -> None:
    why = CudaRuntime().why_not()
    if _C.cuda_why_not:
        assert why == [_C.cuda_why_not]
    elif why:
        assert re.search("no CUDA driver|no CUDA device|too old|torch sees no CUDA device", why[0])


def test_import_touches_no_driver() -> None:
    code = "import fct, sys; fct.build_info; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_blocks_a_multiprocessor(architecture: str) -> None:
    """What the kernels' launch bounds and the search's plan count on, at 128 dimensions."""
    from fct.kernels.tile_choices import SHARED_MEMORY
    from tools.machine_code import blocks_per_processor

    target = "sm_" + architecture.rstrip("a")
    module = support.module()
    # pattern -> shared memory, blocks that must fit; the small transformation is launched with one a multiprocessor
    small = 6 * (64 + 16) * 72 * 2 + 64 * 16 * 4
    wanted = {r"transform_smallILi4E": (small, 1 if target == "sm_89" else 2)}
    for kind, pitch in ((0, 256), (1, 128)):
        zeros = dict.fromkeys(
            ("query_shadow", "query_meta", "gallery_shadow", "gallery_meta", "distances", "indices"), 0
        )
        rows = (0, 0, 4096, 128, 128, 0, 0, 0)
        plan = module.cuda_search_size(
            queries=rows, gallery=rows, metric=0, kind=kind, k=10, base=0, scratch=0, multiprocessors=100,
            shared_memory=SHARED_MEMORY[target], **zeros
        )  # fmt: skip
        assert plan["blocks_per_multiprocessor"] == 2
        stages = 3 * plan["tile_rows"] * (128 + 16 + 16)  # of padded rows and their meta
        wanted[rf"scan.*ShadowE{kind}E.*ILi4ELi2ELi8ELi3ELi{plan['tile_rows']}E"] = (128 * (pitch + 16) + stages, 2)
    found = usage("topk", architecture) | usage("transform", architecture)
    for pattern, (size, blocks) in wanted.items():
        (registers,) = (used["REG"] for name, used in found.items() if re.search(pattern, name))
        assert blocks_per_processor(registers, 128, size, target) >= blocks, (pattern, registers, size)
