"""The address streams of the model are those of the kernels, and the model counts as one counts by hand."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import triton.runtime.interpreter as interpreter
from fake_device import FakeDevice, plain

from fct.artifact.transformation import Transformation
from fct.bench.data_sheets import GPUS, Gpu
from fct.kernels.tile_choices import tiles
from fct.ops.device import state as devices
from fct.ops.search import triton_search as topk_triton
from fct.ops.transform import triton_backend as backend
from tools import gpu_traffic
from tools.gpu_roofline import (
    SMALL_H,
    cuda_scan,
    plan_of,
    scan_bound,
    small_bound,
    small_plan_of,
    traffic,
    triton_scan,
)
from tools.gpu_traffic import (
    UNIT,
    Cache,
    Launch,
    Scan,
    SmallPlan,
    Unit,
    block,
    scan_launches,
    simulate,
    small_launches,
    transform_launches,
)

D, INNER = 128, 320
BRANCH, BLOCK = 96, 160  # of a small h


class Recorder:
    """Stands where the interpreter loads and stores: which units each program touches, call by call."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.buffers: dict[str, Any] = {}
        self.calls: list[tuple[str, int, bool, frozenset[Unit]]] = []  # launch, program, write, units
        self.launch, self.width = "", 1

    def note(self, addresses: Any, mask: Any, write: bool) -> None:
        at = np.broadcast_to(addresses, np.broadcast(addresses, mask).shape)[np.broadcast_to(mask, mask.shape)]
        for name, tensor in self.buffers.items():
            pitch = tensor.stride(0) * tensor.element_size()
            off = at.astype(np.int64) - tensor.data_ptr()
            off = np.unique(off[(off >= 0) & (off < tensor.shape[0] * pitch)])
            if off.size:
                units = frozenset((name, int(r), int(b)) for r, b in {
                    (r, b) for r, b in zip(off // pitch // 32, off % pitch // 128, strict=True)
                })  # fmt: skip
                x, y, _ = interpreter.interpreter_builder.grid_idx
                self.calls.append((self.launch, x + y * self.width, write, units))

    def load(self, pointers: Any, mask: Any, *rest: Any) -> Any:
        self.note(pointers, mask, False)
        return self.real.load(pointers, mask, *rest)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self.note(pointers, mask, True)
        return self.real.store(pointers, value, mask)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def calls_of(
    monkeypatch: pytest.MonkeyPatch, rng: Any, h: Transformation, target: str, n: int
) -> list[tuple[str, int, bool, frozenset[Unit]]]:
    """What a chunk of n rows through h touches: (launch, program, write, units), call by call."""
    device = FakeDevice(target, processors=3)
    recorder = Recorder(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", recorder)
    monkeypatch.setattr(backend, "device_of", lambda name: device)
    monkeypatch.setattr(device, "_push", lambda work: work())

    def launch(kernel: Any, grid: Any, arguments: Any, *, warps: int, stages: int) -> None:
        device.launches.append(kernel.fn.__name__)
        recorder.launch, recorder.width = f"{len(device.launches) - 1} {kernel.fn.__name__}", grid[0]
        kernel[grid](**arguments, num_warps=warps, num_stages=stages)

    monkeypatch.setattr(device, "launch", launch)
    # of the paper's inner width, the share is far below
    monkeypatch.setattr("fct.ops.numerics.quantise.EXACT_SHARE", 1.0)
    packed = backend.TritonTransform().pack(h, "bf16", "cuda:0")
    old, side = (device.rows(rng.standard_normal((n, D), dtype=np.float32)) for _ in range(2))
    out = device.out(n, D)
    chunk = backend._Chunks(packed, old, side, out, n)
    recorder.buffers = {
        "old rows 0": old.values, "side rows 0": side.values, "out rows 0": out.values, "joined": chunk.joined,
        **{f"inner.{i}": x for i, x in enumerate(chunk.inner)},
        **{f"mixer.{i}": layer.weight for i, layer in enumerate(packed.mixer)},
        **{f"{b}.{i}": layer.weight for b in ("old", "side") for i, layer in enumerate(getattr(packed, b))},
        **{f"skip.{b}": layer.weight for b, layer in zip(("old", "side"), packed.skip, strict=False)},
        **({} if chunk.added is None else {"added": chunk.added}),
    }  # fmt: skip
    chunk.run()
    return recorder.calls


# 16-byte copies; TMA descriptors
@pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])
@pytest.mark.parametrize("small", [False, True])
def test_streams_are_the_kernels_own(monkeypatch: pytest.MonkeyPatch, rng: Any, target: str, small: bool) -> None:
    n, inner = (130, BLOCK) if small else (300, INNER)
    shape: dict[str, Any] = {"branch": BRANCH, "blocks": 1, "skip": True} if small else {}
    h = Transformation.random(D, D, D, inner=inner, normalise=True, **shape)
    calls = calls_of(monkeypatch, rng, h, target, n)
    widths = (("first_layers", BRANCH) if small else ("branches", 256), ("linear", inner), ("final", D))
    chosen = {name: tiles(name, "bf16", target, width=w)[0]._asdict() for name, w in widths}
    slots = dict.fromkeys(chosen, 3)
    launches = (
        small_launches(SmallPlan(n, 4 * D, BRANCH, BLOCK, D, 2, chosen, slots, 3, exact=True), 0)
        if small
        else transform_launches(gpu_traffic.Plan(n, 4 * D, 4 * D, 4 * D, INNER, D, 2, chosen, slots, 3), 0)
    )
    for number, modelled in enumerate(launches):
        name = f"{number} {modelled.name}"
        assert {p for launched, p, _, _ in calls if launched == name} == set(range(modelled.grid))
        for program in range(modelled.grid):
            steps = list(modelled.program(program))
            found = [(w, units) for launched, p, w, units in calls if (launched, p) == (name, program)]
            for write in (False, True):
                touched = frozenset().union(*(units for w, units in found if w == write))
                assert touched == {unit for step in steps for unit in step[write]}, (name, program, write)
            if modelled.name == "linear":  # and in this order: operand and weights, step by step, then the tile
                want = [frozenset(units) for reads, writes in steps for units in _split(reads, writes)]
                assert [units for _, units in found] == want


