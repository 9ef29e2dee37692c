"""The picture: queries with their nearest gallery items under each system, and the table as bars."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
# Inches: a thumbnail's side, the sheet's width, the heading's height, where the first system's thumbnails begin.
_THUMB, _WIDTH, _TOP, _LEFT = 0.53, 12.3, 1.22, 2.15


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
    bars = 0.33 * len(table.rows) + 0.25
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.color": _INK}):
        height = _TOP + len(examples) * _THUMB + 0.75 + bars + 0.3
        sheet = _Sheet(Figure(figsize=(_WIDTH, height), facecolor="white"), height)
        sheet.text(0.3, 0.34, table.title, size=14, weight="bold")
        sheet.text(0.3, 0.62, subtitle, size=9.5, color=_MUTED)
        sheet.examples(examples, systems)
        room = (_WIDTH - 2.65 - 0.3) / len(_BARS)
        for column, measure in enumerate(_BARS):
            axes = sheet.axes(2.65 + column * room, height - 0.3, room - 0.35, bars)
            _bars(axes, table, measure, colours or {}, show_names=column == 0)
        data = io.BytesIO()
        sheet.figure.savefig(data, format="png", dpi=150, metadata={"Software": None})
    write_bytes(path, data.getvalue())
    return Path(path)


@dataclass(frozen=True, slots=True)
class _Sheet:
    """A figure in inches, x from the left and y from the top."""

    figure: Figure
    height: float

    def text(self, x: float, y: float, words: str, **style: str | float) -> None:
        self.figure.text(x / _WIDTH, 1 - y / self.height, words, {"va": "center", **style})

    def axes(self, left: float, low: float, width: float, height: float) -> Axes:
        return self.figure.add_axes((left / _WIDTH, 1 - low / self.height, width / _WIDTH, height / self.height))

    def thumbnail(self, image: Array, left: float, low: float) -> Axes:
        pad = 0.04
        axes = self.axes(left + pad, low - pad, _THUMB - 2 * pad, _THUMB - 2 * pad)
        axes.imshow(image, cmap="gray_r", interpolation="nearest", vmin=0, vmax=255 if _is_bytes(image) else 1)
        axes.set_xticks([])
        axes.set_yticks([])
        return axes

    def examples(self, examples: Sequence[Example], systems: Sequence[str]) -> None:
        """One line a query, one column a system."""
        depth = max(len(found) for example in examples for found in example.found.values())
        room = (_WIDTH - _LEFT - 0.3) / len(systems)
        step = min(_THUMB, (room - 0.2) / depth)
        self.text(_LEFT - 0.28, 1.02, "query", size=10, ha="right", color=_MUTED)
        for column, system in enumerate(systems):
            self.text(_LEFT + column * room + 0.12, 1.02, system, size=10.5, weight="bold")
        for line, example in enumerate(examples):
            low = _TOP + (line + 1) * _THUMB
            _frame(self.thumbnail(example.image, _LEFT - 0.28 - _THUMB, low), _INK, 1.2)
            self.text(_LEFT - 0.36 - _THUMB, low - _THUMB / 2, example.label, size=9, ha="right")
            for column, system in enumerate(systems):
                for rank, (image, hit) in enumerate(example.found[system]):
                    box = self.thumbnail(image, _LEFT + column * room + 0.12 + rank * step, low)
                    _frame(box, _HIT if hit else _MISS, 2.2, dashed=not hit)


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
