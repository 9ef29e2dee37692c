"""Rows of measurements -> results.json, results.md and plots. A table measured again replaces its old rows."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fct.bench.throughput import processor

PACKAGES = (
    "numpy",
    "torch",
    "faiss-cpu",
    "onnxruntime",
    "openvino",
    "usearch",
    "scikit-learn",
    "triton",
    "faiss-gpu-cu12",
    "cuvs-cu12",
    "cuvs-cu13",
)


def _commit() -> str:
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()


def context(arguments: Sequence[str]) -> dict[str, Any]:
    """Where a row comes from: commit, machine, versions, command."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "commit": _commit(),
        "machine": f"{processor()}, {platform.system()} {platform.machine()}",
        "versions": versions,
        "command": "pytest " + " ".join(Path(a).name if a.startswith("/") else a for a in arguments),
    }


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One table per name, its columns in the order in which the fields first come."""
    parts = ["# Measurements\n"]
    for table in dict.fromkeys(row["table"] for row in rows):
        mine = [row for row in rows if row["table"] == table]
        columns = [c for c in dict.fromkeys(key for row in mine for key in row) if c not in ("table", "context")]
        origin = mine[0]["context"]
        parts.append(f"## {table}\n")
        parts.append(f"Commit {origin['commit']}; {origin['machine']}; `{origin['command']}`.\n")
        parts.append("| " + " | ".join(columns) + " |")
        parts.append("|" + "---|" * len(columns))
        parts += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in mine]
        parts.append("")
    return "\n".join(parts)


def save(rows: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Merges ``rows`` into the folder's results.json and results.md; returns all rows."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "results.json"
    fresh = {row["table"] for row in rows}
    old = json.loads(source.read_text())["rows"] if source.is_file() else []
    merged = sorted([row for row in old if row["table"] not in fresh] + list(rows), key=lambda row: row["table"])
    source.write_text(json.dumps({"rows": merged}, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(merged))
    return merged


def write(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """:func:`save`, and the plots; returns what was written."""
    merged = save(rows, folder)
    return [folder / "results.json", folder / "results.md", *plots(merged, folder)]


def plots(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """PNG files for the tables that have a picture; tables that were not measured have none."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    for table, draw in PLOTS.items():
        mine = [row for row in rows if row["table"] == table and row.get("state", "warm") == "warm"]
        if mine:
            path = folder / f"{table.replace(' ', '-')}.png"
            draw(mine, rows, path)
            written.append(path)
    return written


# field of a row -> what its axis is called; other fields by their own name
_AXES = {"d": "dimensions", "inner": "inner width", "gallery": "rows in the gallery", "ms": "milliseconds"}


def _style(name: str) -> dict[str, Any]:
    return {"linewidth": 2} if name.startswith("fct") else {"linestyle": "--", "linewidth": 1}


def _lines(x: str, y: str, series: str, title: str, by: str | None = None) -> Any:
    """Log-log lines of y over x, one per series (and per value of ``by``); labels stand beside the axes."""

    def draw(mine: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], path: Path) -> None:
        from matplotlib import pyplot
        from matplotlib.ticker import NullLocator

        figure, axes = pyplot.subplots(figsize=(8.5, 4.5), constrained_layout=True)
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in mine:
            if row.get(y):
                name = str(row[series]) + (f", {by} = {row[by]:,}" if by else "")
                lines.setdefault(name, []).append((row[x], row[y]))
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name, **_style(name))
        axes.set(
            xscale="log", yscale="log", xlabel=_AXES.get(x, x), ylabel=_AXES.get(y, y.replace("_per_s", " a second"))
        )
        axes.set_title(title, fontsize=10)
        ticks = sorted({row[x] for row in mine})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(axis="y", which="both", labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)

    return draw


