"""``fct inspect``: what is wrong with stored vectors, before anything is fitted or mapped."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from fct.cli.console import console

__all__ = ["inspect"]


def inspect(
    gallery: Annotated[str, typer.Argument(help="A file, folder, glob, table or URL.")],
    vector_column: Annotated[str, typer.Option(help="Column of the vectors; auto: as a backfill finds it.")] = "auto",
    binary_dtype: Annotated[str, typer.Option(help="What a binary column holds: float32 or float16.")] = "float32",
    sample_rows: Annotated[int, typer.Option(help="Rows kept for the search for two models.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print every figure as JSON.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a bar on stderr.")] = True,
) -> None:
    """Read a gallery once and say what is wrong with its vectors: missing, zero, double, of several lengths or models.

    Example: fct inspect gallery/
    """
    import fct

    found = fct.inspect_gallery(
        gallery, vector_column=vector_column, binary_dtype=binary_dtype, sample_rows=sample_rows, progress=progress
    )
    if as_json:
        console.print_json(json.dumps(asdict(found)))
        return
    console.print(
        f"{found.source}: {found.rows:,} rows of {found.dim} dimensions in {found.column!r}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"model: {found.space or 'not said'}", highlight=False)
    low, _, middle, _, high = found.norms
    console.print(
        f"length: {low:.4g} to {high:.4g}, median {middle:.4g}; {100 * found.unit_share:.1f} % of unit length",
        highlight=False,
    )
    for finding in found.findings:
        console.print(f"- {finding}", highlight=False, soft_wrap=True)
    if not found.findings:
        console.print("nothing to complain of", highlight=False)
