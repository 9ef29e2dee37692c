"""``fct bench``: what h and a search cost on this machine, beside the peers that are installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fct.cli.console import console

__all__ = ["bench"]


def bench(
    transformation: Annotated[
        Path | None, typer.Option(help="h, a .safetensors file; without: an untrained one of the sizes below.")
    ] = None,
    old: Annotated[int, typer.Option(help="Dimensions of the old embedding.")] = 128,
    side: Annotated[int, typer.Option(help="Dimensions of the side-information.")] = 128,
    new: Annotated[int, typer.Option(help="Dimensions of the new embedding.")] = 128,
    inner: Annotated[int, typer.Option(help="Width of the mixer's inner layers.")] = 2048,
    threads: Annotated[int | None, typer.Option(help="By default FCT_NUM_THREADS or all processors.")] = None,
    peers: Annotated[bool, typer.Option(help="Also torch, ONNX Runtime, OpenVINO and FAISS.")] = True,
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write every figure there, as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables there, as Markdown.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output files.")] = False,
) -> None:
    """Measure h and an exact search on this machine, and say how long a gallery would take.

    Under a minute. The machine's own peaks come first; every peer's result is compared before it is timed.

    Example: fct bench --transformation h.safetensors --json bench.json
    """
    from rich.table import Table

    from fct.artifact.transformation import Transformation
    from fct.atomic_files import refuse_existing, write_text
    from fct.bench.throughput import run_bench
    from fct.fit.precision_choice import calibrate
    from fct.progress import step_bar

    for path, name in ((as_json, "--json"), (markdown, "--markdown")):
        if path is not None:
            refuse_existing(path, overwrite=overwrite, name=name)
    if threads is not None and threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {threads}")
    if transformation is not None:
        h = Transformation.load(transformation)
    else:
        from fct.bench.throughput import inputs_of

        h = Transformation.random(old, side, new, inner=inner)
        h = calibrate(h, *inputs_of(h, 1024))
    with step_bar(True) as bar:
        task = bar.add_task("starting", total=1.0)
        report = run_bench(
            h,
            threads=threads,
            peers=peers,
            progress=lambda share, what: bar.update(task, completed=share, description=what),
        )
    for fact in report.facts():
        console.print(fact, highlight=False)
    for title, names, cells in report.tables():
        table = Table(*names, title=title, title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in cells:
            table.add_row(*row)
        console.print(table)
    if as_json is not None:
        write_text(as_json, json.dumps(report.to_dict(), indent=1) + "\n")
        console.print(f"wrote {as_json}")
    if markdown is not None:
        write_text(markdown, report.markdown())
        console.print(f"wrote {markdown}")
