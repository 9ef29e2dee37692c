"""``fct compare``: what could be done instead, on your own pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fct.cli.console import console
from fct.cli.named_arrays import named_as_options, named_labels, named_vectors
from fct.cli.storage_option import StorageOption
from fct.options.groups import storage_options
from fct.types import Array, StorageAccess

if TYPE_CHECKING:
    from fct.judging.alternatives import Comparison

__all__ = ["compare"]

_HEADINGS = (
    "",
    "recall@10 %",
    "CMC top-1 %",
    "mAP %",
    "fit s",
    "MFLOP a row",
    "1,000 rows/s",
    "bytes a row",
    "hours",
    "money",
)


def compare(
    pairs: Annotated[str, typer.Argument(help="A gallery with columns old, new and perhaps side, or an .npz.")],
    labels: Annotated[str | None, typer.Option(help="(n,) FILE:COLUMN, for CMC and mAP.")] = None,
    gallery: Annotated[str | None, typer.Option(help="The gallery's old vectors: do the pairs resemble it?")] = None,
    sample_rows: Annotated[int, typer.Option(help="Rows of the gallery looked at.", min=1)] = 4096,
    also: Annotated[str, typer.Option("--with", help="Also these, minutes each: paper,best.")] = "",
    metric: Annotated[str, typer.Option(help="l2, ip or cosine.")] = "l2",
    held_out: Annotated[float, typer.Option(help="Share of the pairs that is measured on, not fitted.")] = 0.2,
    curve: Annotated[
        str, typer.Option(help="The learning curve's method: auto (up to three more fits of h), ridge or none.")
    ] = "auto",
    rows: Annotated[float, typer.Option(help="Rows that hours and money are for.")] = 1e9,
    price_per_hour: Annotated[float | None, typer.Option(help="Of a machine like this one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split and the fits.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print every figure as JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the figures there, as JSON.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a bar on stderr.")] = True,
    storage_option: StorageOption = None,
) -> None:
    """Fit what could be done instead on the same pairs, and measure each on pairs held out.

    Example: fct compare pairs.parquet --rows 1e9 --price-per-hour 2.5
    """
    import fct
    from fct.atomic_files import refuse_existing, write_text

    if as_json and markdown:
        raise ValueError("--json: expected it without --markdown, got both")
    if out is not None:
        refuse_existing(out, overwrite=overwrite, name="--out")
    access: StorageAccess = {"storage_options": storage_options(storage_option)}
    found = _pairs(pairs, access)
    sample = None if gallery is None else _sample(gallery, sample_rows, seed, access)
    options = {"old": "PAIRS: old", "new": "PAIRS: new", "side_info": "PAIRS: side", "extra": "--with"}
    options |= {n: f"--{n.replace('_', '-')}" for n in ("labels", "gallery", "metric", "held_out", "curve", "rows")}
    with named_as_options(options | {"price_per_hour": "--price-per-hour", "seed": "--seed"}):
        result = fct.compare_alternatives(
            found["old"],
            found.get("side"),
            found["new"],
            labels=None if labels is None else named_labels(labels, "--labels", **access),
            gallery=sample,
            extra=tuple(name.strip() for name in also.split(",") if name.strip()),
            metric=metric,
            held_out=held_out,
            curve=curve,
            rows=rows,
            price_per_hour=price_per_hour,
            seed=seed,
            progress=progress,
        )
    if out is not None:
        write_text(out, result.to_json())
    if as_json:
        console.print_json(result.to_json())
    else:
        _show(result, markdown)
        if out is not None and not markdown:
            console.print(f"wrote {out}; as a page: fct report {out}", highlight=False, markup=False, soft_wrap=True)


def _pairs(pairs: str, access: StorageAccess) -> Mapping[str, Array]:
    from fct.gallery import load_pairs

    with named_as_options({"source": "PAIRS"}):
        found = load_pairs(pairs, name="PAIRS", **access)
    if not {"old", "new"} <= set(found):
        raise ValueError(f"PAIRS: expected arrays old and new, and perhaps side, got {', '.join(found)}")
    return found


def _sample(gallery: str, rows: int, seed: int, access: StorageAccess) -> Array:
    """Rows of the gallery by lot, in their order; (at most ``rows``, d_old) float32."""
    import numpy as np

    vectors = named_vectors(gallery, "--gallery", ("old",), **access)
    chosen = np.random.default_rng(seed).permutation(len(vectors))[:rows]
    return np.asarray(vectors[np.sort(chosen)], np.float32)


def _cells(result: Comparison) -> list[tuple[str, ...]]:
    def share(x: float | None) -> str:
        return "-" if x is None else f"{100 * x:.1f}"

    return [
        (
            row.name,
            share(row.recall_at_10),
            share(row.cmc1),
            share(row.map),
            f"{row.fit_seconds:.1f}",
            f"{row.mflop_per_row:.2f}" if row.mflop_per_row >= 0.01 else "< 0.01" if row.mflop_per_row else "0",
            "-" if row.rows_per_s is None else f"{row.rows_per_s / 1e3:,.0f}",
            str(row.bytes_per_row),
            f"{row.hours:,.0f}" if row.hours >= 100 else f"{row.hours:.3g}",
            "-" if row.cost is None else f"{row.cost:,.2f}",
        )
        for row in result.alternatives
    ]


def _columns(result: Comparison) -> list[tuple[str, ...]]:
    """The table by columns, those left out that hold no figure at all (no labels, no price)."""
    columns = zip(_HEADINGS, *_cells(result), strict=True)
    return [column for column in columns if any(cell != "-" for cell in column[1:])]


def _show(result: Comparison, markdown: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = _columns(result)
    headings, *lines = zip(*columns, strict=True)
    if markdown:
        for line in (headings, ("---", *["--:"] * (len(headings) - 1)), *lines):
            console.print(f"| {' | '.join(line)} |", highlight=False, soft_wrap=True)
        console.print("")
    else:
        table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
        # Widths are set: a heading may take lines, and so may a long name, but a figure is never cut.
        widths = [max(map(len, [*heading.split(), *cells])) for heading, *cells in columns[1:]]
        longest = max(map(len, columns[0]))
        table.add_column(
            "", width=max(12, min(longest, console.width - sum(widths) - 2 * len(widths))), overflow="fold"
        )
        for heading, width in zip(headings[1:], widths, strict=True):
            table.add_column(heading, justify="right", width=width)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for text in _notes(result):
        console.print(text, highlight=False, soft_wrap=True)
    for text in result.notes:
        console.say("note:", text, style="bold yellow")


def _notes(result: Comparison) -> list[str]:
    from fct.judging.pair_coverage import ONLY_PAIRS

    lines = [
        f"{result.train_pairs:,} pairs fitted, {result.held_out_pairs:,} held out, compared by {result.metric}; hours "
        f"are of {result.rows:,.0f} rows on a machine like this one"
    ]
    if result.ceiling:
        held = "; ".join(f"{name} {100 * value:.1f} %" for name, value in result.ceiling.items())
        lines.append(f"what the inputs know of the new space, by a k-NN oracle, from below: recall@10 of {held}")
    for point in result.curve:
        what = "" if point.measured else ", extrapolated"
        lines.append(
            f"{result.curve_of} on {point.pairs:,} pairs: {100 * point.recall:.1f} ± {100 * point.error:.1f} %{what}"
        )
    if result.unlike_gallery is not None and not any("resembles no pair" in note for note in result.notes):
        lines.append(f"{100 * result.unlike_gallery:.1f} % of the gallery's sample resembles no pair (expected: 1 %)")
    return [*lines, ONLY_PAIRS]
