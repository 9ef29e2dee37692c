"""``fct info``: what was built and what runs here."""

from __future__ import annotations

from fct.cli.console import console
from fct.cli.reasons import Reasons

__all__ = ["info"]


def info() -> None:
    """Show what was built, what runs here, and why not.

    Example: fct info
    """
    from rich.table import Table

    from fct.info import build_info

    facts = build_info()
    console.print(f"fct {facts['version']}, Python {facts['python']}, {facts['platform']}")
    console.print(f"{facts['threads']} threads by default: {facts['threads_from']}")
    notes = Reasons()
    table = Table("backend", "device", "runs")
    for name, state in facts["backends"].items():
        table.add_row(name, state["device"], "yes" if state["runs"] else notes.no(state["why_not"]))
    console.print(table)
    table = Table("search", "device", "runs", "proved there")
    for name, state in facts["searches"].items():
        proved = "; ".join(f"{what}: {verdict or 'right'}" for what, verdict in state["proved"].items())
        table.add_row(name, state["device"], "yes" if state["runs"] else notes.no(state["why_not"]), proved)
    console.print(table)
    notes.show()
