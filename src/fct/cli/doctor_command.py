"""``fct doctor``: which backends are right here, and which fastest."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fct.cli.console import console, error_console
from fct.cli.reasons import Reasons
from fct.types import JsonDict

__all__ = ["doctor"]


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


def _show(report: JsonDict) -> None:
    from rich.table import Table
    from rich.text import Text

    for name, what in report["devices"].items():
        console.print(f"{name}: {what}", highlight=False)
    reasons = Reasons()
    table = Table("what", "backend", "precision", "device", "verdict", "worst error")
    for f in report["findings"]:
        colour = {"right": "green", "wrong": "bold red"}.get(f["verdict"], "dim")
        error = "" if f["worst_error"] is None else f"{f['worst_error']:.1e}"
        verdict = Text(f"{f['verdict']} {reasons.of(f['detail'].split('; '))}".rstrip(), colour)
        table.add_row(f["op"], f["backend"], f["precision"], f["device"], verdict, error)
    console.print(table)
    reasons.show()
    table = Table("what", "rows or queries", "precision", "device", "fastest", "a second")
    for t in sorted(report["fastest"], key=lambda t: (t["op"], t["device"], t["precision"], t["rows"])):
        speed = f"{t['rows'] / t['seconds']:,.0f}"
        table.add_row(t["op"], f"{t['rows']:,}", t["precision"], t["device"], t["backend"], speed)
    console.print(table)
    if report["remembered"]:
        console.print(
            "fct asks the fastest first on this GPU from now on; delete "
            f"{report['remembered']} to have it prove and choose anew",
            highlight=False,
        )
