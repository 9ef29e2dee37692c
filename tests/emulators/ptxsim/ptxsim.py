"""Runs the PTX that nvcc emits, on the CPU, with NumPy: a second opinion on codegen and on the inline assembly.

A warp is a vector of 32 lanes; lanes that diverged run apart, lowest program counter first, and wait for each other
at instructions that need the whole warp. Warps of a block
take turns at random, far ahead of each other, and meet at ``bar.sync``. Global memory is the process's own, reachable
only through the segments that were declared; shared memory starts as 0xFF bytes (NaN); a ``cp.async`` fills its
destination when ``wait_group`` says so and not before. An opcode that is not below is an error, not a guess.
"""

from __future__ import annotations

import ctypes
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Kernel", "Launch", "PtxError", "Trace", "parse"]

DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
SIZES = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SHARED_LIMIT = 227 * 1024
WHOLE_WARP = frozenset({"shfl", "mma", "ldmatrix", "bar"})  # instructions at which lanes wait for each other


class PtxError(RuntimeError):
    """The kernel did what hardware leaves undefined or traps on."""


# (block, groups of copies that the thread has committed, write, addresses, bytes at each)
Trace = Callable[[tuple[int, int, int], int, bool, Any, int], None]


@dataclass(frozen=True)
class Instruction:
    guard: str  # register, or ""
    negated: bool
    op: tuple[str, ...]  # "ld.global.f32" split at the dots
    args: tuple[str, ...]
    text: str


@dataclass
class Kernel:
    name: str
    params: dict[str, tuple[int, int]]  # name -> (offset, bytes) in parameter memory
    registers: dict[str, str] = field(default_factory=dict)  # name -> declared type
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += c
    return [*parts, current.strip()] if current.strip() else parts


def parse(text: str) -> dict[str, Kernel]:
    """Every entry of a PTX file, by its mangled name."""
    kernels = {}
    text = re.sub(r"//[^\n]*", "", text)
    for entry in re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\n\{(.*?)\n\}", text, re.S):
        params, offset = {}, 0
        for declared in _split(entry[2]):
            match = re.fullmatch(
                r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?", " ".join(declared.split())
            )
            if match is None:
                raise NotImplementedError(declared)
            size = SIZES[match[2]] * int(match[4] or 1)
            align = int(match[1] or SIZES[match[2]])
            offset = (offset + align - 1) // align * align
            params[match[3]] = (offset, size)
            offset += size
        kernel = Kernel(entry[1], params)
        for statement in re.split(r";|(?<=:)\s*\n", entry[4]):
            statement = " ".join(statement.split())
            while label := re.match(r"(\$?\w+):\s*", statement):
                kernel.labels[label[1]] = len(kernel.instructions)
                statement = statement[label.end() :]
            if not statement or statement.startswith((".pragma", ".loc")):
                continue
            if statement.startswith(".reg"):
                match = re.fullmatch(r"\.reg \.(\w+) (%\w+)<(\d+)>", statement)
                if match is None:
                    raise NotImplementedError(statement)
                kernel.registers.update({f"{match[2]}{i}": match[1] for i in range(int(match[3]))})
                continue
            if statement.startswith("."):
                raise NotImplementedError(statement)  # .local, .shared: the kernels have none
            guard, negated, rest = "", False, statement
            if statement[0] == "@":
                guard, rest = statement.split(None, 1)
                negated, guard = "!" in guard, guard.lstrip("@!")
            op, _, operands = rest.partition(" ")
            kernel.instructions.append(
                Instruction(guard, negated, tuple(op.split(".")), tuple(_split(operands)), statement)
            )
        kernels[kernel.name] = kernel
    return kernels


