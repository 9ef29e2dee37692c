"""``fct info``: what was built and what runs here."""

from __future__ import annotations

from fct.cli.app import app, console

__all__ = ["info"]


@app.command()
def info() -> None:
    """Show what was built, what runs here, and why not.

    Example: fct info
    """
    from rich.table import Table

    from fct.info import build_info

    facts = build_info()
    console.print(f"fct {facts['version']}, Python {facts['python']}, {facts['platform']}, {facts['threads']} threads")
    table = Table("backend", "device", "runs", "why not")
    for name, state in facts["backends"].items():
        table.add_row(name, state["device"], "yes" if state["runs"] else "no", "; ".join(state["why_not"]))
    console.print(table)
    table = Table("search", "device", "runs", "why not", "proved there")
    for name, state in facts["searches"].items():
        proved = "; ".join(f"{what}: {verdict or 'right'}" for what, verdict in state["proved"].items())
        why = "; ".join(state["why_not"])
        table.add_row(name, state["device"], "yes" if state["runs"] else "no", why, proved)
    console.print(table)
    if facts["cuda_build"]:
        console.print(f"CUDA kernels: {facts['cuda_build']}")
