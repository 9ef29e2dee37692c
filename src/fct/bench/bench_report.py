"""The figures of ``fct bench``, as facts, tables, Markdown and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import fct
from fct.bench.measure import STATES
from fct.ops.backend import PRECISIONS
from fct.types import JsonDict

__all__ = ["NEIGHBOURS", "BenchReport"]

NEIGHBOURS = 10  # of the search that is timed


@dataclass(frozen=True)
class BenchReport:
    """What :func:`run_bench` measured; every list holds plain dicts.

    machine: processor, threads, instruction set. peaks: GFLOP/s by precision, memory and cache GB/s.
    auto: what ``precision="auto"`` takes for this h, here. transform: a row per who, precision, batch and
    state (warm, or after a pause), those that differ from the reference or are not installed with a ``status`` instead
    of times; no figure of a batch stands anywhere else. weights: the time to read the packed weights once, measured
    beside one row. search: a row per who and number of queries. to_come: per precision and
    number of rows the seconds h alone takes here and the bytes read and written as float32.
    """

    h: JsonDict
    machine: JsonDict
    peaks: dict[str, float]
    auto: str
    transform: list[JsonDict] = field(default_factory=list)
    weights: list[JsonDict] = field(default_factory=list)
    search: list[JsonDict] = field(default_factory=list)
    to_come: list[JsonDict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> JsonDict:
        return asdict(self)

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, columns, cells) for the terminal and for Markdown; the first line of each column names its unit."""
        shown = [
            *self._transform_tables(),
            (
                "One row against reading the packed weights once",
                ["precision", "state", "ms to read the weights", "of one row's time", "weights"],
                [self._weights_cells(w) for w in self.weights],
            ),
        ]
        if self.search:
            first = self.search[0]
            title = f"Exact search, {first['gallery']:,} x {first['d']}, inner product, k = {NEIGHBOURS}"
            cells = [self._search_cells(r) for r in self.search]
            shown.append((title, ["who", "queries", "ms", "queries a second"], cells))
        title = "What h alone would take here, by the largest batch (reading and writing come on top)"
        cells = [self._to_come_cells(r) for r in self.to_come]
        shown.append((title, ["precision", "rows", "time", "read", "written"], cells))
        return shown

    def _transform_tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        shown = []
        for rows, state in sorted(dict.fromkeys((r["rows"], r["state"]) for r in self.transform), key=_in_order):
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
                if (r["rows"], r["state"]) == (rows, state)
            ]
            columns = ["who", "precision", "rows/s", "ms", "GFLOP/s", "of the peak"]
            shown.append((f"Transformation, batches of {rows:,}, {state}", columns, cells))
        return shown

    def _search_cells(self, r: JsonDict) -> list[str]:
        figures = [r["status"], ""] if r["status"] != "ok" else [f"{r['ms']:,.1f}", f"{r['queries_per_s']:,.0f}"]
        return [r["who"], f"{r['queries']:,}", *figures]

    def _to_come_cells(self, r: JsonDict) -> list[str]:
        precision = r["precision"] + (" (auto)" if r["precision"] == self.auto else "")
        read, written = _bytes(r["bytes_read"]), _bytes(r["bytes_written"])
        return [precision, f"{r['rows']:,}", _duration(r["seconds"]), read, written]

    def _weights_cells(self, w: JsonDict) -> list[str]:
        """One row's own time stands in its table; here is only what share of it reading the weights is."""
        key = {"who": "fct", "precision": w["precision"], "rows": 1, "state": w["state"], "status": "ok"}
        row = next((r for r in self.transform if all(r[name] == value for name, value in key.items())), None)
        share = "" if row is None else f"{100 * w['ms'] / row['ms']:.0f} %"
        return [w["precision"], w["state"], f"{w['ms']:.3g}", share, _bytes(w["bytes"])]

    def facts(self) -> list[str]:
        """Sentences above the tables."""
        ops = ", ".join(f"{self.peaks[p]:,.0f} ({p})" for p in PRECISIONS)
        return [
            f"{self.h['what']}: {self.h['mflop_per_row']:.1f} MFLOP a row; precision=auto takes {self.auto}.",
            "Warm: called again and again. After a pause: each call after a rest and everybody else's, with their "
            "weights in the caches and its own threads asleep. "
            "fct is called as fct.transform_batch.",
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


def _in_order(batch: tuple[int, str]) -> tuple[int, int]:
    return -batch[0], STATES.index(batch[1])


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
