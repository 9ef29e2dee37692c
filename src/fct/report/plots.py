"""The picture: queries with their nearest gallery items under each system, and the table as bars."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fct.atomic_files import write_bytes
from fct.extras import need
from fct.report.table import MEASURES, ResultTable
from fct.types import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


__all__ = ["Example", "write_picture"]

_HIT, _MISS, _INK, _MUTED = "#1a7f4b", "#c4352b", "#1d2430", "#6b7483"
_BARS = ("cmc1", "map", "recall10")


@dataclass(frozen=True, slots=True)
class Example:
    """One query and what each system finds for it.

    image: (h, w) or (h, w, 3), uint8 or 0..1. label: shown beside it.
    found: system -> [(image, whether it is of the query's class), ...], nearest first; the same systems, in the same
        order, for every example.
    """

    image: Array
    label: str
    found: Mapping[str, Sequence[tuple[Array, bool]]]


def write_picture(
    path: str | os.PathLike[str],
    examples: Sequence[Example],
    table: ResultTable,
    *,
    colours: Mapping[str, str] | None = None,
    subtitle: str = "",
) -> Path:
    """Draws the examples above the table's bars and writes a PNG.

    Args:
        path: where to.
        examples: at least one.
        table: its rows become the bars.
        colours: row name -> colour; grey for the others.
        subtitle: one line below the title.

    Raises:
        ValueError: no examples, or examples of different systems.
    """
    matplotlib = need("matplotlib", "write_picture")
    matplotlib.use("agg")
    from matplotlib.figure import Figure

    if not examples:
        raise ValueError("examples: expected at least one, got none")
    systems = list(examples[0].found)
    if any(list(example.found) != systems for example in examples):
        raise ValueError(f"examples: expected the same systems {systems} in every one")
    depth = max(len(found) for example in examples for found in example.found.values())

    thumb = 0.53  # inches
    names = len(table.rows)
    width = 12.3
    top, grid, gap, bars = 1.22, len(examples) * thumb, 0.75, 0.33 * names + 0.25
    height = top + grid + gap + bars + 0.3
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.color": _INK}):
        figure = Figure(figsize=(width, height), facecolor="white")

        def y(inches_from_top: float) -> float:
            return 1 - inches_from_top / height

        figure.text(0.3 / width, y(0.34), table.title, size=14, weight="bold", va="center")
        figure.text(0.3 / width, y(0.62), subtitle, size=9.5, color=_MUTED, va="center")

        left = 2.15  # where the first system's thumbnails begin
        room = (width - left - 0.3) / len(systems)
        figure.text((left - 0.28) / width, y(1.02), "query", size=10, ha="right", va="center", color=_MUTED)
        for column, system in enumerate(systems):
            begin = left + column * room + 0.12
            figure.text(begin / width, y(1.02), system, size=10.5, weight="bold", va="center")
        for line, example in enumerate(examples):
            low = top + (line + 1) * thumb
            box = _thumbnail(figure, example.image, left - 0.28 - thumb, low, thumb, width, height)
            _frame(box, _INK, 1.2)
            figure.text(
                (left - 0.36 - thumb) / width, y(low - thumb / 2), example.label, size=9, ha="right", va="center"
            )
            for column, system in enumerate(systems):
                for rank, (image, hit) in enumerate(example.found[system]):
                    step = min(thumb, (room - 0.2) / depth)
                    box = _thumbnail(
                        figure, image, left + column * room + 0.12 + rank * step, low, thumb, width, height
                    )
                    _frame(box, _HIT if hit else _MISS, 2.2, dashed=not hit)

        bar_room = (width - 2.65 - 0.3) / len(_BARS)
        for column, measure in enumerate(_BARS):
            axes = figure.add_axes(
                (
                    (2.65 + column * bar_room) / width,
                    0.3 / height,
                    (bar_room - 0.35) / width,
                    bars / height,
                )
            )
            _bars(axes, table, measure, colours or {}, show_names=column == 0)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=150, metadata={"Software": None})
    write_bytes(path, data.getvalue())
    return Path(path)


def _thumbnail(
    figure: Figure,
    image: Array,
    left: float,
    low_from_top: float,
    size: float,
    width: float,
    height: float,
) -> Any:
    pad = 0.04
    axes = figure.add_axes(
        (
            (left + pad) / width,
            1 - (low_from_top - pad) / height,
            (size - 2 * pad) / width,
            (size - 2 * pad) / height,
        )
    )
    axes.imshow(image, cmap="gray_r", interpolation="nearest", vmin=0, vmax=255 if _is_bytes(image) else 1)
    axes.set_xticks([])
    axes.set_yticks([])
    return axes


def _is_bytes(image: Array) -> bool:
    return str(getattr(image, "dtype", "")) == "uint8"


def _frame(axes: Axes, colour: str, thickness: float, *, dashed: bool = False) -> None:
    """Misses are dashed as well as red: not everybody tells red from green."""
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=thickness, linestyle=(0, (1.6, 1.0)) if dashed else "-", capstyle="butt")


def _bars(axes: Axes, table: ResultTable, measure: str, colours: Mapping[str, str], *, show_names: bool) -> None:
    values = [100 * getattr(row, measure) for row in table.rows]
    places = range(len(values))
    axes.barh(places, values, height=0.68, color=[colours.get(row.name, "#b9c0cb") for row in table.rows])
    for place, value in zip(places, values, strict=True):
        axes.text(value + 1.2, place, f"{value:.1f}", va="center", size=8.5)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlim(0, 112)
    axes.set_xticks([])
    axes.set_yticks(list(places), [row.name for row in table.rows] if show_names else [""] * len(values))
    axes.tick_params(length=0, labelsize=9)
    axes.set_title(f"{MEASURES[measure]}, %", size=10, loc="left", weight="bold", color=_INK)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "left")
        spine.set_color(_MUTED)
