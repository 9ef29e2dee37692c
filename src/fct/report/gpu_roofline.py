"""Lower bounds for the transformation on GPUs nobody here has: from compiled machine code and published peaks.

``python -m fct.report.gpu_roofline`` compiles the kernels for each GPU's target (no GPU is needed) and prints the table
of docs/gpu.md: tensor-core operations issued for a row against the operations h needs, bytes moved, and the least time.
A bound is not a measurement; ``fct doctor --full`` measures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

__all__ = ["GPUS", "Bound", "Gpu", "bound", "issued_per_iteration", "main", "published_peak"]


@dataclass(frozen=True)
class Gpu:
    """Published peaks: dense tensor-core TFLOP/s in bfloat16 with float32 sums, GB/s of memory, L2 bytes.

    others: the same for the other operands, fp32 as TF32 operands.
    """

    name: str
    target: str
    tflops: float
    gbytes: float
    l2_bytes: int
    processors: int
    others: dict[str, float]

    def peak(self, precision: str) -> float | None:
        """TFLOP/s of the precision's tensor-core instructions; None where the GPU has none."""
        return self.tflops if precision in ("bf16", "fp16") else self.others.get(precision)


# NVIDIA's data sheets (A100 80GB SXM, H100 SXM, H200 SXM, L4) and the Ada architecture paper (RTX 4090), no sparsity.
GPUS = (
    Gpu("A100", "sm_80", 312.0, 2039, 40 << 20, 108, {"fp32": 156.0, "int8": 624.0}),
    Gpu("H100", "sm_90", 989.4, 3350, 50 << 20, 132, {"fp32": 494.7, "int8": 1978.9, "fp8": 1978.9}),
    Gpu("H200", "sm_90", 989.4, 4800, 50 << 20, 132, {"fp32": 494.7, "int8": 1978.9, "fp8": 1978.9}),
    Gpu("L4", "sm_89", 121.0, 300, 48 << 20, 58, {"fp32": 60.5, "int8": 242.5, "fp8": 242.5}),
    Gpu("RTX 4090", "sm_89", 165.2, 1008, 72 << 20, 128, {"fp32": 82.6, "int8": 660.6, "fp8": 330.3}),
)


def published_peak(model: str, precision: str) -> float | None:
    """TFLOP/s that the data sheet of the GPU called ``model`` gives for the precision; None where none is at hand.

    Example:
        >>> from fct.report.gpu_roofline import published_peak
        >>> published_peak("NVIDIA H100 80GB HBM3", "fp8"), published_peak("NVIDIA L40S", "bf16")
        (1978.9, None)
    """
    for gpu in GPUS:
        if re.search(rf"\b{gpu.name}\b", model) and "PCIe" not in model and "Laptop" not in model:
            return gpu.peak(precision)
    return None


@dataclass(frozen=True)
class Bound:
    """floor, issued: operations a row; moved, least_moved: bytes a row; nanoseconds: the least time for one row."""

    gpu: str
    chunk: int
    floor: float
    issued: float
    least_moved: float
    moved: float
    nanoseconds: float
    floor_nanoseconds: float


def issued_per_iteration(facts: dict[str, Any]) -> float:
    """Operations that one program's multiplying loop body issues, from its tensor-core instructions."""
    tile, total = facts["tile"], 0.0
    for name, count in facts["loop"].items():
        if wide := re.search(r"GMMA\.64x(\d+)x(\d+)", name):
            each, groups = 2 * 64 * int(wide[1]) * int(wide[2]), tile["warps"] / 4
        elif name.startswith("UTC"):  # the shape is in a descriptor: the tile, 32 bytes deep
            size = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}[facts["precision"]]
            each, groups = 2 * tile["m"] * tile["n"] * (32 // size), 1
        else:
            shape = re.search(r"\.(16)(8)(8|16|32)", name)
            if shape is None:
                raise ValueError(f"facts: expected tensor-core instructions of a known shape, got {name!r}")
            each, groups = 2 * 16 * 8 * int(shape[3]), tile["warps"]
        total += count * each * groups
    return total


def bound(gpu: Gpu, linear: dict[str, Any], final: dict[str, Any], *, d: int = 128, inner: int = 2048) -> Bound:
    """The paper's h at d dimensions in and out, bfloat16, float32 galleries, large batch."""
    from fct.ops.triton import chunk_rows

    def layer(facts: dict[str, Any], k: int, n: int) -> float:
        t = facts["tile"]
        iterations = -(-k // int(t["k"])) * -(-n // int(t["n"]))
        return issued_per_iteration(facts) * iterations / int(t["m"])

    branches = 2 * 2 * (d * 2 * d + 2 * d * 2 * d)
    mixer = 2 * (4 * d * inner + inner * inner + inner * d)
    # the branches are 3 % of the work; where a warp group repeats their first layer, this much is issued twice
    repeated = 2 * 2 * d * 2 * d if gpu.target == "sm_90" else 0
    issued = branches + repeated + layer(linear, 4 * d, inner) + layer(linear, inner, inner) + layer(final, inner, d)
    place: Any = gpu
    chunk = chunk_rows(2 * (4 * d + 2 * inner), inner, place)
    rows = 4.0 * 3 * d
    weights = 2.0 * (branches + mixer) / 2
    moved = rows + weights / chunk
    floor = float(branches + mixer)
    seconds = max(issued / (gpu.tflops * 1e12), moved / (gpu.gbytes * 1e9))
    least = max(floor / (gpu.tflops * 1e12), rows / (gpu.gbytes * 1e9))
    return Bound(gpu.name, chunk, floor, issued, rows, moved, seconds * 1e9, least * 1e9)


def main() -> None:
    from fct.kernels.configs import tiles
    from fct.kernels.machine_code import compile_case

    print("| GPU | rows a chunk | MFLOP a row, needed / issued | bytes a row, in and out / with weights | "
          "least ns a row, needed / issued | rows a second at most |\n|---|---|---|---|---|---|")  # fmt: skip
    for gpu in GPUS:
        linear, final = (
            compile_case(k, "bf16", gpu.target, tiles(k, "bf16", gpu.target, width=w)[0])
            for k, w in (("linear", 2048), ("final", 128))
        )
        b = bound(gpu, linear, final)
        print(
            f"| {b.gpu} | {b.chunk:,} | {b.floor / 1e6:.2f} / {b.issued / 1e6:.2f} ({b.floor / b.issued:.2f}) | "
            f"{b.least_moved:,.0f} / {b.moved:,.0f} | {b.floor_nanoseconds:.1f} / {b.nanoseconds:.1f} | "
            f"{1e9 / b.nanoseconds / 1e6:.1f} million |"
        )


if __name__ == "__main__":
    main()
