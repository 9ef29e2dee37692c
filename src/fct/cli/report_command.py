"""``fct report``: one page to decide by, and of how a backfill went."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fct.cli.console import console
from fct.cli.named_arrays import named_as_options, named_labels
from fct.cli.storage_option import StorageOption
from fct.errors import FctError
from fct.options.groups import storage_options
from fct.types import JsonDict, StorageAccess

if TYPE_CHECKING:
    import fct
    from fct.report.neighbour_lists import Neighbours

__all__ = ["report"]

_MOST_BYTES = 16 << 20  # of a file of figures


def report(
    comparison: Annotated[
        Path | None,
        typer.Argument(help="What fct compare --out wrote; may be left out beside --backfill or --verdict."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    verdict: Annotated[Path | None, typer.Option(help="What fct judge --json printed, in a file.")] = None,
    transformation: Annotated[
        Path | None, typer.Option("-t", "--transformation", help="h, for its curve of mixed galleries and neighbours.")
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Held-out pairs (columns old, new, perhaps side), whose neighbours are shown.")
    ] = None,
    texts: Annotated[str | None, typer.Option(help="(n,) FILE:COLUMN, the texts or ids of these pairs.")] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Of these pairs: a folder of image files (named by id, or in order), or an .npy of pixels."),
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="(n,) FILE:COLUMN, groups of these pairs: who loses recall@10 by the upgrade?")
    ] = None,
    losses: Annotated[
        Path | None, typer.Option(help="Instead: what fct evaluate --groups --before-queries --out wrote.")
    ] = None,
    backfill: Annotated[
        str | None, typer.Option(help="A backfill's new gallery, finished or not, or its journal: how it went.")
    ] = None,
    verified: Annotated[
        Path | None, typer.Option("--verify", help="Of this backfill: what fct verify --json printed, in a file.")
    ] = None,
    items: Annotated[int, typer.Option(help="Items whose neighbours are shown.", min=1)] = 6,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Upgrade of an embedding model",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page.")] = False,
    storage_option: StorageOption = None,
) -> None:
    """Write one page to decide by, of what compare and judge measured and how a backfill went, for phones too.

    The page is one file that loads nothing.

    Example: fct report compare.json --verdict judge.json -t h.safetensors --pairs held-out.parquet --out report.html

    Example: fct report --backfill new-gallery/ --out backfill.html
    """
    import fct
    from fct.atomic_files import refuse_existing
    from fct.backfilling.timeline import backfill_timeline
    from fct.report.decision_page import write_decision_page

    if comparison is None and verdict is None and backfill is None:
        raise ValueError("COMPARISON: expected it (what fct compare --out wrote), --verdict or --backfill, got none")
    if verified is not None and backfill is None:
        raise ValueError("--verify: expected --backfill beside it, the new gallery that was verified")
    refuse_existing(out, overwrite=overwrite, name="--out")
    h = None if transformation is None else fct.Transformation.load(transformation)
    access: StorageAccess = {"storage_options": storage_options(storage_option)}
    found: list[Neighbours] = []
    lost = None if losses is None else _losses(losses)
    if pairs is not None:
        if h is None:
            raise ValueError("--pairs: expected -t beside it, the transformation that maps them")
        held = _Held.of(pairs, h, access)
        found = held.neighbours(_names(texts, len(held), access), images, items)
        if groups is not None:
            if losses is not None:
                raise ValueError("--losses: expected it or --groups, got both")
            with named_as_options({"groups": "--groups"}):
                before, after = held.recalls()
                lost = fct.who_loses(before, after, named_labels(groups, "--groups", **access)).to_dict()
            lost |= {"measure": f"recall@{held.k}"}
    else:
        for option, given in (("--texts", texts), ("--images", images), ("--groups", groups)):
            if given is not None:
                raise ValueError(f"{option}: expected --pairs beside it, whose {option[2:]} they are")
    mixed: object = None if h is None else h.info.get("mixed")
    write_decision_page(
        out,
        None if comparison is None else _figures(comparison, "COMPARISON"),
        verdict=None if verdict is None else _figures(verdict, "--verdict"),
        mixed=mixed if isinstance(mixed, dict) else None,
        losses=lost,
        neighbours=found,
        backfill=None if backfill is None else backfill_timeline(backfill, name="--backfill", **access),
        verified=None if verified is None else _figures(verified, "--verify"),
        title=title,
    )
    console.print(f"wrote {out}", highlight=False, markup=False)


def _figures(path: Path, option: str) -> JsonDict:
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


def _losses(path: Path) -> JsonDict:
    figures = _figures(path, "--losses")
    found = figures.get("groups", figures)
    if not isinstance(found, dict) or "overall" not in found:
        raise FctError(f"--losses: expected what fct evaluate --groups --out wrote, {path} holds no groups")
    return found


def _names(texts: str | None, n: int, access: StorageAccess) -> list[str] | None:
    """The items' texts, short; None where none are given."""
    if texts is None:
        return None
    names = [_short(str(text)) for text in named_labels(texts, "--texts", **access)]
    if len(names) != n:
        raise ValueError(f"--texts: expected one for each of {n:,} pairs, got {len(names):,}")
    return names


