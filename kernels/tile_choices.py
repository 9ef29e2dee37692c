"""Tile shapes per target and operand type; kept only where shared memory and registers allow them.

The table is short on purpose: each row compiles with no spill for its target (a test compiles every one), and the
first that fits is taken. Nothing is tuned at run time.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SHARED_MEMORY", "TARGETS", "Tile", "family", "tiles"]


class Tile(NamedTuple):
    """One configuration, which kernels take as it is. m, n, k: the tile's rows, columns and depth; in ``branches`` and
    ``first_layers``, which read the gallery, k is of the rows that are read."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    tma: bool = False
    hidden: int = 0  # branches: hidden channels at a time


# What one program may take, bytes (CUDA programming guide, table of compute capabilities; CDNA3 ISA for LDS).
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10,
                 "gfx942": 64 << 10}  # fmt: skip
TARGETS = tuple(SHARED_MEMORY)

_READ_ROWS = ("branches", "first_layers")
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}


def family(target: str) -> str:
    """The table's row for a target: sm_87 -> sm_86, sm_103 -> sm_100; sm_120 -> sm_89 (small shared memory)."""
    if target.startswith("gfx"):
        return "gfx942"
    number = int(target.removeprefix("sm_"))
    if number >= 120:
        return "sm_89"
    return f"sm_{max(n for n in (80, 86, 89, 90, 100) if n <= number)}"


def tiles(kernel: str, precision: str, target: str, *, width: int) -> tuple[Tile, ...]:
    """The configurations of ``kernel`` ("branches", "first_layers", "linear", "final") that fit the target, best guess
    first.

    width: columns of the output (branches and final hold a whole row where they can: at most 256).
    """
    target = family(target)
    big = target in ("sm_90", "sm_100")
    # what reads the rows computes in bfloat16 where the mixer takes 8 bits
    size = max(2, _BYTES[precision]) if kernel in _READ_ROWS else _BYTES[precision]
    n = max(16, 1 << (width - 1).bit_length())
    deep = 128 // size  # one 128-byte line of the operand
    if kernel == "branches":
        rows = 128 if target == "sm_100" and size == _BYTES[precision] else 64  # 8-bit epilogues would spill at 128
        if precision == "fp32":
            choices = [Tile(64, n, 32, 8, 2, hidden=32), Tile(32, n, 32, 8, 1, hidden=32)]
            choices = choices[1:] if target == "sm_90" else choices  # 64 rows of three wgmma products spill there
        elif target == "sm_90":  # one warp group: two would both compute the first layer
            choices = [Tile(64, n, 128, 4, 2, hidden=32), Tile(64, n, 64, 8, 2, hidden=32)]
        elif target == "sm_100":
            choices = [Tile(rows, n, 128, 8, 2, hidden=32), Tile(64, n, 128, 8, 2, hidden=32)]
        elif target == "gfx942":
            choices = [Tile(64, n, 32, 8, 2, hidden=32), Tile(32, n, 64, 8, 2, hidden=32)]
        else:
            choices = [Tile(64, n, 128, 8, 2, hidden=64), Tile(64, n, 128, 8, 2, hidden=32),
                       Tile(64, n, 64, 8, 2, hidden=32), Tile(32, n, 32, 4, 1, hidden=32)]  # fmt: skip
    elif kernel == "first_layers":
        columns = min(n, 128)
        # products of two parts each: with four warps, or 64 inputs at a time, they would spill on older targets
        choices = [Tile(64, columns, *((64, 4) if big else (32, 8)), 3), Tile(32, columns, 32, 4, 2)]
        if precision == "fp32":
            choices = [Tile(64, min(n, 64), 32, 4, 2)]
    elif kernel == "linear":
        if precision == "fp32":
            choices = [Tile(128, 128, 32, 8, 3)] if big else [Tile(64, 64, 32, 4, 2)]  # three products: many registers
        elif big:
            # sm_100 would spill in the 8-bit epilogue of a 256-wide tile
            wide = 128 if target == "sm_100" and size == 1 else 256
            choices = [Tile(128, wide, deep, 8, 4, tma=True), Tile(128, 128, deep, 8, 4, tma=True),
                       Tile(128, 128, deep, 8, 3)]  # fmt: skip
        else:
            choices = [Tile(128, 256, deep, 8, 3), Tile(128, 128, deep, 8, 3), Tile(128, 128, deep, 8, 2),
                       Tile(64, 128, deep, 4, 2)]  # fmt: skip
        if n < 128:
            choices = [Tile(64, max(n, 32), deep, 4, 3), *choices]
    elif kernel == "final":
        columns = min(n, 256)
        if precision == "fp32":
            choices = [Tile(64, columns, 32, 8, 2), Tile(32, columns, 32, 4, 2), Tile(32, columns, 32, 4, 1)]
        else:
            choices = [
                Tile(64, columns, deep, 4 if columns <= 128 else 8, 4, tma=big),
                Tile(64, columns, deep, 8, 2),
                Tile(32, columns, deep, 4, 1),
            ]
    else:
        raise ValueError(f"kernel: expected branches, first_layers, linear or final, got {kernel!r}")
    return tuple(c for c in choices if _fits(kernel, c, size, SHARED_MEMORY[target], buffers=c.stages + big))


def _fits(kernel: str, c: Tile, size: int, shared: int, *, buffers: int) -> bool:
    """Whether the pipelined operands fit shared memory and the accumulator fits half of the registers.

    buffers: of the pipeline; where products are asynchronous, one more than it has stages.
    """
    if kernel == "branches":
        parts = 1 if size == 4 else 2  # the first layer's operands, high and low
        operands = buffers * (parts * c.hidden * c.k + c.n * c.hidden) * size + parts * c.m * c.k * size
    elif kernel == "first_layers":  # rows of float32 and both parts of the weights
        operands = buffers * (c.m * c.k * 4 + 2 * c.n * c.k * size)
    else:
        operands = c.stages * (c.m + c.n) * c.k * size
    accumulator = c.m * (c.n + c.hidden) * 4
    return operands <= shared and accumulator <= c.warps * 32 * 160 * 4
