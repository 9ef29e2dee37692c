"""``fct evaluate``: the measures of one retrieval system from vectors and labels wherever they lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fct.cli.console import console
from fct.cli.named_arrays import named_as_options, named_labels, named_vectors
from fct.cli.storage_option import StorageOption
from fct.options.groups import storage_options

if TYPE_CHECKING:
    from fct.judging.group_losses import GroupLosses

__all__ = ["evaluate"]

_WHERE = "a file, folder, glob or URL, with :COLUMN where there are several"


def evaluate(
    queries: Annotated[str, typer.Option(help=f"(n, d): {_WHERE}.")],
    query_labels: Annotated[str, typer.Option(help=f"(n,): {_WHERE}; integers or text.")],
    gallery: Annotated[str | None, typer.Option(help="(m, d), likewise; without: the queries' own rows.")] = None,
    gallery_labels: Annotated[str | None, typer.Option(help="(m,), likewise; without: the queries' labels.")] = None,
    groups: Annotated[
        str | None, typer.Option(help=f"(n,) the queries' groups: {_WHERE}; who is served worst?")
    ] = None,
    before_queries: Annotated[
        str | None, typer.Option(help="The same queries before an upgrade: with --groups, who loses by it?")
    ] = None,
    before_gallery: Annotated[str | None, typer.Option(help="The gallery's rows before, where it has its own.")] = None,
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
    if groups is None and (before_queries, before_gallery) != (None, None):
        raise ValueError(
            "--before-queries, --before-gallery: expected --groups beside them, which says whose loss to look at"
        )
    if before_queries is not None and (gallery is None) != (before_gallery is None):
        want = "none, since the queries are the gallery" if gallery is None else "the rows that --gallery had before"
        raise ValueError(f"--before-gallery: expected {want}, got {before_gallery}")
    if before_queries is None and before_gallery is not None:
        raise ValueError("--before-queries: expected the queries before the upgrade beside --before-gallery, got none")
    own_labels = named_labels(query_labels, "--query-labels", **access)

    def measured(asked: Any, answering: Any, resamples: int) -> fct.RetrievalMetrics:
        return fct.evaluate(
            asked,
            answering,
            own_labels,
            others,
            metric=metric,
            same_items=same_items or gallery is None,
            ks=tuple(k or ()),
            bootstrap=resamples,
            seed=seed,
        )

    losses = None
    with named_as_options(options):
        found = measured(rows, rows if gallery is None else named_vectors(gallery, "--gallery", **access), bootstrap)
    if groups is not None:
        before = found
        if before_queries is not None:
            earlier = named_vectors(before_queries, "--before-queries", **access)
            instead = earlier if before_gallery is None else named_vectors(before_gallery, "--before-gallery", **access)
            with named_as_options({name: f"--before-{name}" for name in ("queries", "gallery")}):
                before = measured(earlier, instead, 0)
        with named_as_options({"groups": "--groups"}):
            losses = fct.who_loses(before, found, named_labels(groups, "--groups", **access))
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
    if losses is not None:
        _show_groups(losses, since=before_queries is not None)
    if out is not None:
        extra = {} if losses is None else {"groups": losses.to_dict()}
        write_text(out, json.dumps(found.to_dict() | extra, indent=2) + "\n")
        console.print(f"wrote {out}")


def _show_groups(losses: GroupLosses, *, since: bool) -> None:
    """Group by group, the greatest loss first; without a before the group that is served worst."""
    from rich.table import Table

    from fct.judging.group_losses import SHOWN

    console.print("")
    order = losses.groups if since else tuple(sorted(losses.groups, key=lambda g: (g.after, g.name)))
    table = Table(
        "group",
        "queries",
        *(("before %", "after %", "change", "negative flips %", "beyond chance") if since else ("CMC top-1 %",)),
    )
    for g in (losses.overall, *order[:SHOWN]):
        after = f"{100 * g.after:.1f}"
        if since:
            change, flips = f"{100 * g.change:+.1f}", f"{100 * g.negative_flips:.1f}"
            table.add_row(
                g.name, f"{g.queries:,}", f"{100 * g.before:.1f}", after, change, flips, "loses" if g.loses else ""
            )
        else:
            table.add_row(g.name, f"{g.queries:,}", after)
    console.print(table)
    if len(order) > SHOWN:
        console.print(f"and {len(order) - SHOWN:,} more groups; --out writes all of them")
    if losses.gap_before is not None and losses.gap_after is not None:
        was = f"{100 * losses.gap_before:.1f} points before, " if since else ""
        console.print(
            f"worst group of at least 10 queries: {was}{100 * losses.gap_after:.1f} points below the mean of all"
        )
