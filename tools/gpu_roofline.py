"""Lower bounds on GPUs nobody here has: from compiled machine code, a model of L2, and published peaks.

``python -m tools.gpu_roofline [csrc/cuda]`` compiles the Triton kernels for each GPU's target (no GPU is needed),
and with a folder and nvcc the CUDA kernels too, and prints the tables of docs/gpu.md: tensor-core operations issued
against those that are needed, bytes moved to and from memory (:mod:`tools.gpu_traffic`), and the least time.
A bound is not a measurement; ``fct doctor --full`` measures.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fct.bench.data_sheets import GPUS, Gpu
from tools import gpu_traffic

__all__ = [
    "SMALL_H",
    "Bound",
    "Layers",
    "bound",
    "cuda_scan",
    "issued_per_iteration",
    "main",
    "paper",
    "plan_of",
    "scan_bound",
    "small_bound",
    "small_h_bound",
    "small_plan_of",
    "traffic",
    "triton_scan",
]


@dataclass(frozen=True)
class Bound:
    """What one kernel family does on one GPU; a row is a gallery row (transformation) or a query (search).

    floor, issued: operations a row. least_moved: bytes a row in and out, and for ``allowed`` the weights once a chunk
    besides. moved, moved_split: bytes a row to and from memory by the model of L2, and with half of it.
    nanoseconds: the least time for one row.
    """

    gpu: str
    what: str
    chunk: int
    floor: float
    issued: float
    least_moved: float
    allowed: float
    moved: float
    moved_split: float
    nanoseconds: float
    floor_nanoseconds: float

    @property
    def share(self) -> float:
        """Of the operations that are issued, those that are needed."""
        return self.floor / self.issued

    @property
    def excess(self) -> float:
        """Bytes moved over inputs, outputs and weights once a chunk."""
        return self.moved / self.allowed


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


def _bound(gpu: Gpu, what: str, precision: str, chunk: int, floor: float, issued: float, least: float, allowed: float,
           moved: float, split: float) -> Bound:  # fmt: skip
    rate = 1e12 * (gpu.peak(precision) or float("nan"))
    seconds = max(issued / rate, moved / (gpu.gbytes * 1e9))
    fastest = max(floor / rate, least / (gpu.gbytes * 1e9))
    return Bound(gpu.name, what, chunk, floor, issued, least, allowed, moved, split, seconds * 1e9, fastest * 1e9)


# ---- the transformation, Triton ----
def plan_of(gpu: Gpu, facts: dict[str, dict[str, Any]], *, d: int = 128, inner: int = 2048) -> gpu_traffic.Plan:
    """The chunk that run_chunks takes on this GPU for the paper's h in bfloat16, and how its kernels walk it.

    facts: "branches", "linear", "final" -> what the compiler made of them.
    """
    from fct.ops.device.state import chunk_rows
    from tools.machine_code import blocks_per_processor

    tiles = {name: f["tile"] for name, f in facts.items()}
    resident = {
        name: gpu.processors * blocks_per_processor(f["registers"], 32 * tiles[name]["warps"], f["shared"], gpu.target)
        for name, f in facts.items()
    }
    rows = chunk_rows(_layers(d, inner), inner, l2_bytes=gpu.l2_bytes, processors=gpu.processors,
                      tile_columns=tiles["linear"]["n"])  # fmt: skip
    return gpu_traffic.Plan(rows, 4 * d, 4 * d, 4 * d, inner, d, 2, tiles, resident, gpu.processors)


def small_plan_of(
    gpu: Gpu, facts: dict[str, dict[str, Any]], *, d: int = 128, inner: int = 512
) -> gpu_traffic.SmallPlan:
    """The same for an h whose branches have one layer of d, whose mixer has one block, and which has a skip.

    facts: "first_layers", "linear", "final".
    """
    from fct.ops.device.state import chunk_rows
    from tools.machine_code import blocks_per_processor

    tiles = {name: f["tile"] for name, f in facts.items()}
    resident = {
        name: gpu.processors * blocks_per_processor(f["registers"], 32 * tiles[name]["warps"], f["shared"], gpu.target)
        for name, f in facts.items()
    }
    layers = [(8 * d, 2 * inner, 4 * d * inner), (2 * inner + 4 * d, 4 * d, 2 * inner * d)]  # the skip's output waits
    rows = chunk_rows(layers, inner, l2_bytes=gpu.l2_bytes, processors=gpu.processors,
                      tile_columns=tiles["linear"]["n"])  # fmt: skip
    return gpu_traffic.SmallPlan(
        rows, 4 * d, d, inner, d, 2, tiles, resident, gpu.processors, exact=False
    )  # bf16's rule


def _layers(d: int, inner: int) -> list[tuple[int, int, int]]:
    """The mixer's layers in bfloat16: bytes of a row in, of a row out, of the weights."""
    return [
        (8 * d, 2 * inner, 8 * d * inner),
        (2 * inner, 2 * inner, 2 * inner * inner),
        (2 * inner, 4 * d, 2 * inner * d),
    ]


