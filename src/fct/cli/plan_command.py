"""``fct plan``: what a backfill would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from typing_extensions import Unpack

from fct.cli.console import console
from fct.cli.flags import flags
from fct.cli.gallery_arguments import NewGallery, OldGallery, TransformationFile, duration, shards, size
from fct.cli.judge_command import show_judged
from fct.options.groups import PlanOptions
from fct.options.keywords import PlanKeywords

if TYPE_CHECKING:
    from fct.backfilling.plan import BackfillPlan
    from fct.backfilling.quality import ScoreShift
    from fct.backfilling.reembed_plan import ReembedPlan

__all__ = ["plan"]


@flags(PlanOptions)
def plan(
    source: OldGallery,
    destination: NewGallery,
    transformation: TransformationFile,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="A score threshold of the old space; the plan says which one of the new space answers to it."
        ),
    ] = None,
    **options: Unpack[PlanKeywords],
) -> None:
    """Say what a backfill would do, how long it takes and what it would refuse. The destination is not touched.

    Example: fct plan gallery/ new-gallery/ -t h.safetensors --old-model mobile-1 --price-per-hour 2.5
    """
    from fct.backfilling.plan import plan_backfill

    found = plan_backfill(source, destination, transformation, **options)
    _show_plan(found, threshold)
    if found.gate_refusals:
        raise typer.Exit(3)
    if found.refusals:
        raise typer.Exit(1)


def _show_plan(found: BackfillPlan, threshold: float | None) -> None:
    if found.job is not None:
        _show_prediction(found)
    if found.quality is not None:
        closed = found.quality.gap_closed
        console.print(
            f"quality on {found.quality.pairs} pairs: recall@10 {found.quality.recall_at_10:.3f}"
            + ("" if closed is None else f", {closed:.3f} of the mAP gap closed")
        )
        if found.judged is None:
            from fct.judging.pair_coverage import ONLY_PAIRS

            console.print(ONLY_PAIRS, soft_wrap=True)
    if found.judged is not None:
        show_judged(found.judged)
    if found.scores is not None:
        _show_scores(found.scores, threshold)
    for note in found.notes:
        console.print(note, soft_wrap=True)
    for why in found.refusals:
        console.say("refused:", why, "bold red")


def _show_prediction(found: BackfillPlan) -> None:
    free = "" if found.free_bytes is None else f", {found.free_bytes / 1e9:,.1f} GB free"
    console.print(f"{found.rows:,} rows in {shards(found.shards)}: {found.source} -> {found.destination}")
    console.print(f"{size(found.bytes_in)} in, {size(found.bytes_out)} of vectors out{free}")
    console.print(
        f"{found.rows_per_second:,.0f} rows/s expected here ({found.backend}, {found.precision}; {found.binds} "
        f"binds): {duration(found.seconds)} on {found.workers} such machine{'s' if found.workers > 1 else ''}",
        soft_wrap=True,
    )
    alone = {"h": found.h_rows_per_second}
    alone |= {"reading": found.read_rows_per_second} if found.read_rows_per_second else {}
    alone |= {"writing": found.write_rows_per_second} if found.write_rows_per_second else {}
    console.print("measured alone: " + ", ".join(f"{what} {rate:,.0f} rows/s" for what, rate in alone.items()))
    if found.upload_rows_per_second is not None:
        console.print(
            f"uploading {found.upload_rows_per_second:,.0f} rows/s at the {found.upload_mb_per_s:g} MB/s you stated"
        )
    if found.upload_left_out:
        console.print(
            "The upload is not in these figures, since a plan writes nothing there: state its rate with "
            "--upload-mb-per-s.",
            soft_wrap=True,
        )
    if found.cost_per_billion_rows is not None:
        console.print(f"{found.cost_per_billion_rows:,.2f} per billion rows at {found.price_per_hour:g} an hour")
    if found.reembedding is not None:
        _show_reembedding(found.reembedding, found.rows)
    if found.sample_rows:
        console.print(f"sample of {found.sample_rows:,} rows: {found.nonfinite_share:.2%} would go to rejects/")
    for reason, count in found.reject_reasons.items():
        console.print(f"  {count} x {reason}")


def _show_reembedding(partial: ReembedPlan, rows: int) -> None:
    most = "" if partial.chosen or partial.calls or not partial.rows else "at most "
    kept = f", {partial.kept:,} of which are kept from before" if partial.kept else ""
    calls = f", in about {partial.calls:,} calls" if partial.calls else ""
    console.print(f"re-embedded: {most}{partial.rows:,} of {rows:,} rows{kept}{calls}", soft_wrap=True)
    if partial.cost is not None:
        console.print(f"  {partial.cost:,.2f} for {partial.asked:,} true vectors at the price you stated")
    if partial.seconds is not None:
        console.print(f"  {duration(partial.seconds)} for them at the rate you stated, in the time above")
    elif partial.calls:
        console.print(
            "  The time of these calls is not in the figures, since a plan asks for no vector: state the model's rate "
            "with --embeddings-per-s.",
            soft_wrap=True,
        )


def _show_scores(scores: ScoreShift, threshold: float | None) -> None:
    from rich.table import Table

    table = Table("quantile", f"old score ({scores.metric_old})", f"new score ({scores.metric_new})")
    for q, a, b in zip(scores.quantiles, scores.old, scores.new, strict=True):
        table.add_row(f"{q:g}", f"{a:.4g}", f"{b:.4g}")
    console.print("Score thresholds move with the space. Scores of a row's nearest other row in the sample:")
    console.print(table)
    if threshold is not None:
        low, high = scores.old[0], scores.old[-1]
        if low <= threshold <= high:
            console.print(f"an old threshold of {threshold:g} maps to about {scores.threshold(threshold):.4g}")
        else:
            console.print(f"an old threshold of {threshold:g} is outside these old scores and cannot be mapped")