def _split(reads: Any, writes: Any) -> Iterator[list[Unit]]:
    """One step as the kernel's own calls: the operand's tile, the weights' tile; or the result's."""
    if writes:
        yield list(writes)
    else:
        for weights in (False, True):
            yield [unit for unit in reads if unit[0].startswith("mixer") == weights]


# kind, queries, gallery rows, dimensions, k: held in one line and in two, streamed; the tile for few queries
@pytest.mark.parametrize(
    "case",
    [
        ("bf16", 140, 304, 128, 5),
        pytest.param(("int8", 140, 200, 100, 5), marks=pytest.mark.slow),
        pytest.param(("bf16", 40, 200, 170, 70), marks=pytest.mark.slow),
        ("int8", 9, 400, 300, 5),
    ],
)
def test_the_search_streams_are_the_kernels_own(monkeypatch: pytest.MonkeyPatch, rng: Any, case: Any) -> None:
    kind, n_q, n, d, k = case
    device = FakeDevice("sm_89", processors=2)
    recorder = Recorder(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", recorder)
    monkeypatch.setattr(devices, "device_of", lambda name: device)
    monkeypatch.setattr(device, "_push", lambda work: work())
    launch = device.launch
    scans: list[Any] = []

    def recorded(kernel: Any, grid: Any, arguments: Any, **how: Any) -> None:
        recorder.launch, recorder.width = kernel.fn.__name__, grid[0]
        if recorder.launch == "scan":
            scans.append((grid, arguments))
            of = {
                "queries": arguments["queries"].data, "gallery": arguments["gallery"].data,
                "query meta": arguments["queries"].meta, "gallery meta": arguments["gallery"].meta,
                "out keys": arguments["out"],
            }  # fmt: skip
            for name, tensor in of.items():
                x = plain(tensor)
                x = x.view(x.shape[0], -1) if "keys" in name else x.view(-1, 32) if "meta" in name else x
                recorder.buffers[name] = x
        launch(kernel, grid, arguments, **how)

    monkeypatch.setattr(device, "launch", recorded)
    q, g = (device.rows(rng.standard_normal((m, d), dtype=np.float32)) for m in (n_q + -n_q % 8, n))
    search = topk_triton.TritonSearch()
    search.search(q[slice(0, n_q + -n_q % 8)], search.prepare(g, "l2", kind), k)
    ((grid, a),) = scans
    pitch = a["queries"].stride * a["queries"].data.element_size()
    scan = Scan(q.n, n, pitch, a["TILE"].m, a["TILE"].n, a["splits"], 2, a["HELD"], 8 * a["KEEP"], 0,
                pitch if a["HELD"] else 128)  # fmt: skip
    calls = [c for c in recorder.calls if c[0] == "scan"]
    assert grid[0] * grid[1] == scan_launches(scan)[0].grid == len({program for _, program, _, _ in calls})
    assert not other_streams(calls, scan)
    for change in (
        {"tile_queries": 8}, {"tile_rows": 32}, {"splits": scan.splits + 1}, {"pitch": pitch + 128},
        {"gallery": n + 64}, {"held": not scan.held}, {"keys": scan.keys + 128},
    ):  # fmt: skip
        assert other_streams(calls, replace(scan, **change)), change


def other_streams(calls: Any, scan: Scan) -> list[tuple[int, str]]:
    """Programs and buffers whose units, in the order in which they are touched, are not the model's."""
    wrong = []
    (launch,) = scan_launches(scan)
    for program in range(launch.grid):
        steps = list(launch.program(program))
        for buffer in ("queries", "query meta", "gallery", "gallery meta", "out keys"):
            touched = [{u for u in units if u[0] == buffer} for _, number, _, units in calls if number == program]
            model = [{u for u in (*reads, *writes) if u[0] == buffer} for reads, writes in steps]
            touched, model = (list(filter(None, x)) for x in (touched, model))
            if "meta" in buffer:  # several loads for a step; several steps in one unit
                touched, model = ([units for units, _ in groupby(x)] for x in (touched, model))
            if touched != model:
                wrong.append((program, buffer))
    return wrong


def test_cache_by_hand() -> None:
    def program(_: int) -> Iterator[Any]:
        yield [("a", 0, 0), ("a", 1, 0)], [("out", 0, 0)]
        yield [("a", 0, 0)], []  # there
        yield [("a", 2, 0)], []  # pushes out a 1, the longest unused
        yield [("a", 1, 0)], []  # read again, pushes out the result

    cache = Cache(3 * UNIT)
    simulate([Launch("x", 1, 1, program)], cache)
    assert cache.read == {"a": 4 * UNIT}
    assert cache.written == {"out": UNIT}
    cache.flush()
    assert cache.moved == 5 * UNIT
    assert block("x", 32, 40, 128, 500, of_rows=70, of_bytes=300) == [("x", i, j) for i in (1, 2) for j in (1, 2)]


class SetAssociative(Cache):
    """16 ways, the set by a hash."""

    def touch(self, unit: Unit, write: bool) -> bool:
        sets = self.__dict__.setdefault("sets", {})
        whole = self._units
        # Python's own hash differs from run to run.
        self._units = sets.setdefault(zlib.crc32(repr(unit).encode()) % (self.size // UNIT // 16), OrderedDict())
        size, self.size = self.size, 16 * UNIT
        try:
            return super().touch(unit, write)
        finally:
            self._units, self.size = whole, size


def as_compiled(gpu: Gpu) -> dict[str, dict[str, Any]]:
    """Registers and shared memory as the compiler gives them, rounded up: occupancy is what matters here."""
    shapes = {"branches": (256, 208), "linear": (2048, 255), "final": (128, 160), "first_layers": (128, 168)}
    return {
        name: {"tile": tiles(name, "bf16", gpu.target, width=w)[0]._asdict(), "registers": r, "shared": 80 << 10}
        for name, (w, r) in shapes.items()
    }


# Seconds each: one GPU stands for the others until the slow tests are run.
each_gpu = pytest.mark.parametrize(
    "gpu",
    [
        pytest.param(g, marks=[] if g.name == "A100" else [pytest.mark.slow], id=g.name)
        for g in GPUS
        if g.name != "H200"
    ],
)


@each_gpu
def test_activations_stay_in_l2(gpu: Gpu) -> None:
    """The paper's shape: nothing but rows in and out moves, far under 1.15 x (in + out + weights once a chunk)."""
    plan = plan_of(gpu, as_compiled(gpu))
    assert traffic(plan, gpu.l2_bytes, chunks=2) == pytest.approx(12 * D, rel=0.02)
    if gpu.name == "A100":
        cache = SetAssociative(gpu.l2_bytes)
        for i in range(3):
            simulate(transform_launches(plan, i), cache, seed=i)
        reread = sum(v for k, v in cache.read.items() if "rows" not in k) / (3 * plan.rows)
        assert reread < 0.15 * (12 * D + 11_404_800 / plan.rows) + 11_404_800 / (3 * plan.rows)
    # the model sees a chunk that is too large
    assert traffic(replace(plan, rows=4 * plan.rows), gpu.l2_bytes, chunks=1) > 5 * 12 * D


@each_gpu
def test_a_small_h_stays_in_l2(gpu: Gpu) -> None:
    """What lies between launches never leaves it, and each row is read once, though three layers read it."""
    facts = {name: f for name, f in as_compiled(gpu).items() if name != "branches"}
    plan = small_plan_of(gpu, facts)
    assert traffic(plan, gpu.l2_bytes, chunks=1) == pytest.approx(12 * D, rel=0.02)
    assert traffic(replace(plan, rows=4 * plan.rows), gpu.l2_bytes, chunks=1) > 2 * 12 * D


@each_gpu
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_the_search_reads_its_gallery_once(gpu: Gpu, kind: str) -> None:
    """With an eighth of L2, which 100,000 rows fill at least twice: it does not lean on the gallery staying there."""
    small = replace(gpu, l2_bytes=gpu.l2_bytes // 8)
    name = {"bf16": "HMMA.16816.F32.BF16", "int8": "IMMA.16832.S8.S8"}[kind]
    for what, scan in (
        ("CUDA", cuda_scan(gpu, kind, gallery=100_000)),
        ("Triton", triton_scan(gpu, kind, gallery=100_000)),
    ):
        # as the compilers emit them: 128 bytes deep, by four warps or two times four
        count = scan.tile_rows if what == "CUDA" else scan.tile_rows // 2 * scan.pitch // 128
        facts = {"loop": {name: count}, "tile": {"warps": 4 if what == "CUDA" else 8}}
        found = scan_bound(small, facts, kind, scan, what=what)
        assert found.floor <= found.issued <= 1.001 * found.floor * (1 + 64 / 100_000)
        candidates = scan.splits * (scan.keys + scan.bounds)
        # the Triton scan's splits run in several waves, which drift apart
        assert 1 <= (found.moved - candidates) / found.allowed <= (1.03 if what == "CUDA" else 1.2)
        if gpu.name == "L4" and what == "CUDA":  # and a launch whose last blocks trail behind reads parts of it again
            late = replace(scan, splits=scan.splits + 1)
            assert scan_bound(small, facts, kind, late, what=what).excess > found.excess + 0.1


def test_small_batches() -> None:
    loop = {"loop": {"HMMA.16816.F32.BF16": 2}}
    one = small_bound(GPUS[0], loop, 1)
    assert one.least_moved == pytest.approx(11_404_800, rel=1e-6)  # every weight once, two bytes each, and one row
    assert one.moved == one.least_moved + 2 * 2 * 2 * D * 2 * D  # the first layers' weights three times
    assert one.share == pytest.approx(11_403_264 / (11_403_264 + 2 * 4 * D * 2 * D) / 16)
    small = small_bound(GPUS[0], {"loop": {"HMMA.16816.F32.BF16": 8}}, 256, SMALL_H)
    assert small.least_moved == 4 * (128 + 64 + 128) + 2 * 245_760 / 256
    assert small.moved == small.least_moved + 2 * 2 * 2 * 192 * 128 / 256  # branches and skip read rows three times
    assert small.share == 245_760 / (245_760 + 2 * 2 * 192 * 128)  # every width is a multiple of what a unit takes
