"""The figures of ``fct bench``, as facts, tables, Markdown and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import fct
from fct.ops.backend import PRECISIONS

__all__ = ["NEIGHBOURS", "BenchReport"]

NEIGHBOURS = 10  # of the search that is timed


@dataclass(frozen=True)
class BenchReport:
    """What :func:`run_bench` measured; every list holds plain dicts.

    machine: processor, threads, instruction set. peaks: GFLOP/s by precision, memory and cache GB/s.
    auto: what ``precision="auto"`` takes for this h, here. transform: a row per who, precision and batch, those that
    differ from the reference or are not installed with a ``status`` instead of times. one_row: latency beside the
    time to read the packed weights once. search: a row per who and number of queries. to_come: per precision and
    number of rows the seconds h alone takes here and the bytes read and written as float32.
    """

    h: dict[str, Any]
    machine: dict[str, Any]
    peaks: dict[str, float]
    auto: str
    transform: list[dict[str, Any]] = field(default_factory=list)
    one_row: list[dict[str, Any]] = field(default_factory=list)
    search: list[dict[str, Any]] = field(default_factory=list)
    to_come: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, columns, cells) for the terminal and for Markdown; the first line of each column names its unit."""
        shown = []
        for rows in sorted({r["rows"] for r in self.transform}, reverse=True):
            cells = [
                [r["who"], r["precision"], r["status"], "", "", ""]
                if r["status"] != "ok"
                else [
                    r["who"],
                    r["precision"],
                    f"{r['rows_per_s']:,.0f}",
                    f"{r['ms']:.3g}",
                    f"{r['gflops']:,.0f}",
                    f"{100 * r['share_of_peak']:.0f} %",
                ]
                for r in self.transform
                if r["rows"] == rows
            ]
            columns = ["who", "precision", "rows/s", "ms", "GFLOP/s", "of the peak"]
            shown.append((f"Transformation, batches of {rows:,}", columns, cells))
        shown.append(
            (
                "One row: latency against reading the packed weights once",
                ["precision", "ms", "ms to read the weights", "weights"],
                [
                    [r["precision"], f"{r['ms']:.3f}", f"{r['ms_reading_weights']:.3f}", _bytes(r["weight_bytes"])]
                    for r in self.one_row
                ],
            )
        )
        if self.search:
            first = self.search[0]
            shown.append(
                (
                    f"Exact search, {first['gallery']:,} x {first['d']}, inner product, k = {NEIGHBOURS}",
                    ["who", "queries", "ms", "queries a second"],
                    [
                        [r["who"], f"{r['queries']:,}", r["status"], ""]
                        if r["status"] != "ok"
                        else [r["who"], f"{r['queries']:,}", f"{r['ms']:,.1f}", f"{r['queries_per_s']:,.0f}"]
                        for r in self.search
                    ],
                )
            )
        shown.append(
            (
                "What h alone would take here, by the largest batch (reading and writing come on top)",
                ["precision", "rows", "time", "read", "written"],
                [
                    [
                        r["precision"] + (" (auto)" if r["precision"] == self.auto else ""),
                        f"{r['rows']:,}",
                        _duration(r["seconds"]),
                        _bytes(r["bytes_read"]),
                        _bytes(r["bytes_written"]),
                    ]
                    for r in self.to_come
                ],
            )
        )
        return shown

    def facts(self) -> list[str]:
        """Sentences above the tables."""
        ops = ", ".join(f"{self.peaks[p]:,.0f} ({p})" for p in PRECISIONS)
        return [
            f"{self.h['what']}: {self.h['mflop_per_row']:.1f} MFLOP a row; precision=auto takes {self.auto}.",
            f"{self.machine['processor']}, {self.machine['threads']} threads, {self.machine['isa']}.",
            f"Its own peaks in this run: {ops} GFLOP/s on registers alone; reads {self.peaks['memory_gb_per_s']:.0f} "
            f"GB/s from memory, {self.peaks['cache_gb_per_s']:.0f} GB/s from a 12 MB block.",
            *self.notes,
        ]

    def markdown(self) -> str:
        parts = [f"# fct bench\n\nfct {fct.__version__}\n", *(f"- {fact}" for fact in self.facts()), ""]
        for title, columns, cells in self.tables():
            parts += [f"## {title}\n", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            parts += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in cells] + [""]
        return "\n".join(parts)


def _bytes(n: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    while n >= 1000 and len(units) > 1:
        n /= 1000
        units.pop(0)
    return f"{n:.3g} {units[0]}"


def _duration(seconds: float) -> str:
    for size, unit in ((86_400.0, "days"), (3_600.0, "hours"), (60.0, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
