"""``fct doctor``: which backends are right here, and which fastest."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from fct.cli.app import app, console, error_console

__all__ = ["doctor"]


@app.command()
def doctor(
    full: Annotated[bool, typer.Option("--full", help="The paper's shape too, and up to a million rows.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON report on stdout, made to be mailed in.")] = False,
) -> None:
    """Hold every backend that runs here against the float64 reference, and time it.

    Exit code 1 where one disagrees.

    Example: fct doctor --full --json > report.json
    """
    from fct.doctor import examine

    with error_console.status("starting") as status:
        report = examine(full=full, progress=lambda what: status.update(what))
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
    else:
        _show(report.to_dict())
    if not report.healthy:
        raise typer.Exit(1)


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    for name, what in report["devices"].items():
        console.print(f"{name}: {what}", highlight=False)
    table = Table("backend", "precision", "device", "verdict", "worst error", "")
    for f in report["findings"]:
        colour = {"right": "green", "wrong": "bold red"}.get(f["verdict"], "dim")
        error = "" if f["worst_error"] is None else f"{f['worst_error']:.1e}"
        table.add_row(f["backend"], f["precision"], f["device"], f"[{colour}]{f['verdict']}[/]", error, f["detail"])
    console.print(table)
    table = Table("rows", "precision", "device", "fastest", "rows a second")
    for t in sorted(report["fastest"], key=lambda t: (t["device"], t["precision"], t["rows"])):
        table.add_row(f"{t['rows']:,}", t["precision"], t["device"], t["backend"], f"{t['rows'] / t['seconds']:,.0f}")
    console.print(table)