class GlobalMemory:
    """The segments of this process's memory that a kernel may touch."""

    def __init__(self, segments: list[tuple[int, int]]) -> None:
        found = sorted({s for s in segments if s[1]})
        self.starts = np.array([s for s, _ in found], np.int64)
        self.sizes = np.array([n for _, n in found], np.int64)
        self.views = [np.ctypeslib.as_array((ctypes.c_uint8 * n).from_address(s)) for s, n in found]

    def _locate(self, address: Any, size: int, text: str) -> Any:
        which = np.searchsorted(self.starts, address, side="right") - 1
        inside = (which >= 0) & (address + size <= self.starts[which] + self.sizes[which])
        if not inside.all():
            raise PtxError(f"out of bounds global access: {text}")
        return which

    def load(self, address: Any, size: int, text: str) -> Any:
        which = self._locate(address, size, text)
        out = np.empty((len(address), size), np.uint8)
        for s in np.unique(which):
            here = which == s
            out[here] = self.views[s][(address[here] - self.starts[s])[:, None] + np.arange(size)]
        return out

    def store(self, address: Any, data: Any, text: str) -> None:
        which = self._locate(address, data.shape[1], text)
        for s in np.unique(which):
            here = which == s
            self.views[s][(address[here] - self.starts[s])[:, None] + np.arange(data.shape[1])] = data[here]


class SharedMemory:
    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, 0xFF, np.uint8)

    def _check(self, address: Any, size: int, text: str) -> None:
        if (address < 0).any() or (address + size > self.bytes.size).any():
            raise PtxError(f"out of bounds shared access: {text}")

    def load(self, address: Any, size: int, text: str) -> Any:
        self._check(address, size, text)
        return self.bytes[address[:, None] + np.arange(size)]

    def store(self, address: Any, data: Any, text: str) -> None:
        self._check(address, data.shape[1], text)
        self.bytes[address[:, None] + np.arange(data.shape[1])] = data


@dataclass
class Copy:
    """A cp.async in flight, of the lanes that issued it together."""

    address: Any
    data: Any
    lanes: Any  # which lanes issued it
    left: Any  # lanes for which it has not landed
    group: Any  # each lane's commit group


