"""``fct judge``: go, no-go or inconclusive, from queries and judgements of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fct.cli.console import console
from fct.cli.named_arrays import named_as_options, named_labels, named_vectors
from fct.cli.storage_option import StorageOption
from fct.errors import FctError
from fct.options.groups import StoreAccess, storage_options
from fct.types import Array, StorageAccess

if TYPE_CHECKING:
    from fct.backfilling.judged_gate import GateVerdict

__all__ = ["EXIT", "item_ids", "joined_by_id", "judge", "show_judged"]

_WHERE = "a file, folder, glob or URL, with :COLUMN where there are several"
EXIT = {"go": 0, "inconclusive": 5, "no-go": 3}


def judge(
    qrels: Annotated[Path, typer.Argument(help="Judgements: TREC, BEIR's tsv, or a table of query, item, grade.")],
    queries_old: Annotated[str, typer.Option(help=f"(q, d_old), the queries by the old model: {_WHERE}.")],
    queries_new: Annotated[str, typer.Option(help="(q, d_new), by the new model, in the same order.")],
    query_ids: Annotated[str, typer.Option(help=f"(q,), as the judgements name them: {_WHERE}.")],
    old: Annotated[str, typer.Option(help=f"The old gallery, its ids among its columns: {_WHERE}.")],
    mapped: Annotated[str, typer.Option(help="The new gallery, as fct backfill wrote it; rows are joined by id.")],
    true: Annotated[
        str | None, typer.Option(help="True vectors of the mapped rows, in their order: for mapped + rerank, new/new.")
    ] = None,
    query_slices: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE:COLUMN, (q,): gains by its values; may be repeated.")
    ] = None,
    old_metric: Annotated[str, typer.Option(help="l2, ip, cosine; auto: as the gallery says, else cosine.")] = "auto",
    new_metric: Annotated[str, typer.Option(help="Likewise, of the new gallery.")] = "auto",
    candidate: Annotated[
        str, typer.Option(help="What would go into service: mapped, mapped + rerank, fused.")
    ] = "mapped",
    depth: Annotated[int, typer.Option(help="Nearest mapped rows that are ranked again by their true vectors.")] = 200,
    k: Annotated[int, typer.Option("-k", help="Of nDCG@k, MRR@k and recall@k.")] = 10,
    margin: Annotated[
        float, typer.Option(help="Loss of nDCG, from 0 to 1, that you would accept for other gains.")
    ] = 0.0,
    confidence: Annotated[float, typer.Option(help="Of the bootstrap interval.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
    storage_option: StorageOption = None,
) -> None:
    """Decide by your own queries: go (exit 0), no-go (exit 3) or inconclusive (exit 5), with the reason.

    Example: fct judge qrels.tsv --queries-old q.parquet:old --queries-new q.parquet:new --query-ids q.parquet:id
    --old old-gallery/ --mapped new-gallery/
    """
    import fct
    from fct.backfilling.judged_gate import load_judgements
    from fct.gallery.stores import opening

    access: StorageAccess = {"storage_options": storage_options(storage_option)}
    slices = dict(_named_slice(text, access) for text in query_slices or ())
    queries = fct.UpgradeQueries(
        [str(i) for i in named_labels(query_ids, "--query-ids", **access)],
        named_vectors(queries_old, "--queries-old", ("old",), **access),
        named_vectors(queries_new, "--queries-new", ("new",), **access),
        slices,
    )
    ids, old_rows, new_rows, away = joined_by_id(old, mapped, access)
    options = {"qrels": "QRELS", "gallery_old": "--old", "mapped": "--mapped", "true_vectors": "--true"}
    with named_as_options(options):
        found = fct.judge_upgrade(
            queries,
            load_judgements(qrels, opening(StoreAccess(**access)), name="QRELS"),
            ids,
            old_rows,
            new_rows,
            true_vectors=None if true is None else named_vectors(true, "--true", **access),
            old_metric=_metric(old, old_metric),
            new_metric=_metric(mapped, new_metric),
            candidate=candidate,
            depth=depth,
            k=k,
            margin=margin,
            confidence=confidence,
            seed=seed,
        )
    if as_json:
        console.print_json(json.dumps(found.to_dict() | {"rows_not_mapped": away}))
    else:
        _show(found, away)
    raise typer.Exit(EXIT[found.word])


def _named_slice(text: str, access: StorageAccess) -> tuple[str, list[str]]:
    name, equals, where = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--query-slices: expected NAME=FILE:COLUMN, got {text!r}")
    return name, [str(value) for value in named_labels(where, "--query-slices", **access)]


def joined_by_id(
    old: str, mapped: str, access: StorageAccess, options: tuple[str, str] = ("--old", "--mapped")
) -> tuple[list[str], Array, Array, int]:
    """(ids, old rows, new rows) of the rows that both galleries have, and how many only the old one has."""
    import numpy as np

    old_rows, new_rows = (named_vectors(w, o, **access) for w, o in zip((old, mapped), options, strict=True))
    old_ids, new_ids = item_ids(old, len(old_rows), options[0]), item_ids(mapped, len(new_rows), options[1])
    place = {one: row for row, one in enumerate(old_ids)}
    strange = [one for one in new_ids if one not in place]
    if strange:
        raise FctError(
            f"{options[1]}: expected rows of the old gallery, {len(strange):,} of {len(new_ids):,} ids are not in "
            f"{old} ({', '.join(map(repr, strange[:3]))}): are these two galleries of the same items?"
        )
    rows = np.fromiter((place[one] for one in new_ids), np.int64, len(new_ids))
    return new_ids, np.asarray(old_rows)[rows], new_rows, len(old_ids) - len(rows)


def item_ids(location: str, rows: int, option: str) -> list[str]:
    """A gallery's ids as text; row numbers where it has none."""
    from fct.gallery import split_column
    from fct.gallery.beside_rows import load_ids

    with named_as_options({"id_column": option, "source": option}):
        found = load_ids(split_column(location)[0])
    if found is None:
        return [str(row) for row in range(rows)]
    if len(found) != rows:
        raise FctError(f"{option}: expected an id for each of {rows:,} rows, got {len(found):,}")
    return [str(one) for one in found.to_pylist()]


def _metric(location: str, wanted: str) -> str:
    from fct.gallery import open_source, split_column

    if wanted != "auto":
        return wanted
    space = open_source(split_column(location)[0]).space
    return "cosine" if space is None else space.metric


def show_judged(judged: GateVerdict) -> None:
    """The gate's verdict, and what it is about."""
    console.lines(str(judged.verdict))
    some = "" if judged.rows + judged.rejected == judged.of else ", every judged one and others by lot"
    away = f"; {judged.rejected:,} that h cannot map are left out on both sides" if judged.rejected else ""
    console.print(f"searched: {judged.rows:,} of {judged.of:,} rows{some}{away}", highlight=False, soft_wrap=True)


def _show(found: Any, away: int) -> None:
    console.lines(str(found))
    for result in found.results:
        for name, gain in result.slices.items():
            if result.name == found.candidate:
                console.print(f"{name}: {gain}", highlight=False, markup=False)
    if away:
        console.print(
            f"{away:,} rows of the old gallery are not in the new one (rejected, or not done): left out on both sides",
            highlight=False,
            soft_wrap=True,
        )