def peaks_of(machine: str, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The peaks by name, of this machine alone: tables are measured one by one, the last one may be another's."""
    return {row["what"]: row for row in rows if row["table"] == "peaks" and row["context"]["machine"] == machine}


def _roofline(mine: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Attained GFLOP/s of everybody under the machine's roofs: colour is precision, the marker who it is. The
    abscissa is operations per byte of a batch's inputs, outputs and one reading of the weights."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    peaks = peaks_of(mine[0]["context"]["machine"], rows)
    reads = {
        name: next((row["gb_per_s"] for what, row in peaks.items() if what.startswith(name)), None)
        for name in ("memory", "cache")
    }
    points = [row for row in mine if row.get("gflops") and "one thread" not in row["peer"]]
    figure, axes = pyplot.subplots(figsize=(9, 5), constrained_layout=True)
    axes.set(xscale="log", yscale="log")
    x = [2.0 ** (i / 4) for i in range(-8, 53)]
    colours = dict(zip(("fp32", "bf16", "int8"), ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for precision, colour in colours.items():
        roof = max((row["gflops"] for what, row in peaks.items() if what.startswith(f"{precision} ")), default=None)
        for name, line in (("memory", "-"), ("cache", ":")):
            if roof and reads[name]:
                axes.plot(x, [min(roof, reads[name] * i) for i in x], line, color=colour, linewidth=1)
        if roof:
            axes.text(120, roof * 1.06, f"{precision} {roof:,.0f}", color=colour, fontsize=8)
    names = sorted({row["peer"] for row in points}, key=lambda name: (not name.startswith("fct"), name))
    markers = dict(zip(names, "*osD^v<>Pph8", strict=False))
    for row in points:
        ours = row["peer"].startswith("fct")
        axes.plot(
            row["flop_per_byte"], row["gflops"], markers[row["peer"]], color=colours[row["precision"]],
            markersize=12 if ours else 6, markerfacecolor=None if ours else "none",
        )  # fmt: skip
    for rows_of_batch in sorted({row["rows"] for row in points}):
        at = [row for row in points if row["rows"] == rows_of_batch]
        centre = sum(row["flop_per_byte"] for row in at) / len(at)
        label = f"{rows_of_batch:,} row" + ("s" if rows_of_batch > 1 else "")
        axes.text(centre, 0.03, label, fontsize=8, ha="center", transform=axes.get_xaxis_transform())
    axes.set_ylim(bottom=min(row["gflops"] for row in points) / 3)
    handles = [
        Line2D([], [], linestyle="", marker=markers[n], color="black", label=n,
               markersize=10 if n.startswith("fct") else 6,
               markerfacecolor="black" if n.startswith("fct") else "none")
        for n in names
    ]  # fmt: skip
    handles += [Line2D([], [], color=colour, label=precision) for precision, colour in colours.items()]
    handles += [
        Line2D([], [], color="grey", linestyle=line, label=f"reads from {name}, {reads[name]:.0f} GB/s")  # type: ignore[arg-type]
        for name, line in (("memory", "-"), ("cache", ":"))
        if reads[name]
    ]
    axes.set(xlabel="operations per byte", ylabel="GFLOP/s")
    axes.set_title("The transformation under this machine's roofs, 128/128 to 128, inner 2048", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# table -> how it is drawn
PLOTS: dict[str, Any] = {
    "transform": _roofline,
    "transform rows": _lines("rows", "rows_per_s", "peer", "Transformation: rows a second against batch"),
    "transform inner": _lines("inner", "rows_per_s", "peer", "Transformation: rows a second against inner width"),
    "transform dims": _lines("d", "rows_per_s", "peer", "Transformation: rows a second against dimensions"),
    "gpu transform": _lines("rows", "rows_per_s", "who", "Transformation on a GPU: rows a second against batch"),
    "topk": _lines("queries", "queries_per_s", "who", "Exact search in 1,000,000 x 128", by="k"),
    "topk k": _lines("k", "ms", "who", "Exact search: 500 queries in 200,000 x 128"),
    "topk gallery": _lines("gallery", "ms", "who", "Exact search: 100 queries, 128 dimensions, k = 10"),
    "topk one query": _lines("gallery", "ms", "who", "Exact search: one query, 128 dimensions, k = 10"),
    "topk dims": _lines("d", "ms", "who", "Exact search: 500 queries in 100,000 rows, k = 10"),
}
