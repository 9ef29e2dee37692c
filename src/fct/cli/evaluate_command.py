"""``fct evaluate``: the measures of one retrieval system from vectors and labels wherever they lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fct.cli.console import console
from fct.cli.evaluate_judged import Judged, Limits, judged_upgrade, one_system, rerank_on_pairs
from fct.cli.named_arrays import named_as_options, named_labels, named_vectors
from fct.cli.storage_option import StorageOption
from fct.options.groups import storage_options
from fct.types import Array, StorageAccess

if TYPE_CHECKING:
    import fct
    from fct.judging.group_losses import GroupLosses

__all__ = ["DEPTHS", "evaluate"]

DEPTHS = (10, 20, 50, 100, 200, 500)

_WHERE = "a file, folder, glob or URL, with :COLUMN where there are several"


def evaluate(
    queries: Annotated[str | None, typer.Option(help=f"(n, d): {_WHERE}.")] = None,
    query_labels: Annotated[str | None, typer.Option(help=f"(n,): {_WHERE}; integers or text.")] = None,
    gallery: Annotated[str | None, typer.Option(help="(m, d), likewise; without: the queries' own rows.")] = None,
    gallery_labels: Annotated[str | None, typer.Option(help="(m,), likewise; without: the queries' labels.")] = None,
    groups: Annotated[
        str | None, typer.Option(help=f"(n,) the queries' groups: {_WHERE}; who is served worst?")
    ] = None,
    before_queries: Annotated[
        str | None, typer.Option(help="The same queries before an upgrade: with --groups, who loses by it?")
    ] = None,
    before_gallery: Annotated[str | None, typer.Option(help="The gallery's rows before, where it has its own.")] = None,
    qrels: Annotated[
        str | None,
        typer.Option(help="Judgements instead of labels: TREC, BEIR's tsv, or a table of query, item, grade."),
    ] = None,
    query_ids: Annotated[str | None, typer.Option(help="(n,), as the judgements name the queries.")] = None,
    min_ndcg: Annotated[float | None, typer.Option(help="Exit code 3 below this nDCG@10.")] = None,
    min_recall: Annotated[float | None, typer.Option(help="Exit code 3 below this recall@10, with --qrels.")] = None,
    allow_inconclusive: Annotated[
        bool, typer.Option("--allow-inconclusive", help="Exit code 0, not 5, where the queries decide nothing.")
    ] = False,
    transformation: Annotated[
        Path | None,
        typer.Option("-t", "--transformation", help="h, for --pairs; with --qrels it maps --before-gallery."),
    ] = None,
    side_info: Annotated[str | None, typer.Option(help="Side-information of --before-gallery, for h.")] = None,
    precision: Annotated[str, typer.Option(help="At which h maps: as the backfill would.")] = "auto",
    dtype: Annotated[str, typer.Option(help="In which the mapped rows are kept: float32 or float16.")] = "float32",
    pairs: Annotated[
        str | None, typer.Option(help="Held-out pairs (old, new, perhaps side): how deep should be ranked again?")
    ] = None,
    depth: Annotated[list[int] | None, typer.Option(help="Of that curve; may be repeated.")] = None,
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
    """Measure queries against a gallery, exactly: CMC and mAP by labels, or nDCG, MRR and recall by judgements.

    With --qrels and a before: go (exit 0), no-go (exit 3) or inconclusive (exit 5), as fct judge. With --pairs and -t:
    which quality ranking how many of the nearest mapped rows by their true vectors gives.

    Example: fct evaluate --queries new.npy --query-labels y.npy --gallery g.parquet:embedding --gallery-labels
    g.parquet:label
    """
    from fct.artifact.transformation import Transformation
    from fct.atomic_files import refuse_existing, write_text

    if out is not None:
        refuse_existing(out, overwrite=overwrite, name="--out")
    if pairs is not None and transformation is None:
        raise ValueError("--pairs: expected -t beside it, the transformation that maps them")
    if qrels is not None and query_labels is not None:
        raise ValueError("--qrels: expected it or --query-labels, got both")
    if depth and pairs is None:
        raise ValueError("--depth: expected --pairs beside it, on which depths are measured")
    h = None if transformation is None else Transformation.load(transformation)
    access: StorageAccess = {"storage_options": storage_options(storage_option)}
    figures: dict[str, object] = {}
    code = 0
    if qrels is not None:
        limits = Limits(min_ndcg, min_recall, allow_inconclusive)
        given = (queries, query_ids, gallery, before_queries, before_gallery)
        judged = _judged(qrels, given, metric, limits, access, h, side_info, precision, dtype)
        figures, code = judged.figures, judged.code
    elif (min_ndcg, min_recall, query_ids) != (None, None, None) or allow_inconclusive:
        raise ValueError("--qrels: expected judgements beside --query-ids, --min-ndcg and --min-recall, got none")
    elif queries is not None or pairs is None:
        figures = _labelled(
            _needed(queries, "--queries"), _needed(query_labels, "--query-labels"), gallery, gallery_labels, groups,
            before_queries, before_gallery, metric, same_items, tuple(k or ()), bootstrap, seed, access,
        )  # fmt: skip
    if pairs is not None:
        assert h is not None
        curve = rerank_on_pairs(pairs, h, tuple(depth or DEPTHS), access)
        figures = figures | {"rerank": {str(depth): recall for depth, recall in curve.recalls.items()}}
    if out is not None:
        write_text(out, json.dumps(figures, indent=2) + "\n")
        console.print(f"wrote {out}")
    if code:
        raise typer.Exit(code)


def _needed(given: str | None, option: str) -> str:
    if given is None:
        raise ValueError(f"{option}: expected it (or --qrels and --query-ids; or --pairs and -t), got none")
    return given


def _judged(
    qrels: str,
    given: tuple[str | None, ...],
    metric: str,
    limits: Limits,
    access: StorageAccess,
    h: fct.Transformation | None,
    side_info: str | None,
    precision: str,
    dtype: str,
) -> Judged:
    """One system, or an upgrade where there is a before."""
    queries, ids = _needed(given[0], "--queries"), _needed(given[1], "--query-ids")
    gallery, before_queries, before_gallery = given[2:]
    if (before_queries is None) != (before_gallery is None):
        raise ValueError("--before-queries, --before-gallery: expected both or none, got one of them")
    if before_queries is None or before_gallery is None:
        return one_system(qrels, queries, ids, _needed(gallery, "--gallery"), metric, limits, access)
    if gallery is None and h is None:
        raise ValueError("--gallery: expected the mapped gallery, or -t, which maps --before-gallery, got neither")
    return judged_upgrade(
        qrels, (before_queries, queries), ids, (before_gallery, gallery), metric, limits, access, h=h,
        side_info=side_info, precision=precision, dtype=dtype,
    )  # fmt: skip


def _labelled(
    queries: str,
    query_labels: str,
    gallery: str | None,
    gallery_labels: str | None,
    groups: str | None,
    before_queries: str | None,
    before_gallery: str | None,
    metric: str,
    same_items: bool,
    ks: tuple[int, ...],
    bootstrap: int,
    seed: int,
    access: StorageAccess,
) -> dict[str, object]:
    """CMC and mAP by labels, printed; who loses, where there are groups."""
    import fct

    rows = named_vectors(queries, "--queries", **access)
    others = None if gallery_labels is None else named_labels(gallery_labels, "--gallery-labels", **access)
    options = {"queries": "--queries", "query_labels": "--query-labels"}
    options |= {"gallery": "--queries" if gallery is None else "--gallery", "gallery_labels": "--gallery-labels"}
    _check_before(gallery, groups, before_queries, before_gallery)
    own_labels = named_labels(query_labels, "--query-labels", **access)

    def measured(asked: Array, answering: Array, resamples: int) -> fct.RetrievalMetrics:
        return fct.evaluate(
            asked,
            answering,
            own_labels,
            others,
            metric=metric,
            same_items=same_items or gallery is None,
            ks=ks,
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
    _show_measures(found)
    if losses is not None:
        _show_groups(losses, since=before_queries is not None)
    return found.to_dict() | ({} if losses is None else {"groups": losses.to_dict()})


def _check_before(
    gallery: str | None, groups: str | None, before_queries: str | None, before_gallery: str | None
) -> None:
    """Raises ValueError where a before is half given, or nobody asks for it."""
    if groups is None and (before_queries, before_gallery) != (None, None):
        raise ValueError(
            "--before-queries, --before-gallery: expected --groups beside them, which says whose loss to look at"
        )
    if before_queries is not None and (gallery is None) != (before_gallery is None):
        want = "none, since the queries are the gallery" if gallery is None else "the rows that --gallery had before"
        raise ValueError(f"--before-gallery: expected {want}, got {before_gallery}")
    if before_queries is None and before_gallery is not None:
        raise ValueError("--before-queries: expected the queries before the upgrade beside --before-gallery, got none")


def _show_measures(found: fct.RetrievalMetrics) -> None:
    from rich.table import Table

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
