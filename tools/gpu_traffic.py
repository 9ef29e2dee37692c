"""How many bytes the kernels move to and from a GPU's memory: their address streams, walked through a model of its L2.

A stream is what a program (thread block) reads and writes, step by step, in units of :data:`UNIT` bytes: 32 rows of one
128-byte column. Tests record the addresses that the kernels touch, Triton's in its interpreter and the CUDA scan's in
that of its PTX, and hold these streams against them. As many programs are in flight as registers and shared memory
allow, in random order; one that waits for memory stands still for a turn.

The L2 is one least-recently-used cache that writes back; what is written whole is not read first. NVIDIA's real policy
and hash are not published. The data centre parts have two halves, and a line may lie in both, so the model is
also run with half the size, which is the pessimist's bound.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "UNIT",
    "Cache",
    "Launch",
    "Plan",
    "Scan",
    "SmallPlan",
    "Unit",
    "block",
    "scan_launches",
    "simulate",
    "small_launches",
    "transform_launches",
]

ROWS, LINE = 32, 128
UNIT = ROWS * LINE
Unit = tuple[str, int, int]  # buffer, rows / 32, bytes / 128
# What one program does in one turn: units read, units written.
Step = tuple[Sequence[Unit], Sequence[Unit]]


def block(buffer: str, row: int, rows: int, byte: int, size: int, *, of_rows: int, of_bytes: int) -> list[Unit]:
    """The units of ``rows`` x ``size`` bytes at (row, byte), inside a buffer of ``of_rows`` rows of ``of_bytes``."""
    last_row, last_byte = min(row + rows, of_rows), min(byte + size, of_bytes)
    return [
        (buffer, i, j)
        for i in range(row // ROWS, -(-last_row // ROWS))
        for j in range(byte // LINE, -(-last_byte // LINE))
    ]


@dataclass(frozen=True)
class Launch:
    """A kernel's grid: ``program(i)`` is the i-th program's steps; ``resident`` of them run at once."""

    name: str
    grid: int
    resident: int
    program: Any  # (int) -> Iterator[Step]


@dataclass
class Cache:
    """Least recently used, ``size`` bytes, write-back. read, written: bytes that went to memory, by buffer."""

    size: int
    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    _units: OrderedDict[Unit, bool] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        """Full of what came before: an empty cache would flatter whoever comes first."""
        for i in range(self.size // UNIT):
            self._units["before", i, 0] = False

    def flush(self) -> None:
        """What was written and not yet in memory goes there, except what the next chunk overwrites."""
        for unit, dirty in self._units.items():
            if dirty and unit[0].startswith("out"):
                self.written[unit[0]] = self.written.get(unit[0], 0) + UNIT
                self._units[unit] = False

    def touch(self, unit: Unit, write: bool) -> bool:
        """Whether it was there."""
        units = self._units
        dirty = units.pop(unit, None)
        units[unit] = write or bool(dirty)
        if dirty is not None:
            return True
        if not write:
            self.read[unit[0]] = self.read.get(unit[0], 0) + UNIT
        if len(units) * UNIT > self.size:
            old, was_dirty = units.popitem(last=False)
            if was_dirty:
                self.written[old[0]] = self.written.get(old[0], 0) + UNIT
        return False

    @property
    def moved(self) -> int:
        return sum(self.read.values()) + sum(self.written.values())


def simulate(launches: Sequence[Launch], cache: Cache, *, seed: int = 0) -> None:
    """Runs the launches one after another through the cache."""
    rng = random.Random(seed)
    for launch in launches:
        waiting = iter(range(launch.grid))
        live: list[Iterator[Step]] = []
        late: set[int] = set()  # those that wait for memory this turn
        while True:
            while len(live) < launch.resident and (number := next(waiting, None)) is not None:
                live.append(launch.program(number))
            if not live:
                break
            order = list(range(len(live)))
            rng.shuffle(order)
            ended, missed = [], set()
            for i in order:
                if i in late:
                    continue
                step = next(live[i], None)
                if step is None:
                    ended.append(i)
                    continue
                reads, writes = step
                hits = [cache.touch(unit, False) for unit in reads]
                for unit in writes:
                    cache.touch(unit, True)
                if not all(hits):
                    missed.add(id(live[i]))
            for i in sorted(ended, reverse=True):
                live.pop(i)
            late = {i for i, program in enumerate(live) if id(program) in missed}


# ---- the transformation ----
@dataclass(frozen=True)
class Plan:
    """What the launches of one chunk need to know. widths: of the operands in bytes; tiles: by kernel."""

    rows: int
    d: int  # bytes of a gallery row
    hidden: int  # bytes of a branch's hidden layer (never written by the fused kernel)
    half: int  # bytes of a branch's output
    inner: int
    d_new: int  # columns
    size: int  # bytes of an operand's element
    tiles: dict[str, dict[str, int]]
    resident: dict[str, int]
    processors: int


def transform_launches(plan: Plan, chunk: int) -> list[Launch]:
    """One chunk through ``branches``, ``linear`` twice and ``final``; ``chunk`` numbers it."""
    joined = 2 * plan.half
    inner = plan.inner * plan.size
    t = plan.tiles["linear"]
    return [
        _branches(plan, chunk),
        _linear(plan, "joined", joined, "mixer.0", "inner.0", inner, t),
        _linear(plan, "inner.0", inner, "mixer.1", "inner.1", inner, t),
        _final(plan, chunk, inner),
    ]


@dataclass(frozen=True)
class SmallPlan:
    """The same of an h whose branches have one layer, whose mixer has one block, and which has a skip.

    d: bytes of a gallery row; branch, inner, d_new: columns of a branch's output, of the block, of h's output. exact:
    rows are not rounded.
    """

    rows: int
    d: int
    branch: int
    inner: int
    d_new: int
    size: int
    tiles: dict[str, dict[str, int]]
    resident: dict[str, int]
    processors: int
    exact: bool


def small_launches(plan: SmallPlan, chunk: int) -> list[Launch]:
    """One chunk through ``first_layers``, ``linear`` and ``final``."""
    joined, inner = 2 * plan.branch * plan.size, plan.inner * plan.size
    return [
        _first_layers(plan, chunk),
        _linear(plan, "joined", joined, "mixer.0", "inner.0", inner, plan.tiles["linear"]),
        _final(plan, chunk, inner, a="inner.0", w="mixer.1", added="added"),
    ]


def _first_layers(plan: SmallPlan, chunk: int) -> Launch:
    t, n, size = plan.tiles["first_layers"], plan.rows, 2
    part = plan.d // 4 * size  # bytes of a weight row, or of one of its three parts; the gallery is float32
    of_branch, of_skip = -(-plan.branch // t["n"]), -(-plan.d_new // t["n"])
    columns = 2 * of_branch + of_skip

    def read(name: str, weights: str, outputs: int, m0: int, n0: int) -> Iterator[Step]:
        for k in range(0, plan.d // 4, t["k"]):
            x = block(f"{name} rows {chunk}", m0, t["m"], 4 * k, 4 * t["k"], of_rows=n, of_bytes=plan.d)
            w = [
                unit
                for at in ((0, 2 * part) if plan.exact else (0,))
                for unit in block(
                    weights, n0, t["n"], at + k * size, t["k"] * size, of_rows=outputs, of_bytes=at + part
                )
            ]
            yield [*x, *w], []

    def program(number: int) -> Iterator[Step]:
        column, m0 = number % columns, number // columns * t["m"]
        if column < 2 * of_branch:
            name, n0 = ("old", "side")[column // of_branch], column % of_branch * t["n"]
            yield from read(name, f"{name}.0", plan.branch, m0, n0)
            begin, whole = column // of_branch * plan.branch + n0, 2 * plan.branch * plan.size
            wide = min(t["n"], plan.branch - n0) * plan.size
            yield [], block("joined", m0, t["m"], begin * plan.size, wide, of_rows=n, of_bytes=whole)
            return
        n0 = (column - 2 * of_branch) * t["n"]
        for name in ("old", "side"):
            yield from read(name, f"skip.{name}", plan.d_new, m0, n0)
        yield [], block("added", m0, t["m"], 4 * n0, 4 * t["n"], of_rows=n, of_bytes=4 * plan.d_new)

    return Launch("first_layers", columns * -(-n // t["m"]), plan.resident["first_layers"], program)


def _branches(plan: Plan, chunk: int) -> Launch:
    t = plan.tiles["branches"]
    n, size = plan.rows, plan.size
    row_tiles = -(-n // t["m"])
    channels = plan.hidden // size  # of a hidden layer

    def program(number: int) -> Iterator[Step]:
        tile, side = number % row_tiles, number // row_tiles
        name = ("old", "side")[side]
        x = block(f"{name} rows {chunk}", tile * t["m"], t["m"], 0, plan.d, of_rows=n, of_bytes=plan.d)
        part = plan.d // 4 * size  # bytes of one of a first weight row's three parts; the gallery is float32
        for h in range(0, channels, t["hidden"]):
            w1 = [
                unit
                for at in (0, 2 * part)  # high and low; the second copy of high is there for other layer plans
                for unit in block(f"{name}.0", h, t["hidden"], at, part, of_rows=channels, of_bytes=3 * part)
            ]
            w2 = block(f"{name}.1", 0, plan.half // size, h * size, t["hidden"] * size,
                       of_rows=plan.half // size, of_bytes=plan.hidden)  # fmt: skip
            again = x if h == 0 or t["k"] * 4 < plan.d else []
            yield [*again, *w1, *w2], []
        out = block("joined", tile * t["m"], t["m"], side * plan.half, plan.half, of_rows=n, of_bytes=2 * plan.half)
        yield [], out

    return Launch("branches", 2 * row_tiles, plan.resident["branches"], program)


def _linear(plan: Plan | SmallPlan, a: str, k: int, w: str, to: str, out: int, t: dict[str, int]) -> Launch:
    """k, out: bytes of a row of the operand and of the result."""
    from fct.kernels.transform_kernels import tile_order

    n, size = plan.rows, plan.size
    columns = out // size
    tiles_m, tiles_n = -(-n // t["m"]), -(-columns // t["n"])
    grid = min(tiles_m * tiles_n, plan.processors)

    def program(number: int) -> Iterator[Step]:
        for tile in range(number, tiles_m * tiles_n, grid):
            i, j = tile_order.fn(tile, tiles_m, tiles_n, 8)
            yield from _products(n, a, k, w, columns, i * t["m"], j * t["n"], t, size)
            where = {"of_rows": n, "of_bytes": out}
            yield [], block(to, i * t["m"], t["m"], j * t["n"] * size, t["n"] * size, **where)

    return Launch("linear", grid, plan.processors, program)


def _products(
    n: int, a: str, k: int, w: str, columns: int, m0: int, n0: int, t: dict[str, int], size: int
) -> Iterator[Step]:
    depth = t["k"] * size
    for at in range(0, k, depth):
        yield (
            [
                *block(a, m0, t["m"], at, depth, of_rows=n, of_bytes=k),
                *block(w, n0, t["n"], at, depth, of_rows=columns, of_bytes=k),
            ],
            [],
        )


def _final(
    plan: Plan | SmallPlan, chunk: int, k: int, *, a: str = "inner.1", w: str = "mixer.2", added: str | None = None
) -> Launch:
    t, n = plan.tiles["final"], plan.rows

    def program(number: int) -> Iterator[Step]:
        m0 = number * t["m"]
        yield from _products(n, a, k, w, plan.d_new, m0, 0, t, plan.size)
        place: dict[str, int] = {"of_rows": n, "of_bytes": 4 * plan.d_new}
        beside = [] if added is None else block(added, m0, t["m"], 0, 4 * plan.d_new, **place)
        yield beside, block(f"out rows {chunk}", m0, t["m"], 0, 4 * plan.d_new, **place)

    return Launch("final", -(-n // t["m"]), plan.resident["final"], program)


# ---- the search ----
META = 16  # bytes: four floats beside each shadow row


@dataclass(frozen=True)
class Scan:
    """One launch of a search's scan over (gallery, pitch bytes) of shadow rows.

    held: a program reads its queries once and keeps them, else it reads them again with every tile. resident: programs
    that run at once. keys, bounds: bytes that one program writes for each of its queries. depth: bytes of a row that
    are read at a time.
    """

    queries: int
    gallery: int
    pitch: int
    tile_queries: int
    tile_rows: int
    splits: int
    resident: int
    held: bool
    keys: int
    bounds: int = 0
    depth: int = LINE


def scan_launches(scan: Scan) -> list[Launch]:
    """Grid (query blocks, splits), a split's programs neighbours: split s takes the tiles s, s + splits, ...

    A program's steps: ``depth`` bytes of each tile, the first with its queries, the last of a tile with the rows' meta;
    then what it found.
    """
    blocks, tiles = -(-scan.queries // scan.tile_queries), -(-scan.gallery // scan.tile_rows)
    pitch = scan.pitch

    def meta(buffer: str, row: int, rows: int, of_rows: int) -> list[Unit]:
        first, last = row * META // LINE, -(-min(row + rows, of_rows) * META // LINE)
        return block(buffer, first, last - first, 0, LINE, of_rows=-(-of_rows * META // LINE), of_bytes=LINE)

    def program(number: int) -> Iterator[Step]:
        first, split = number % blocks * scan.tile_queries, number // blocks

        def queries(byte: int, size: int) -> list[Unit]:
            return block("queries", first, scan.tile_queries, byte, size, of_rows=scan.queries, of_bytes=pitch)

        for tile in range(split, tiles, scan.splits):
            row = tile * scan.tile_rows
            for byte in range(0, pitch, scan.depth):
                reads = block("gallery", row, scan.tile_rows, byte, scan.depth, of_rows=scan.gallery, of_bytes=pitch)
                if not scan.held:
                    reads += queries(byte, scan.depth)
                elif tile == split and byte == 0:
                    reads += queries(0, pitch)
                if tile == split and byte == 0:
                    reads += meta("query meta", first, scan.tile_queries, scan.queries)
                if byte + scan.depth >= pitch:
                    reads += meta("gallery meta", row, scan.tile_rows, scan.gallery)
                yield reads, []
        found = []
        for buffer, size in (("out keys", scan.keys), ("out bounds", scan.bounds)):
            if size:
                where = {"of_rows": scan.queries, "of_bytes": scan.splits * size}
                found += block(buffer, first, scan.tile_queries, split * size, size, **where)
        yield [], found

    return [Launch("scan", blocks * scan.splits, scan.resident, program)]