def traffic(plan: gpu_traffic.Plan | gpu_traffic.SmallPlan, l2_bytes: int, *, chunks: int = 3, seed: int = 0) -> float:
    """Bytes a row to and from memory, once the first chunk has brought the weights."""

    def launches(chunk: int) -> list[gpu_traffic.Launch]:
        if isinstance(plan, gpu_traffic.SmallPlan):
            return gpu_traffic.small_launches(plan, chunk)
        return gpu_traffic.transform_launches(plan, chunk)

    cache = gpu_traffic.Cache(l2_bytes)
    gpu_traffic.simulate(launches(0), cache, seed=seed)
    cache.flush()
    before = cache.moved
    for i in range(1, chunks + 1):
        gpu_traffic.simulate(launches(i), cache, seed=seed + i)
    cache.flush()
    return (cache.moved - before) / (chunks * plan.rows)


def bound(gpu: Gpu, facts: dict[str, dict[str, Any]], *, d: int = 128, inner: int = 2048) -> Bound:
    """The paper's h at d dimensions in and out, bfloat16, float32 galleries, large batch."""

    def layer(name: str, k: int, n: int) -> float:
        t = facts[name]["tile"]
        iterations = -(-k // int(t["k"])) * -(-n // int(t["n"]))
        return issued_per_iteration(facts[name]) * iterations / int(t["m"])

    branches = 2 * 2 * (d * 2 * d + 2 * d * 2 * d)
    mixer = 2 * (4 * d * inner + inner * inner + inner * d)
    issued = layer("linear", 4 * d, inner) + layer("linear", inner, inner) + layer("final", inner, d)
    t = facts["branches"]["tile"]  # a turn of its loop: both layers' products for some hidden channels, of all d inputs
    issued += 2 * issued_per_iteration(facts["branches"]) * -(-2 * d // int(t["hidden"])) / int(t["m"])
    plan = plan_of(gpu, facts, d=d, inner=inner)
    rows = 12.0 * d
    allowed = rows + (branches + mixer) / plan.rows  # two bytes for each weight, which is two operations a row
    return _bound(gpu, "h (Triton)", "bf16", plan.rows, branches + mixer, issued, rows, allowed,
                  traffic(plan, gpu.l2_bytes), traffic(plan, gpu.l2_bytes // 2))  # fmt: skip


def small_h_bound(gpu: Gpu, facts: dict[str, dict[str, Any]], *, d: int = 128, inner: int = 512) -> Bound:
    """The small h at d dimensions in and out, bfloat16, which rounds rows there, float32 galleries, large batch."""

    def layer(name: str, k: int, n: int) -> float:
        t = facts[name]["tile"]
        return issued_per_iteration(facts[name]) * -(-k // int(t["k"])) * -(-n // int(t["n"])) / int(t["m"])

    floor = 2.0 * (2 * d * d + 2 * d * inner + inner * d + 2 * d * d)
    issued = layer("linear", 2 * d, inner) + layer("final", inner, d) + layer("first_layers", 4 * d, d)
    plan, rows = small_plan_of(gpu, facts, d=d, inner=inner), 12.0 * d
    allowed = rows + floor / plan.rows
    return _bound(gpu, "small h (Triton)", "bf16", plan.rows, floor, issued, rows, allowed,
                  traffic(plan, gpu.l2_bytes), traffic(plan, gpu.l2_bytes // 2))  # fmt: skip


# ---- the search ----
def cuda_scan(gpu: Gpu, kind: str, *, gallery: int = 1 << 20, d: int = 128, k: int = 10) -> gpu_traffic.Scan:
    """The scan that csrc/cuda/topk.cuh's plan_search picks for as many queries as search_queries tells it to take.

    For k up to 512. Held against the compiled plan by a test.
    """
    from fct.kernels.tile_choices import SHARED_MEMORY

    size = 2 if kind == "bf16" else 1
    pitch = -(-d * size // 128) * 128
    limit = SHARED_MEMORY[gpu.target]
    choices = []
    for tile_rows in (64, 32):
        stages = 3 * tile_rows * (144 + 16)
        held = 128 * (pitch + 16) + stages <= min(limit, 99 << 10)
        shared = stages + (128 * (pitch + 16) if held else 3 * 128 * 144)
        choices.append((2 if 2 * (shared + 1024) <= limit + 1024 else 1, tile_rows, held))
    fit, tile_rows, held = max(choices, key=lambda choice: choice[0])  # the larger tile where both fit as often
    slots = fit * gpu.processors
    blocks = max(range(32, 15, -1), key=lambda b: slots // b * b)
    together = max(1, slots // blocks)
    enough = k // 4 + 1
    splits = min(-(-enough // together) * together, -(-gallery // tile_rows))
    return gpu_traffic.Scan(128 * blocks, gallery, pitch, 128, tile_rows, splits, slots, held, 16 * 8, 4)


def triton_scan(gpu: Gpu, kind: str, *, gallery: int = 1 << 20, d: int = 128, k: int = 10) -> gpu_traffic.Scan:
    """The scan of :mod:`fct.ops.search.triton_search`, for as many queries as it takes at once."""
    from fct.kernels.search_kernels import tile
    from fct.ops.search.triton_search import plan, queries_at_once, slots

    place: Any = gpu
    line = 128 if kind == "int8" else 64
    width = -(-d // line) * line
    queries = queries_at_once(tile(kind, 32, gpu.target, width=width), place)
    made = plan(gallery, k, kind, queries, place, width)
    pitch = 128 * width // line
    return gpu_traffic.Scan(queries, gallery, pitch, made.tile.m, made.tile.n, made.splits, slots(made.tile, place),
                            made.tile.k == width, 8 * made.keep, depth=pitch * made.tile.k // width)  # fmt: skip


def scan_bound(gpu: Gpu, facts: dict[str, Any], kind: str, scan: gpu_traffic.Scan, *, d: int = 128,
               what: str = "CUDA") -> Bound:  # fmt: skip
    """The scan that a search begins with; a row is a query. A sample of the gallery, four times L2, is walked.

    least: the shadows of queries and gallery and their meta, read once.
    """
    tile = {"m": scan.tile_queries, "n": scan.tile_rows, "warps": facts["tile"]["warps"] if "tile" in facts else 4}
    per_tile = issued_per_iteration({**facts, "tile": tile, "precision": kind}) * (scan.pitch // scan.depth)
    blocks = -(-scan.queries // scan.tile_queries)
    issued = per_tile * -(-scan.gallery // scan.tile_rows) * blocks / scan.queries
    sample = min(scan.gallery, 4 * gpu.l2_bytes // scan.pitch)

    def moved(l2_bytes: int) -> float:
        cache = gpu_traffic.Cache(l2_bytes)
        gpu_traffic.simulate(gpu_traffic.scan_launches(replace(scan, gallery=sample)), cache)
        cache.flush()
        grows = cache.read["gallery"] + cache.read["gallery meta"]
        return (grows * (scan.gallery / sample - 1) + cache.moved) / scan.queries

    least = (scan.pitch + gpu_traffic.META) * (scan.gallery / scan.queries + 1)
    name, floor = f"search, {kind} scan ({what})", 2.0 * scan.gallery * d
    return _bound(gpu, name, kind, scan.queries, floor, issued, least, least, moved(gpu.l2_bytes),
                  moved(gpu.l2_bytes // 2))  # fmt: skip


# ---- small batches, CUDA ----
@dataclass(frozen=True)
class Layers:
    """An h as csrc/cuda multiplies it. ends: columns of a float32 row in and out. layers: (inputs, depth of the
    product, outputs) of each; depth: in whole 64s, what reads rows in two parts three times, the skip in the last."""

    name: str
    ends: int
    layers: tuple[tuple[int, int, int], ...]


def paper(d: int = 128, inner: int = 2048) -> Layers:
    """The paper's h, whose rows and first weights come in three parts."""
    first, second = (d, 3 * d, 2 * d), (2 * d, 2 * d, 2 * d)
    mixer = ((k, k, n) for k, n in ((4 * d, inner), (inner, inner), (inner, d)))
    return Layers("h", 3 * d, (first, first, second, second, *mixer))


# What `auto` makes of 128 and 64 dimensions: one block in each branch, one in the mixer, a skip.
SMALL_H = Layers(
    "small h", 128 + 64 + 128, ((128, 384, 128), (64, 192, 128), (256, 256, 512), (512 + 192, 512 + 3 * 192, 128))
)


def small_bound(gpu: Gpu, facts: dict[str, Any], rows: int, h: Layers | None = None) -> Bound:
    """csrc/cuda/transform.cuh's ``transform_small`` for a batch whose weights come from memory: 16 output columns and
    16, 32 or 64 rows a unit, 64 inputs at a time. Every weight is read from memory once, since 256 rows' activations
    and the weights fit every L2 here; the batch's rows go in and out. h: the paper's by default."""
    h = h or paper()
    high = 16 if rows <= 16 else 32 if rows <= 32 else 64
    tile = {"m": high, "n": 16, "k": 64, "warps": 4}
    each = issued_per_iteration({**facts, "tile": tile, "precision": "bf16"})
    units = sum(-(-k // 64) * -(-n // 16) for _, k, n in h.layers) * -(-rows // high)
    floor, stored = (2.0 * sum(layer[i] * layer[2] for layer in h.layers) for i in (0, 1))
    least, moved = (4.0 * h.ends + weights / rows for weights in (floor, stored))
    what = f"{h.name}, {rows} rows (CUDA)"
    return _bound(gpu, what, "bf16", rows, floor, units * each / rows, least, least, moved, moved)


def _cuda_facts(folder: Path, target: str) -> dict[str, dict[str, Any]]:
    """Mangled kernel name -> facts, for csrc/cuda compiled by nvcc for the target."""
    from tools.machine_code import read_sass

    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for source in ("topk", "transform"):
            out = Path(scratch) / f"{source}.cubin"
            command = [
                "nvcc",
                "-std=c++17",
                "-O3",
                f"-arch={target}",
                "-cubin",
                str(folder / f"{source}.cu"),
                "-o",
                str(out),
            ]
            subprocess.run(command, check=True)
            found |= read_sass(out.read_bytes())
    return found


def _line(b: Bound) -> str:
    rate = 1e9 / b.nanoseconds
    shown = f"{rate / 1e6:.1f} million" if rate > 1e6 else f"{rate:,.0f}"
    return (
        f"| {b.gpu} | {b.what} | {b.chunk:,} | {b.floor / 1e6:,.2f} / {b.issued / 1e6:,.2f} ({b.share:.2f}) | "
        f"{b.least_moved:,.0f} / {b.moved:,.0f} ({b.excess:.2f}) | {b.moved_split:,.0f} | "
        f"{b.floor_nanoseconds:,.1f} / {b.nanoseconds:,.1f} | {shown} |"
    )


def main() -> None:
    from fct.kernels import search_kernels as search
    from tools.machine_code import SMALL, compile_case

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    print("| GPU | what | rows or queries at once | MFLOP a row, needed / issued | bytes a row, least / by the model | "
          "with half of L2 | least ns a row, needed / issued | rows a second at most |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    made: dict[str, dict[str, dict[str, Any]]] = {}
    for gpu in GPUS:
        if gpu.target not in made:
            made[gpu.target] = {
                name: compile_case(name, "bf16", gpu.target) for name in ("branches", "linear", "final")
            }
        print(_line(bound(gpu, made[gpu.target])), flush=True)
    small: dict[str, dict[str, dict[str, Any]]] = {}
    for gpu in GPUS:
        if gpu.target not in small:
            small[gpu.target] = {
                name.split()[0]: compile_case(name, "bf16", gpu.target)
                for name in ("first_layers", f"linear {SMALL}", f"final {SMALL}")
            }
        print(_line(small_h_bound(gpu, small[gpu.target])), flush=True)
    for gpu in GPUS:
        for kind in ("bf16", "int8"):
            if f"scan {kind}" not in made[gpu.target]:
                facts = compile_case("scan", kind, gpu.target, f"keep {search.KEEPS[0]}, 128 wide, 4096 queries")
                made[gpu.target][f"scan {kind}"] = facts
            facts = made[gpu.target][f"scan {kind}"]
            print(_line(scan_bound(gpu, facts, kind, triton_scan(gpu, kind), what="Triton")), flush=True)
    if folder is None:
        return
    cuda: dict[str, dict[str, dict[str, Any]]] = {}
    for gpu in GPUS:
        if gpu.target not in cuda:
            cuda[gpu.target] = _cuda_facts(folder, gpu.target)
        by_name = cuda[gpu.target]

        def kernel(pattern: str, of: dict[str, dict[str, Any]] = by_name) -> dict[str, Any]:
            return next(facts for name, facts in of.items() if re.search(pattern, name))

        for kind, code in (("bf16", 0), ("int8", 1)):
            scan = cuda_scan(gpu, kind)
            facts = kernel(rf"scan.*ShadowE{code}E.*ILi4ELi2ELi8ELi3ELi{scan.tile_rows}E")
            print(_line(scan_bound(gpu, facts, kind, scan)), flush=True)
        for h in (paper(), SMALL_H):
            for rows, warps in ((1, 1), (256, 4)):
                print(_line(small_bound(gpu, kernel(rf"transform_smallILi{warps}E"), rows, h)), flush=True)


if __name__ == "__main__":
    main()
