"""Rows of measurements -> results.json, results.md and plots. A table measured again replaces its old rows."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fct.report.bench import processor

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


def write(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Merges ``rows`` into the folder's report and draws the plots; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "results.json"
    fresh = {row["table"] for row in rows}
    old = json.loads(source.read_text())["rows"] if source.is_file() else []
    merged = sorted([row for row in old if row["table"] not in fresh] + list(rows), key=lambda row: row["table"])
    source.write_text(json.dumps({"rows": merged}, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(merged))
    return [source, folder / "results.md", *plots(merged, folder)]


def plots(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """PNG files for the tables that have a picture; tables that were not measured have none."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    for table, draw in PLOTS.items():
        mine = [row for row in rows if row["table"] == table]
        if mine:
            path = folder / f"{table.replace(' ', '-')}.png"
            draw(mine, rows, path)
            written.append(path)
    return written


def _lines(x: str, y: str, series: str, title: str) -> Any:
    """Log-log lines of y over x, one per series."""

    def draw(mine: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], path: Path) -> None:
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
        for name in dict.fromkeys(row[series] for row in mine):
            points = sorted((row[x], row[y]) for row in mine if row[series] == name and row.get(y))
            style = {"linewidth": 2} if str(name).startswith("fct") else {"linestyle": "--", "linewidth": 1}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
        axes.set(xscale="log", yscale="log", xlabel=x.replace("_", " "), ylabel=y.replace("_", " "), title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)

    return draw


def _roofline(mine: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Attained GFLOP/s of everybody under the machine's roofs; the abscissa is operations per byte of a block's
    inputs, outputs and one reading of the weights."""
    from matplotlib import pyplot

    peaks = {row["what"]: row for row in rows if row["table"] == "peaks"}
    memory = next((row["gb_per_s"] for what, row in peaks.items() if what.startswith("memory")), None)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
    x = [2.0**i for i in range(-1, 13)]
    for colour, precision in zip(("tab:blue", "tab:orange", "tab:green"), ("fp32", "bf16", "int8"), strict=True):
        roof = max((row["gflops"] for what, row in peaks.items() if what.startswith(f"{precision} ")), default=None)
        if roof and memory:
            axes.plot(x, [min(roof, memory * i) for i in x], color=colour, label=f"{precision} roof")
        for row in mine:
            if row.get("precision") == precision and row.get("gflops"):
                ours = row["peer"].startswith("fct")
                axes.plot(row["flop_per_byte"], row["gflops"], "o" if ours else "x", color=colour)
                axes.annotate(
                    f"{row['peer']} ({row['rows']:,})", (row["flop_per_byte"], row["gflops"]), fontsize=5,
                    textcoords="offset points", xytext=(4, -2),
                )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s", title="Roofline")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# table -> how it is drawn
PLOTS: dict[str, Any] = {
    "transform": _roofline,
    "transform rows": _lines("rows", "rows_per_s", "peer", "Transformation: rows a second against batch"),
    "transform inner": _lines("inner", "rows_per_s", "peer", "Transformation: rows a second against inner width"),
    "gpu transform": _lines("rows", "rows_per_s", "who", "Transformation on a GPU: rows a second against batch"),
    "transform dims": _lines("d", "rows_per_s", "peer", "Transformation: rows a second against dimensions"),
}