class Warp:
    def __init__(self, block: Block, first: int, count: int) -> None:
        self.block, self.n = block, count
        t = np.arange(first, first + count, dtype=np.uint32)
        bx, by, _ = block.launch.block
        self.special = {"%tid.x": t % bx, "%tid.y": t // bx % by, "%tid.z": t // (bx * by), "%laneid": t % 32}
        for axis, i, b, g in zip("xyz", block.index, block.launch.block, block.launch.grid, strict=True):
            for name, value in (("ctaid", i), ("ntid", b), ("nctaid", g)):
                self.special[f"%{name}.{axis}"] = np.full(count, value, np.uint32)
        self.registers = {
            name: np.zeros(count, np.bool_ if kind == "pred" else UNSIGNED[SIZES[kind]])
            for name, kind in block.launch.kernel.registers.items()
        }
        self.pc = np.zeros(count, np.int64)
        self.alive = np.ones(count, bool)
        self.parked = np.zeros(count, bool)  # at an instruction that waits for other lanes of the warp
        self.waiting = False
        self.copies: list[Copy] = []
        self.group = np.zeros(count, np.int64)


class Block:
    def __init__(self, launch: Launch, index: tuple[int, int, int]) -> None:
        self.launch, self.index = launch, index
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        self.shared = SharedMemory(launch.shared_bytes)
        self.warps = [Warp(self, w, min(32, threads - w)) for w in range(0, threads, 32)]

    def runnable(self) -> list[Warp]:
        running = [w for w in self.warps if w.alive.any() and not w.waiting]
        waiting = [w for w in self.warps if w.waiting]
        if running or not waiting:
            return running
        if not all(w.alive.all() for w in self.warps):
            raise PtxError("bar.sync, and threads of the block have exited")
        for w in waiting:
            w.waiting = False
        return waiting


class Launch:
    """One launch of one kernel, run to its end by the constructor."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        args: list[bytes],
        segments: list[tuple[int, int]],
        *,
        seed: int = 0,
        cooperative: bool = False,
        trace: Trace | None = None,
    ) -> None:
        if shared_bytes > SHARED_LIMIT:
            raise PtxError(f"{shared_bytes} bytes of shared memory")
        self.kernel, self.grid, self.block, self.shared_bytes = kernel, grid, block, shared_bytes
        self.leaders = set(kernel.labels.values())
        self.memory = GlobalMemory(segments)
        self.random = random.Random(seed)
        self.params = self._pack(args)
        self.trace = trace
        self.issued: dict[str, int] = {}
        blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        self.random.shuffle(blocks)
        for resident in [blocks] if cooperative else [[b] for b in blocks]:
            self._run([Block(self, b) for b in resident])

    def _pack(self, args: list[bytes]) -> Any:
        places = list(self.kernel.params.values())
        if [size for _, size in places] != [len(a) for a in args]:
            raise PtxError(
                f"{self.kernel.name}: parameters of {[s for _, s in places]} bytes, got {[len(a) for a in args]}"
            )
        packed = np.zeros(max((o + s for o, s in places), default=0), np.uint8)
        for (offset, size), arg in zip(places, args, strict=True):
            packed[offset : offset + size] = np.frombuffer(arg, np.uint8)
        return packed

    def _run(self, blocks: list[Block]) -> None:
        last: Warp | None = None
        while running := [w for b in blocks for w in b.runnable()]:
            # A warp runs far ahead of the others, which is what shows a missing barrier.
            if last is None or last not in running or self.random.random() < 0.02:
                last = self.random.choice(running)
            if self._step(last):
                last = None

    def _step(self, w: Warp) -> bool:
        """Runs a warp to its next branch, barrier or label; True where it asked to be put off."""
        free = w.alive & ~w.parked
        last_resort = not free.any()  # all wait for others: together, or never
        pc = int(w.pc[w.alive if last_resort else free].min())
        lanes = (w.alive if last_resort else free) & (w.pc == pc)
        start = pc
        while True:
            if pc != start and pc in self.leaders:
                w.pc[lanes] = pc
                return False
            ins = self.kernel.instructions[pc]
            name = ins.op[0]
            self.issued[name] = self.issued.get(name, 0) + 1
            active = lanes
            if ins.guard:
                p = w.registers[ins.guard]
                active = lanes & (~p if ins.negated else p)
            if name == "bra":
                w.pc[lanes] = pc + 1
                w.pc[active] = self.kernel.labels[ins.args[0]]
                return False
            if name in ("ret", "exit"):
                if any((active & c.left).any() for c in w.copies):
                    raise PtxError("a thread exits with cp.async in flight")
                w.pc[lanes] = pc + 1
                w.alive &= ~active
                return False
            if name in WHOLE_WARP and not active.all():
                if last_resort and pc == start:
                    raise PtxError(f"lanes of the warp are elsewhere: {ins.text}")
                w.pc[lanes] = pc
                w.parked |= lanes
                return False
            w.parked &= ~lanes
            if name == "bar":
                w.pc[lanes] = pc + 1
                w.waiting = True
                return False
            if name == "nanosleep":
                w.pc[lanes] = pc + 1
                return True
            if active.any():
                execute = EXECUTE.get(name)
                if execute is None:
                    raise NotImplementedError(ins.text)
                with np.errstate(all="ignore"):
                    execute(self, w, ins, active)
            pc += 1

    # ---- operands ----
    def read(self, w: Warp, operand: str, kind: str) -> Any:
        """(lanes,) of the dtype named by ``kind``."""
        dtype = DTYPES[kind]
        if operand[0] == "%":
            v = w.registers[operand] if operand in w.registers else w.special[operand]
            if kind == "pred":
                return v
            return (v if v.itemsize == SIZES[kind] else v.astype(UNSIGNED[SIZES[kind]])).view(dtype)
        if operand[:2] in ("0f", "0F", "0d", "0D"):
            raw = UNSIGNED[4 if operand[1] in "fF" else 8](int(operand[2:], 16))
            return np.full(w.n, raw).view(dtype)
        if re.fullmatch(r"-?\d+U?|-?0x[0-9a-fA-F]+U?", operand):
            v = int(operand.rstrip("U"), 0)  # type: ignore[assignment]  # an array above, a number here
            if kind == "pred":
                return np.full(w.n, bool(v))
            return np.full(w.n, v & ((1 << 8 * SIZES[kind]) - 1), UNSIGNED[SIZES[kind]]).view(dtype)
        return np.full(w.n, self.symbol(operand), UNSIGNED[SIZES[kind]]).view(dtype)

    def symbol(self, name: str) -> int:
        if name in self.kernel.params:
            return self.kernel.params[name][0]
        if name.endswith("smemE"):  # GPU_DYN_SMEM(smem): the only shared symbol
            return 0
        raise NotImplementedError(f"symbol {name}")

    def write(self, w: Warp, operand: str, value: Any, lanes: Any) -> None:
        """Into a register of any width: truncated, or extended by the value's own signedness."""
        if operand == "_":
            return
        register = w.registers[operand]
        value = np.asarray(value)
        if register.dtype != np.bool_:
            if value.itemsize != register.itemsize:
                wide = np.int64 if value.dtype.kind == "i" else np.uint64
                value = value.astype(wide).astype(register.dtype)
            value = np.ascontiguousarray(value).view(register.dtype)
        np.copyto(register, value, where=lanes)

    def address(self, w: Warp, operand: str) -> Any:
        base, _, offset = operand.strip("[]").partition("+")
        at = w.registers[base].astype(np.int64) if base[0] == "%" else np.full(w.n, self.symbol(base), np.int64)
        return at + int(offset or 0)

    def space(self, w: Warp, ins: Instruction) -> Any:
        if "shared" in ins.op:
            return w.block.shared
        if "global" in ins.op:
            return self.memory
        raise NotImplementedError(ins.text)

    def note(self, w: Warp, address: Any, size: int, lanes: Any, *, write: bool) -> None:
        """Tells the trace of an access to global memory."""
        if self.trace is not None and len(address):
            self.trace(w.block.index, int(w.group[lanes].max()), write, address, size)


def _aligned(address: Any, size: int, ins: Instruction) -> None:
    if (address % size).any():
        raise PtxError(f"misaligned: {ins.text}")


def _vector(ins: Instruction) -> int:
    return 4 if "v4" in ins.op else 2 if "v2" in ins.op else 1


def _names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{}").split(",")]


Execute = Callable[[Launch, Warp, Instruction, Any], None]
EXECUTE: dict[str, Execute] = {}


def opcode(*names: str) -> Callable[[Execute], Execute]:
    def register(f: Execute) -> Execute:
        EXECUTE.update(dict.fromkeys(names, f))
        return f

    return register


@opcode("mov")
def _mov(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    kind = ins.op[-1]
    if ins.args[0][0] == "{":  # a wide register into its halves
        value, names = m.read(w, ins.args[1], kind), _names(ins.args[0])
        size = SIZES[kind] // len(names)
        halves = np.ascontiguousarray(value).view(UNSIGNED[size]).reshape(-1, len(names))
        for i, name in enumerate(names):
            m.write(w, name, halves[:, i], lanes)
    elif ins.args[1][0] == "{":
        names = _names(ins.args[1])
        part = {8: "b8", 16: "b16", 32: "b32"}[8 * SIZES[kind] // len(names)]
        value = np.stack([m.read(w, name, part) for name in names], 1)
        m.write(w, ins.args[0], np.ascontiguousarray(value).view(DTYPES[kind])[:, 0], lanes)
    else:
        m.write(w, ins.args[0], m.read(w, ins.args[1], kind), lanes)


@opcode("cvta")
def _cvta(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    m.write(w, ins.args[0], m.read(w, ins.args[1], "u64"), lanes)


def _divide(x: Any, y: Any) -> Any:
    """C's integer division, towards zero."""
    safe = np.where(y == 0, np.ones_like(y), y)
    if x.dtype.kind == "u":
        return x // safe
    return (np.sign(x) * np.sign(safe) * (np.abs(x) // np.abs(safe))).astype(x.dtype)


@opcode("add", "sub", "div", "rem", "min", "max", "and", "or", "xor")
def _binary(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    name, kind = ins.op[0], ins.op[-1]
    x, y = (m.read(w, a, kind) for a in ins.args[1:3])
    real = kind[0] == "f"
    if name == "div":
        out = x / y if real else _divide(x, y)
    elif name == "rem":
        out = x - _divide(x, y) * y
    else:
        f = {
            "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
            "min": np.fmin if real else np.minimum, "max": np.fmax if real else np.maximum,
        }[name]  # fmt: skip
        out = f(x, y)
    m.write(w, ins.args[0], out, lanes)


@opcode("not", "neg", "abs", "sqrt", "rcp")
def _unary(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    x = m.read(w, ins.args[1], ins.op[-1])
    if ins.op[0] == "rcp":
        out = (1 / x).astype(x.dtype)
    else:
        out = {"not": np.invert, "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt}[ins.op[0]](x)
    m.write(w, ins.args[0], out, lanes)


@opcode("mul", "mad", "fma")
def _multiply(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    name, kind = ins.op[0], ins.op[-1]
    x, y = (m.read(w, a, kind) for a in ins.args[1:3])
    if name == "fma":
        wide = np.float64 if kind == "f32" else np.longdouble
        out = (x.astype(wide) * y + m.read(w, ins.args[3], kind)).astype(x.dtype)
        m.write(w, ins.args[0], out, lanes)
        return
    if "wide" in ins.op:
        result = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}[kind]
        out = x.astype(DTYPES[result]) * y.astype(DTYPES[result])
    elif "hi" in ins.op:
        result = kind
        wide = np.int64 if kind == "s32" else np.uint64  # type: ignore[assignment]  # one of two types
        if SIZES[kind] != 4:
            raise NotImplementedError(ins.text)
        out = (x.astype(wide) * y.astype(wide) >> wide(32)).astype(DTYPES[kind])
    else:
        result, out = kind, x * y
    if name == "mad":
        out = out + m.read(w, ins.args[3], result)
    m.write(w, ins.args[0], out, lanes)


@opcode("shl", "shr")
def _shift(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    kind = ins.op[-1]
    x, by = m.read(w, ins.args[1], kind), m.read(w, ins.args[2], "u32")
    bits = 8 * SIZES[kind]
    if ins.op[0] == "shr" and kind[0] == "s":
        out = x >> np.minimum(by, bits - 1).astype(x.dtype)
    else:
        shifted = np.where(by < bits, by, 0).astype(x.dtype)
        out = np.where(by < bits, x << shifted if ins.op[0] == "shl" else x >> shifted, 0).astype(x.dtype)
    m.write(w, ins.args[0], out, lanes)


@opcode("bfi")
def _bit_field_insert(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    kind = ins.op[-1]
    inserted, base = (m.read(w, a, kind) for a in ins.args[1:3])
    at, length = int(ins.args[3]), int(ins.args[4])
    mask = ((1 << length) - 1) << at
    keep = base.dtype.type(~mask & ((1 << 8 * SIZES[kind]) - 1))
    out = (base & keep) | ((inserted << base.dtype.type(at)) & base.dtype.type(mask))
    m.write(w, ins.args[0], out, lanes)


@opcode("selp")
def _select(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    kind = ins.op[-1]
    x, y = (m.read(w, a, kind) for a in ins.args[1:3])
    m.write(w, ins.args[0], np.where(m.read(w, ins.args[3], "pred"), x, y), lanes)


@opcode("setp")
def _compare(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    how, kind = ins.op[1], ins.op[-1]
    if len(ins.op) != 3:
        raise NotImplementedError(ins.text)
    x, y = (m.read(w, a, kind) for a in ins.args[1:3])
    real = kind[0] == "f"
    nan = np.isnan(x) | np.isnan(y) if real else np.zeros(w.n, bool)
    if how in ("num", "nan"):
        out = nan if how == "nan" else ~nan
    else:
        unordered = real and how.endswith("u")
        base = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(how, how[:2])
        out = {
            "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
            "ge": np.greater_equal,
        }[base](x, y)  # fmt: skip
        out = (out | nan) if unordered else (out & ~nan)
    m.write(w, ins.args[0], out, lanes)


def _to_bf16(x: Any) -> Any:
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded)


@opcode("cvt")
def _convert(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    if "bf16x2" in ins.op:
        high, low = (_to_bf16(m.read(w, a, "f32")) for a in ins.args[1:3])
        m.write(w, ins.args[0], (high << np.uint32(16) | low).astype(np.uint32), lanes)
        return
    to, source = ins.op[-2], ins.op[-1]
    x = m.read(w, ins.args[1], source)
    if source[0] == "f" and to[0] == "f":
        out = np.rint(x) if "rni" in ins.op else x
        m.write(w, ins.args[0], out.astype(DTYPES[to]), lanes)
        return
    if source[0] == "f":
        if "rzi" not in ins.op:
            raise NotImplementedError(ins.text)
        limits = np.iinfo(DTYPES[to])
        clipped = np.clip(np.trunc(np.where(np.isnan(x), 0, x).astype(np.float64)), limits.min, limits.max)
        m.write(w, ins.args[0], clipped.astype(DTYPES[to]), lanes)
        return
    m.write(w, ins.args[0], x.astype(DTYPES[to]), lanes)


@opcode("ld")
def _load(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    kind, count = ins.op[-1], _vector(ins)
    size = SIZES[kind] * count
    at = m.address(w, ins.args[1])[lanes]
    if "param" in ins.op:
        data = m.params[at[:, None] + np.arange(size)]
    else:
        _aligned(at, size, ins)
        data = m.space(w, ins).load(at, size, ins.text)
        if "global" in ins.op:
            m.note(w, at, size, lanes, write=False)
    values = np.ascontiguousarray(data).view(DTYPES[kind]).reshape(-1, count)
    for i, name in enumerate(_names(ins.args[0])):
        full = np.zeros(w.n, DTYPES[kind])
        full[lanes] = values[:, i]
        m.write(w, name, full, lanes)


@opcode("st")
def _store(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    kind, count = ins.op[-1], _vector(ins)
    at = m.address(w, ins.args[0])[lanes]
    _aligned(at, SIZES[kind] * count, ins)
    values = np.stack([m.read(w, name, kind)[lanes] for name in _names(ins.args[1])], 1)
    m.space(w, ins).store(at, np.ascontiguousarray(values).view(np.uint8).reshape(len(at), -1), ins.text)
    if "global" in ins.op:
        m.note(w, at, SIZES[kind] * len(ins.args[1].split(",")), lanes, write=True)


@opcode("atom")
def _atomic(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    kind, what = ins.op[-1], next(o for o in ins.op if o in ("add", "exch"))
    at, operand = m.address(w, ins.args[1]), m.read(w, ins.args[2], kind)
    space, before = m.space(w, ins), np.zeros(w.n, DTYPES[kind])
    order = list(np.flatnonzero(lanes))
    m.random.shuffle(order)
    for lane in order:
        here = at[lane : lane + 1]
        _aligned(here, SIZES[kind], ins)
        old = np.ascontiguousarray(space.load(here, SIZES[kind], ins.text)).view(DTYPES[kind]).ravel()[0]
        before[lane] = old
        new = old + operand[lane] if what == "add" else operand[lane]
        space.store(here, np.array([new], DTYPES[kind]).view(np.uint8).reshape(1, -1), ins.text)
    m.write(w, ins.args[0], before, lanes)


@opcode("membar", "fence")
def _fence(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    """Every access above is immediate: nothing to order."""


@opcode("cp")
def _copy_async(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    if ins.op[2] == "commit_group":
        w.group[lanes] += 1
        return
    if ins.op[2] == "wait_group":
        for copy in w.copies:
            lands = copy.left & lanes & (copy.group < w.group - int(ins.args[0]))
            if lands.any():
                rows = lands[copy.lanes]
                w.block.shared.store(copy.address[rows], copy.data[rows], ins.text)
                copy.left &= ~lands
        w.copies = [c for c in w.copies if c.left.any()]
        return
    size = int(ins.args[2])
    to, source = m.address(w, ins.args[0])[lanes], m.address(w, ins.args[1])[lanes]
    taken = m.read(w, ins.args[3], "u32")[lanes] if len(ins.args) > 3 else np.full(len(to), size)
    if not np.isin(taken, (0, size)).all():
        raise NotImplementedError(f"{ins.text} with a part of {size} bytes")
    _aligned(to, size, ins)
    data = np.zeros((len(to), size), np.uint8)
    full = taken == size
    if full.any():
        _aligned(source[full], size, ins)
        data[full] = m.memory.load(source[full], size, ins.text)
        m.note(w, source[full], size, lanes, write=False)
    w.block.shared.store(to, np.full_like(data, 0xFF), ins.text)  # not there before the wait
    w.copies.append(Copy(to, data, lanes.copy(), lanes.copy(), w.group.copy()))


@opcode("shfl")
def _shuffle(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    if w.n != 32:
        raise NotImplementedError("shfl in a partial warp")
    x, by = m.read(w, ins.args[1], "b32"), m.read(w, ins.args[2], "u32").astype(np.int64)
    clamp, mask = (int(m.read(w, a, "u32")[lanes][0]) for a in ins.args[3:5])
    if mask != 0xFFFFFFFF:
        raise NotImplementedError(f"a part of the warp: {ins.text}")
    lane = np.arange(32)
    segment, limit = clamp >> 8 & 31, clamp & 31
    top = (lane & segment) | (limit & ~segment & 31)
    low = lane & segment
    source = {"bfly": lane ^ by, "idx": low | (by & ~segment & 31), "down": lane + by, "up": lane - by}[ins.op[2]]
    valid = source >= top if ins.op[2] == "up" else source <= top
    out = x[np.where(valid, source, lane)]
    names = ins.args[0].split("|")
    m.write(w, names[0], out, lanes)
    if len(names) > 1:
        m.write(w, names[1], valid, lanes)


@opcode("ldmatrix")
def _ldmatrix(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    if ins.op[1:] != ("sync", "aligned", "m8n8", "x4", "shared", "b16"):
        raise NotImplementedError(ins.text)
    at = m.address(w, ins.args[1])
    _aligned(at, 16, ins)
    rows = np.ascontiguousarray(w.block.shared.load(at, 16, ins.text)).view(np.uint32)  # (32 rows, 4 words)
    lane = np.arange(32)
    for i, name in enumerate(_names(ins.args[0])):
        m.write(w, name, rows[i * 8 + lane // 4, lane % 4], lanes)


@opcode("mma")
def _mma(m: Launch, w: Warp, ins: Instruction, lanes: Any) -> None:
    """Fragment layouts: PTX ISA, "Matrix fragments for mma.m16n8k16" and "... m16n8k32"."""
    shape = ".".join(ins.op[1:])
    if shape == "sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32":
        kind, per_word = "f32", 2
    elif shape == "sync.aligned.m16n8k32.row.col.s32.s8.s8.s32":
        kind, per_word = "s32", 4
    else:
        raise NotImplementedError(ins.text)

    def fragment(operand: str, dtype: str) -> Any:
        return np.stack([m.read(w, name, dtype) for name in _names(operand)], 1)  # (lanes, registers)

    def unpack(words: Any) -> Any:
        if per_word == 4:
            return np.ascontiguousarray(words).view(np.int8).reshape(32, -1, 4).astype(np.int64)
        halves = np.ascontiguousarray(words).view(np.uint16).reshape(32, -1, 2).astype(np.uint32) << np.uint32(16)
        return halves.view(np.float32).astype(np.float64)

    a, b, c = unpack(fragment(ins.args[1], "u32")), unpack(fragment(ins.args[2], "u32")), fragment(ins.args[3], kind)
    full_a = np.zeros((16, 8 * per_word), a.dtype)
    full_b = np.zeros((8 * per_word, 8), b.dtype)
    group, thread = np.arange(32) // 4, np.arange(32) % 4
    for i in range(4):
        for h in range(per_word):
            full_a[group + i % 2 * 8, thread * per_word + h + i // 2 * 4 * per_word] = a[:, i, h]
            if i < 2:
                full_b[thread * per_word + h + i * 4 * per_word, group] = b[:, i, h]
    product = full_a @ full_b
    for i, name in enumerate(_names(ins.args[0])):
        sums = product[group + i // 2 * 8, thread * 2 + i % 2] + c[:, i]
        m.write(w, name, sums.astype(DTYPES[kind]), lanes)
