"""``fct report``: one page to decide by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fct.cli.console import console
from fct.cli.named_arrays import named_as_options, named_labels
from fct.cli.storage_option import StorageOption
from fct.errors import FctError
from fct.options.groups import storage_options

if TYPE_CHECKING:
    from fct.report.decision_page import Neighbours

__all__ = ["report"]

_MOST_BYTES = 16 << 20  # of a file of figures


def report(
    comparison: Annotated[Path, typer.Argument(help="What fct compare --out wrote.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    verdict: Annotated[Path | None, typer.Option(help="What fct judge --json printed, in a file.")] = None,
    transformation: Annotated[
        Path | None, typer.Option("-t", "--transformation", help="h, for its curve of mixed galleries and neighbours.")
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Held-out pairs (columns old, new, perhaps side), whose neighbours are shown.")
    ] = None,
    texts: Annotated[str | None, typer.Option(help="(n,) FILE:COLUMN, the texts or ids of these pairs.")] = None,
    items: Annotated[int, typer.Option(help="Items whose neighbours are shown.", min=1)] = 6,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Upgrade of an embedding model",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page.")] = False,
    storage_option: StorageOption = None,
) -> None:
    """Write one page to decide by, of what compare and judge measured: no other file, no network, phone and dark mode.

    Example: fct report compare.json --verdict judge.json -t h.safetensors --pairs held-out.parquet --out report.html
    """
    import fct
    from fct.atomic_files import refuse_existing
    from fct.report.decision_page import write_decision_page

    refuse_existing(out, overwrite=overwrite, name="--out")
    h = None if transformation is None else fct.Transformation.load(transformation)
    found: list[Neighbours] = []
    if pairs is not None:
        if h is None:
            raise ValueError("--pairs: expected -t beside it, the transformation that maps them")
        found = _neighbours(pairs, texts, h, items, {"storage_options": storage_options(storage_option)})
    elif texts is not None:
        raise ValueError("--texts: expected --pairs beside it, whose texts they are")
    mixed: Any = None if h is None else h.info.get("mixed")
    write_decision_page(
        out,
        _figures(comparison, "COMPARISON"),
        verdict=None if verdict is None else _figures(verdict, "--verdict"),
        mixed=mixed if isinstance(mixed, dict) else None,
        neighbours=found,
        title=title,
    )
    console.print(f"wrote {out}", highlight=False, markup=False)


def _figures(path: Path, option: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{option}: expected a file of figures, found none at {path}")
    if path.stat().st_size > _MOST_BYTES:
        raise FctError(f"{option}: expected a file of figures, {path} has {path.stat().st_size:,} bytes")
    try:
        found = json.loads(path.read_bytes(), parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise FctError(f"{option}: expected JSON, {path} holds other text: {error}") from error
    if not isinstance(found, dict):
        raise FctError(f"{option}: expected an object of figures, {path} holds {type(found).__name__}")
    return found


def _refused(name: str) -> None:
    raise ValueError(f"a figure is {name}")


def _neighbours(where: str, texts: str | None, h: Any, items: int, access: dict[str, Any]) -> list[Neighbours]:
    """What some of the pairs find among the others: by the new model, by the old one, and mapped."""
    import numpy as np

    import fct
    from fct.gallery import load_pairs
    from fct.report.decision_page import Neighbours

    with named_as_options({"source": "--pairs"}):
        found = load_pairs(where, name="--pairs", **access)
    for name in ("old", "new"):
        if name not in found:
            raise ValueError(f"--pairs: expected arrays old and new, got {', '.join(found)}")
    old, new = np.asarray(found["old"], np.float32), np.asarray(found["new"], np.float32)
    names = [str(row) for row in range(len(new))]
    if texts is not None:
        names = [_short(str(text)) for text in named_labels(texts, "--texts", **access)]
    if len(names) != len(new):
        raise ValueError(f"--texts: expected one for each of {len(new):,} pairs, got {len(names):,}")
    k = min(5, len(new) - 1)
    if k < 1:
        raise ValueError(f"--pairs: expected at least 2 pairs, got {len(new)}")
    chosen = np.sort(np.random.default_rng(0).permutation(len(new))[:items])
    metric = h.new_space.metric
    mapped = fct.transform_batch(old, found.get("side") if h.uses_side_info else None, h, progress=False)
    answers = [
        fct.topk(queries, rows, k + 1, metric=metric, progress=False).indices
        for queries, rows in ((new[chosen], new), (old[chosen], old), (new[chosen], mapped))
    ]
    shown = []
    for at, row in enumerate(chosen.tolist()):
        lists = [[names[i] for i in answer[at].tolist() if i != row][:k] for answer in answers]
        shown.append(Neighbours(names[row], *lists))
    return shown


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."
