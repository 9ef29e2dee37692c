"""What a pruned search could gain on GPUs nobody here has: bytes and operations from the CPU's counts, published peaks.

``python -m tools.gpu_pruning`` prints the table of docs/gpu.md from ``benchmarks/report/results.json`` ("search sets:
what was read": how many rows the first level leaves over on each set). Times are lower bounds. One query is bound by
the bytes of the shadow. A thousand are bound by the products of the first level, after which each row that is left
over is fetched for its query alone, one sector of memory at a time, and its tail's products run on no tensor core.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fct.bench.data_sheets import GPUS, Gpu
from tools.gpu_traffic import LINE, META

__all__ = ["Counted", "Times", "counted", "main", "times"]

REPORT = Path(__file__).parents[1] / "benchmarks" / "report" / "results.json"
SECTOR = 32  # bytes: the least that a read of memory moves
DEPTH = 32  # bytes: of one int8 tensor-core instruction, to which a level is padded


@dataclass(frozen=True)
class Counted:
    """One set: rows, dimensions, the first level's bytes of values a row, and the share of rows it leaves over."""

    name: str
    queries: int
    rows: int
    d: int
    first: int
    left: float

    @property
    def tail(self) -> int:
        """Bytes of a row left over, in whole sectors: what the first level has not read, and its facts."""
        return -(-(self.d - self.first + META) // SECTOR) * SECTOR


@dataclass(frozen=True)
class Times:
    """Microseconds at least: with today's whole shadow, and with a first level and what it leaves over."""

    whole: float
    pruned: float

    @property
    def gain(self) -> float:
        return self.whole / self.pruned


def counted(rows: Sequence[dict[str, str | int | float]]) -> list[Counted]:
    """The report's sets, for one query, and where there are levels for a thousand."""
    found: dict[tuple[str, int], Counted] = {}
    for row in rows:
        if row["table"] != "search sets: what was read" or row["kind"] == "flat":
            continue
        if row["kind"] == "halves" and int(row["queries"]) > 1:
            continue  # several queries read both halves at once
        n, d = int(row["gallery"]), int(row["d"])
        head = str(row["kind"]).removeprefix("levels, ").partition(" ")[0]
        first = int(head) if head.isdigit() else -(-d // 2)
        name, queries = str(row["set"]), int(row["queries"])
        found[name, queries] = Counted(name, queries, n, d, first, float(row["left_after_first_level"]))
    return list(found.values())


def times(gpu: Gpu, case: Counted) -> Times:
    """Both searches' lower bounds, in microseconds; launches are not in them.

    Raises ValueError for a GPU without int8 instructions.
    """
    peak = gpu.peak("int8")
    if peak is None:
        raise ValueError(f"gpu: expected one with int8 tensor-core instructions, got {gpu.name}")
    second = gpu.gbytes * 1e3  # bytes a microsecond
    pitch = -(-case.d // LINE) * LINE
    pairs = case.queries * case.rows

    def products(depth: int) -> float:
        return 2.0 * pairs * (-(-depth // DEPTH) * DEPTH) / (peak * 1e6)

    whole = max(case.rows * (pitch + META) / second, products(pitch))
    first = max(case.rows * (case.first + META) / second, products(case.first))
    return Times(whole, first + case.left * pairs * case.tail / second)


def main() -> None:
    rows = json.loads(REPORT.read_text())["rows"]
    print("| set, queries | first level | left over |", " | ".join(gpu.name for gpu in GPUS), "|")
    print("|---|--:|--:|" + "--:|" * len(GPUS))
    for case in counted(rows):
        cells = [f"{t.whole:,.0f} → {t.pruned:,.0f} µs ({t.gain:.1f} ×)" for t in (times(g, case) for g in GPUS)]
        what = f"{case.name}, {case.queries:,} × {case.rows:,} × {case.d}"
        print(f"| {what} | {case.first} of {case.d} bytes | {100 * case.left:.2f} % |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
