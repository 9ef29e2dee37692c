"""``fct evaluate``: the measures of one retrieval system from vectors and labels wherever they lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fct.cli.console import console
from fct.cli.named_arrays import named_as_options, named_labels, named_vectors
from fct.cli.storage_option import StorageOption
from fct.options.groups import storage_options

__all__ = ["evaluate"]

_WHERE = "a file, folder, glob or URL, with :COLUMN where there are several"


def evaluate(
    queries: Annotated[str, typer.Option(help=f"(n, d): {_WHERE}.")],
    query_labels: Annotated[str, typer.Option(help=f"(n,): {_WHERE}; integers or text.")],
    gallery: Annotated[str | None, typer.Option(help="(m, d), likewise; without: the queries' own rows.")] = None,
    gallery_labels: Annotated[str | None, typer.Option(help="(m,), likewise; without: the queries' labels.")] = None,
    metric: Annotated[str, typer.Option(help="l2, ip or cosine.")] = "l2",
    same_items: Annotated[
        bool, typer.Option("--same-items", help="The gallery holds the queries' items in order: leave each one's own.")
    ] = False,
    k: Annotated[list[int] | None, typer.Option(help="CMC top-k besides 1 and 5; may be repeated.")] = None,
    bootstrap: Annotated[int, typer.Option(help="Resamples for the 95 % confidence intervals; 0: none.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the figures there, as JSON.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    storage_option: StorageOption = None,
) -> None:
    """Measure CMC and mean average precision of queries against a gallery, exactly.

    Example: fct evaluate --queries new.npy --query-labels y.npy --gallery g.parquet:embedding --gallery-labels
    g.parquet:label
    """
    from rich.table import Table

    import fct
    from fct.atomic_files import refuse_existing, write_text

    if out is not None:
        refuse_existing(out, overwrite=overwrite, name="--out")
    access: dict[str, Any] = {"storage_options": storage_options(storage_option)}
    rows = named_vectors(queries, "--queries", **access)
    others = None if gallery_labels is None else named_labels(gallery_labels, "--gallery-labels", **access)
    options = {"queries": "--queries", "query_labels": "--query-labels"}
    options |= {"gallery": "--queries" if gallery is None else "--gallery", "gallery_labels": "--gallery-labels"}
    with named_as_options(options):
        found = fct.evaluate(
            rows,
            rows if gallery is None else named_vectors(gallery, "--gallery", **access),
            named_labels(query_labels, "--query-labels", **access),
            others,
            metric=metric,
            same_items=same_items or gallery is None,
            ks=tuple(k or ()),
            bootstrap=bootstrap,
            seed=seed,
        )
    table = Table("measure", "%", "95 % interval")
    for name, label, value in [("map", "mAP", found.map)] + [
        (f"cmc{n}", f"CMC top-{n}", v) for n, v in found.cmc.items()
    ]:
        pair = found.intervals.get(name)
        table.add_row(
            label, f"{100 * value:.2f}", "" if pair is None else f"{100 * pair[0]:.2f} to {100 * pair[1]:.2f}"
        )
    console.print(table)
    console.print(f"{found.queries} queries; {found.queries_without_match} more have no match and were left out")
    if out is not None:
        write_text(out, json.dumps(found.to_dict(), indent=2) + "\n")
        console.print(f"wrote {out}")
