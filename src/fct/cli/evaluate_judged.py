"""``fct evaluate`` without labels: relevance judgements (one system, or an upgrade's verdict), and the rerank curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fct.cli.console import console
from fct.cli.judge_command import EXIT, item_ids, joined_by_id
from fct.cli.named_arrays import named_as_options, named_labels, named_vectors
from fct.errors import FctError
from fct.options.groups import StoreAccess
from fct.types import StorageAccess

if TYPE_CHECKING:
    import fct
    from fct.rerank_depth import RerankCurve

__all__ = ["Judged", "Limits", "judged_upgrade", "one_system", "rerank_on_pairs"]


@dataclass(frozen=True)
class Limits:
    """What ``fct evaluate`` refuses by exit code 3 (5: inconclusive, where that is not allowed)."""

    ndcg: float | None
    recall: float | None
    allow_inconclusive: bool


@dataclass(frozen=True)
class Judged:
    """What the judged queries said: figures for JSON, and the exit code."""

    figures: dict[str, object]
    code: int


def one_system(
    qrels: str, queries: str, query_ids: str, gallery: str, metric: str, limits: Limits, access: StorageAccess
) -> Judged:
    """nDCG@10, MRR@10 and recall@10 of queries against a gallery, without anything to compare with."""
    import fct
    from fct.judging import measure_rankings

    judgements = _judgements(qrels, access)
    asked = named_vectors(queries, "--queries", **access)
    ids = [str(one) for one in named_labels(query_ids, "--query-ids", **access)]
    if len(ids) != len(asked):
        raise FctError(f"--query-ids: expected {len(asked):,} ids to match --queries, got {len(ids):,}")
    rows = named_vectors(gallery, "--gallery", **access)
    items = item_ids(gallery, len(rows), "--gallery")
    relevant = [judgements.relevant(query) for query in ids]
    counted = [row for row, found in enumerate(relevant) if found]
    if not counted:
        raise FctError(f"--qrels: expected a relevant item for one of {len(ids):,} queries at least, {qrels} has none")
    with named_as_options({"queries": "--queries", "gallery": "--gallery", "metric": "--metric"}):
        near = fct.topk(asked[counted], rows, min(10, len(rows)), metric=metric).indices
    found = measure_rankings(
        [[items[i] for i in row] for row in near.tolist()], [relevant[row] for row in counted], k=10
    )
    values = {name: found.mean(name) for name in ("ndcg", "mrr", "recall")}
    words = {"ndcg": "nDCG@10", "mrr": "MRR@10", "recall": "recall@10"}
    for name, value in values.items():
        console.print(f"{words[name]} {100 * value:.2f} %", highlight=False)
    unknown = judgements.unknown_items(items)
    more = f"; {len(unknown):,} relevant items are not in the gallery ({', '.join(unknown[:3])})" if unknown else ""
    console.print(
        f"{len(counted):,} queries; {len(ids) - len(counted):,} more have no relevant item or were not judged{more}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    missed = _missed(values, limits)
    figures = {words[name]: value for name, value in values.items()}
    return Judged({"queries": len(counted), "unknown_items": len(unknown), **figures}, 3 if missed else 0)


def judged_upgrade(
    qrels: str,
    queries: tuple[str, str],
    query_ids: str,
    galleries: tuple[str, str | None],
    metric: str,
    limits: Limits,
    access: StorageAccess,
    *,
    h: fct.Transformation | None = None,
    side_info: str | None = None,
    precision: str = "auto",
    dtype: str = "float32",
) -> Judged:
    """The verdict of :func:`fct.judge_upgrade`. queries, galleries: (before, now); no gallery now: mapped by h."""
    import fct
    from fct.backfilling.quality import Writing

    before, now = galleries
    if now is None:
        old_rows = named_vectors(before, "--before-gallery", ("old",), **access)
        ids, away = item_ids(before, len(old_rows), "--before-gallery"), 0
        side = None if side_info is None else named_vectors(side_info, "--side-info", ("side",), **access)
        assert h is not None
        if h.uses_side_info and side is None:
            raise ValueError(f"--side-info: expected (n, {h.d_side}) beside --before-gallery, which h maps, got none")
        with named_as_options({"pairs": "--before-gallery"}):
            new_rows = Writing(precision, dtype, None, "cpu", None).map(old_rows, side if h.uses_side_info else None, h)
    else:
        names = ("--before-gallery", "--gallery")
        ids, old_rows, new_rows, away = joined_by_id(before, now, access, names)
    asked = fct.UpgradeQueries(
        [str(one) for one in named_labels(query_ids, "--query-ids", **access)],
        named_vectors(queries[0], "--before-queries", ("old",), **access),
        named_vectors(queries[1], "--queries", ("new",), **access),
    )
    options = {"gallery_old": "--before-gallery", "mapped": "--gallery", "judgements": "--qrels"}
    with named_as_options(options):
        found = fct.judge_upgrade(
            asked, _judgements(qrels, access), ids, old_rows, new_rows, old_metric=metric, new_metric=metric,
            fused=False,
        )  # fmt: skip
    console.lines(str(found))
    if away:
        console.print(f"{away:,} rows of the old gallery are not in the new one: left out on both sides")
    measures = found.result("mapped").measures
    missed = _missed({name: measures.mean(name) for name in ("ndcg", "recall")}, limits)
    code = EXIT[found.word] if found.word != "inconclusive" or not limits.allow_inconclusive else 0
    return Judged({**found.to_dict(), "rows_not_mapped": away}, 3 if missed else code)


def _missed(values: dict[str, float], limits: Limits) -> bool:
    """Says which limits are not reached."""
    said = (("nDCG@10", "ndcg", limits.ndcg), ("recall@10", "recall", limits.recall))
    missed = [
        f"{words} is {values[name]:.3f}, below {least}"
        for words, name, least in said
        if least is not None and not values[name] >= least
    ]
    for why in missed:
        console.say("refused:", why, "bold red")
    return bool(missed)


def rerank_on_pairs(pairs: str, h: fct.Transformation, depths: tuple[int, ...], access: StorageAccess) -> RerankCurve:
    """Prints what ranking the nearest mapped rows by their true vectors gives back, by how many are ranked."""
    from rich.table import Table

    import fct
    from fct.gallery import load_pairs
    from fct.judging.pair_coverage import ONLY_PAIRS

    with named_as_options({"source": "--pairs"}):
        found = load_pairs(pairs, name="--pairs", **access)
    for name in ("old", "new", *(("side",) if h.uses_side_info else ())):
        if name not in found:
            raise ValueError(f"--pairs: expected arrays old and new{', and side' if name == 'side' else ''}, "
                             f"got {', '.join(found)}")  # fmt: skip
    with named_as_options({name: f"--pairs: {name}" for name in ("old", "new", "side_info")} | {"depths": "--depth"}):
        curve = fct.rerank_curve(
            found["old"], found.get("side") if h.uses_side_info else None, found["new"], h, depths=depths
        )
    table = Table("depth", f"recall@{curve.k} %")
    for depth, recall in curve.recalls.items():
        label = f"{depth:,} (mapped rows alone)" if depth == curve.k else f"{depth:,}"
        table.add_row(label, f"{100 * recall:.1f}")
    console.print(f"The nearest mapped rows ranked by their true vectors (rerank=), on {curve.rows:,} held-out pairs:")
    console.print(table)
    console.print(f"A larger gallery needs a larger depth for the same recall. {ONLY_PAIRS}", highlight=False)
    return curve


def _judgements(qrels: str, access: StorageAccess) -> Any:
    from fct.backfilling.judged_gate import load_judgements
    from fct.gallery.stores import opening

    with named_as_options({"qrels": "--qrels"}):
        return load_judgements(qrels, opening(StoreAccess(**access)), name="--qrels")