@dataclass(frozen=True)
class _Held:
    """Held-out pairs, and what each finds among the others: by the new model, by the old one, and mapped.

    answers: three times (n, k) rows, nearest first. ids: the pairs' own, or None.
    """

    answers: tuple[Any, Any, Any]
    ids: list[str] | None
    k: int

    def __len__(self) -> int:
        return len(self.answers[0])

    @classmethod
    def of(cls, location: str, h: fct.Transformation, access: StorageAccess) -> _Held:
        import numpy as np

        import fct
        from fct.gallery import load_pairs, open_source
        from fct.gallery.beside_rows import load_ids

        with named_as_options({"source": "--pairs"}):
            found = load_pairs(location, name="--pairs", **access)
        for name in ("old", "new"):
            if name not in found:
                raise ValueError(f"--pairs: expected arrays old and new, got {', '.join(found)}")
        ids = found.get("id")
        if ids is None and not location.endswith(".npz"):
            stored = load_ids(open_source(location, name="--pairs", **access), name="--pairs")
            ids = None if stored is None else stored.to_pylist()
        old, new = np.asarray(found["old"], np.float32), np.asarray(found["new"], np.float32)
        if len(new) < 2:
            raise ValueError(f"--pairs: expected at least 2 pairs, got {len(new)}")
        k = min(10, len(new) - 1)
        mapped = fct.transform_batch(old, found.get("side") if h.uses_side_info else None, h, progress=False)
        with named_as_options({"queries": "--pairs", "gallery": "--pairs"}):
            old_metric, metric = h.old_space.metric, h.new_space.metric
            ways = ((new, new, metric), (old, old, old_metric), (new, mapped, metric))
            wanted, today, later = (
                fct.topk(queries, rows, k, metric=how, same_items=True, progress=False).indices
                for queries, rows, how in ways
            )
        return cls((wanted, today, later), None if ids is None else [str(one) for one in ids], k)

    def recalls(self) -> tuple[Any, Any]:
        """((n,) each item's recall@k of the new model's neighbours today, (n,) in the mapped gallery)."""
        wanted, *others = self.answers
        return tuple((found[:, :, None] == wanted[:, None, :]).any(axis=2).mean(axis=1) for found in others)

    def neighbours(self, names: list[str] | None, images: Path | None, items: int) -> list[Neighbours]:
        """Some of the pairs, by lot, with the first five that each finds."""
        import numpy as np

        from fct.report.neighbour_lists import Item, Neighbours
        from fct.report.thumbnails import Thumbnails

        with named_as_options({"images": "--images"}):
            pictures = None if images is None else Thumbnails(images, len(self), self.ids)

        def item(row: int) -> Item:
            name = names[row] if names is not None else self.ids[row] if self.ids is not None else str(row)
            return Item(row, name, "" if pictures is None else pictures[row])

        chosen = np.sort(np.random.default_rng(0).permutation(len(self))[:items])
        with named_as_options({"images": "--images"}):
            return [
                Neighbours(item(row), *([item(i) for i in found[row, :5].tolist()] for found in self.answers))
                for row in chosen.tolist()
            ]


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."
