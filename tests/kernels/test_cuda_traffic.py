"""The roofline's model of the CUDA search: its plan is the compiled one, its address stream that of the PTX."""

from __future__ import annotations

import struct
from collections import defaultdict
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import cuda_support as support
import pytest
import torch

from fct.bench.data_sheets import GPUS, Gpu
from fct.ops.search.cuda_search import CudaSearch
from fct.rows import Rows
from tools.gpu_roofline import cuda_scan
from tools.gpu_traffic import META, Scan, Unit, scan_launches

# (block number, groups of copies committed before, write) -> units touched
Stream = dict[tuple[int, int, bool], set[Unit]]


class Recorded:
    """The scan of one search, run as PTX: which units each block touches, and when. Other kernels are left out."""

    def __init__(self, device: support.EmulatedRuntime, kind: str, n_queries: int, n: int, d: int, k: int) -> None:
        import ptxsim

        self.kernels = ptxsim.parse(support.ptx("topk", "80"))
        self.stream: Stream = defaultdict(set)
        self.scans = 0
        search = CudaSearch(device)
        q, g = (Rows(torch.zeros(m, d), "float32", None, "cpu", "torch") for m in (n_queries, n))
        support.module().intercept(self.launch)
        try:
            search.search(q, search.prepare(g, "l2", kind), k)
        finally:
            support.module().intercept(None)
        assert self.scans == 1

    def launch(self, name: str, grid: Any, block: Any, shared: int, cooperative: bool, args: list[bytes]) -> None:
        import ptxsim

        if "4scanI" not in name:
            return
        self.scans += 1
        self.grid = grid
        # ScanArgs, field by field
        facts = struct.unpack("PPiPPii?PP", args[0])
        queries, query_meta, n_queries, gallery, gallery_meta, n, pitch, self.held, keys, bounds = facts
        lists, keep = (4, 8) if "ILi1ELi1ELi4E" in name else (1, 16)
        self.keys, self.bounds = lists * keep * 8, lists * 4
        splits = grid[1]
        buffers = {
            "queries": (queries, n_queries, pitch), "gallery": (gallery, n, pitch),
            "query meta": (query_meta, -(-n_queries * META // 128), 128),
            "gallery meta": (gallery_meta, -(-n * META // 128), 128),
            "out keys": (keys, n_queries, splits * self.keys), "out bounds": (bounds, n_queries, splits * self.bounds),
        }  # fmt: skip

        def trace(at: tuple[int, int, int], group: int, write: bool, address: Any, size: int) -> None:
            touched = self.stream[at[0] + at[1] * grid[0], group, write]
            for name, (start, rows, of_bytes) in buffers.items():
                off = address - start
                off = off[(off >= 0) & (off < rows * of_bytes)]
                for byte in (off, off + size - 1):  # no access is longer than a line
                    found = zip(byte // of_bytes // 32, byte % of_bytes // 128, strict=True)
                    touched |= {(name, int(r), int(b)) for r, b in found}

        ptxsim.Launch(self.kernels[name], grid, block, shared, args, support.segments(), trace=trace)


# shared memory a block may have in KiB, kind, queries, gallery rows, dimensions, k, tile: queries, rows
CASES = {
    "wide bf16": (163, "bf16", 140, 150, 128, 10, 128, 64),
    "narrow bf16": (99, "bf16", 140, 99, 128, 10, 128, 32),
    "wide int8": (99, "int8", 20, 290, 128, 5, 128, 64),
    "narrow int8, two lines a row": (99, "int8", 20, 140, 200, 5, 128, 32),
    "queries not held": (99, "bf16", 20, 150, 320, 5, 128, 64),
    "few queries": (99, "bf16", 12, 500, 128, 5, 16, 64),
}


def differences(recorded: Recorded, scan: Scan) -> list[str]:
    """Where the stream is not the model's: block by block and tile by tile in their order."""
    (launch,) = scan_launches(scan)
    wrong = []
    if launch.grid != recorded.grid[0] * recorded.grid[1]:
        wrong.append(f"grid: the kernel has {recorded.grid}, the model {launch.grid} programs")
    for program in range(launch.grid):
        *tiles, (_, found) = launch.program(program)
        stream = {key[1:]: units for key, units in recorded.stream.items() if key[0] == program and units}
        wrote = {unit for (_, write), units in stream.items() if write for unit in units}
        if wrote != set(found):
            wrong.append(f"program {program} writes {wrote ^ set(found)}")
        # the meta of the queries lies in registers from the start, and stage i is loaded behind i commits
        read = [stream.get((i, False), set()) for i in range(1 + max((group for group, _ in stream), default=0))]
        model = [set(reads) for reads, _ in tiles]
        steps: Any = enumerate(zip_longest(read, model, fillvalue=set()))
        wrong += [f"program {program}, step {i}: {a ^ b}" for i, (a, b) in steps if a != b]
    return wrong


@pytest.mark.grid(5)
@support.needs_nvcc
@pytest.mark.parametrize("case", CASES)
def test_the_model_reads_and_writes_what_the_kernel_does(case: str) -> None:
    kib, kind, n_queries, n, d, k, tile_queries, tile_rows = CASES[case]
    recorded = Recorded(support.EmulatedRuntime(shared_memory=kib << 10), kind, n_queries, n, d, k)
    pitch = -(-d * (2 if kind == "bf16" else 1) // 128) * 128
    scan = Scan(n_queries, n, pitch, tile_queries, tile_rows, recorded.grid[1], 8, recorded.held, recorded.keys,
                recorded.bounds)  # fmt: skip
    assert recorded.held == (case != "queries not held")
    assert differences(recorded, scan) == []
    # and each fact of the model counts
    for change in (
        {"tile_rows": 96 - tile_rows}, {"tile_queries": 8}, {"splits": scan.splits + 1},
        {"pitch": pitch + 128}, {"gallery": n + 32}, {"held": not scan.held}, {"keys": scan.keys + 128},
        {"bounds": scan.bounds + 128}, {"queries": n_queries + 128},
    ):  # fmt: skip
        assert differences(recorded, replace(scan, **change)), change


@support.needs_cxx
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("d", [64, 128, 256, 300, 384, 768])
def test_the_models_plan_is_the_compiled_one(gpu: Gpu, kind: str, d: int) -> None:
    from fct.kernels.tile_choices import SHARED_MEMORY

    device = {"multiprocessors": gpu.processors, "shared_memory": SHARED_MEMORY[gpu.target]}
    module, code = support.module(), ("bf16", "int8").index(kind)
    for k, n in ((1, 1 << 20), (10, 1 << 20), (100, 1 << 20), (512, 1 << 20), (10, 100)):
        scan = cuda_scan(gpu, kind, gallery=n, d=d, k=k)
        assert scan.queries == module.cuda_search_queries(d=d, kind=code, k=k, **device)
        rows = (0, 0, scan.queries, d, d, 0, 0, 0), (0, 0, n, d, d, 0, 0, 0)
        zeros = dict.fromkeys(
            ("query_shadow", "query_meta", "gallery_shadow", "gallery_meta", "distances", "indices"), 0
        )
        plan = module.cuda_search_size(
            queries=rows[0], gallery=rows[1], metric=0, kind=code, k=k, base=0, scratch=0, **device, **zeros
        )
        assert scan.tile_rows == plan["tile_rows"]
        assert scan.splits == plan["splits"]
        assert scan.resident == gpu.processors * plan["blocks_per_multiprocessor"]
        assert scan.splits * (scan.keys // 8) == plan["candidates"]
        assert scan.pitch == module.cuda_shadow_row_bytes(d, code)
        if n > 100 and k <= 100:  # what is written beyond what has to be read
            least = (scan.pitch + META) * (n / scan.queries + 1)
            assert scan.splits * (scan.keys + scan.bounds) < 0.12 * least


def test_rows_past_the_end_are_told_apart() -> None:
    """The recorder's own proof: a model that is one row or one byte longer has another stream."""
    scan = Scan(140, 97, 256, 128, 32, 2, 8, True, 256, 16)
    (launch,) = scan_launches(scan)
    steps = list(launch.program(1 + 2 * 1))  # the second query block's part of split 1: tiles 1 and 3
    assert [reads[0] for reads, _ in steps[:-1]] == [("gallery", 1, 0), ("gallery", 1, 1), ("gallery", 3, 0),
                                                     ("gallery", 3, 1)]  # fmt: skip
    assert steps[-1] == ([], [("out keys", 4, 2), ("out keys", 4, 3), ("out bounds", 4, 0)])
