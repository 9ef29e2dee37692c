"""Line charts as SVG inside a page: they take its colours, and a reader of the page hears their title and figures."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Line", "line_chart"]

_WIDTH, _HEIGHT = 640, 310
_At: TypeAlias = Callable[[float, float], tuple[float, float]]  # (x, y) to where it is drawn
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 36, 34, 54


@dataclass(frozen=True, slots=True)
class Line:
    """points: (x, y, half the width of y's error, or 0). measured: how many of them, from the first on, were measured;
    the others are drawn hollow, behind a broken line. dots: whether each point is marked. joined: whether a line joins
    them."""

    name: str
    points: Sequence[tuple[float, float, float]]
    measured: int
    dots: bool = True
    joined: bool = True


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_name: str,
    y_name: str,
    logarithmic: bool = False,
    unit: str = "%",
    top: float | None = None,
    ticks: Sequence[float] | None = None,
    bands: Sequence[tuple[float, float]] = (),
    band_name: str = "",
    said: str | None = None,
) -> str:
    """An ``<figure>`` with the lines, a legend, and as title all that a picture cannot say.

    Args:
        lines: y in per cent of 0 to 100, or in any ``unit``, from 0 on; x as it is named, drawn by its logarithm where
            ``logarithmic``. top: where the y axis ends; None: above the lines.
        ticks: numbers on the x axis; None: every x of the lines, as far as there is room.
        bands: (from, to) stretches of x to shade. band_name: of these, in the legend.
        said: what a reader of the page hears instead of every figure.
    """
    xs = [x for line in lines for x, _, _ in line.points]
    ys = [y for line in lines for _, y, _ in line.points]
    every = [*xs, *(ticks or ()), *(x for band in bands for x in band)]
    low, high = _x(min(every), logarithmic), _x(max(every), logarithmic)
    if top is None:
        top = min(100.0, 10 * math.ceil(max([*ys, 1]) / 10 + 0.2)) if unit == "%" else _above(max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        share = 0.5 if high == low else (_x(x, logarithmic) - low) / (high - low)
        return (
            _LEFT + share * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [_band(at(a, 0)[0], at(b, 0)[0]) for a, b in bands]
    parts.append(_grid(top, at, sorted(set(xs)) if ticks is None else ticks, x_name, y_name))
    for number, line in enumerate(lines):
        parts.append(_drawn(line, f"s{number % 4}", at))
    if said is None:
        figures = (f"{line.name}: " + ", ".join(f"{_number(x)}: {y:.1f} {unit}" for x, y, _ in line.points)
                   for line in lines)  # fmt: skip
        said = "; ".join(figures)
    names = [(f"s{n % 4}", line.name) for n, line in enumerate(lines)] + ([("band", band_name)] if bands else [])
    legend = "".join(f'<span><i class="{style}"></i>{html.escape(name)}</span>' for style, name in names)
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escape(f"{title}. {said}")}">{"".join(parts)}</svg><p class="legend">{legend}</p></figure>'
    )


def _above(most: float) -> float:
    """The least of 1, 2, 2.5 and 5 times a power of ten that is above ``most``."""
    if most <= 0:
        return 1.0
    step = 10.0 ** math.floor(math.log10(most))
    return next(step * n for n in (1, 2, 2.5, 5, 10, 20) if step * n > most)


def _band(left: float, right: float) -> str:
    width = max(3.0, right - left)  # a short one is seen, too
    return f'<rect class="band" x="{left:.1f}" y="{_TOP}" width="{width:.1f}" height="{_HEIGHT - _TOP - _BOTTOM}"/>'


def _x(x: float, logarithmic: bool) -> float:
    return math.log(max(x, 1e-9)) if logarithmic else x


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 or x == int(x) else f"{x:g}"


def _short(y: float) -> str:
    """A number beside the axis, where there is room for five letters."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if y >= 10 * size or (y >= size and y % (size / 10) == 0):
            return f"{y / size:g} {letter}"
    return f"{y:g}"


def _grid(top: float, at: _At, xs: Sequence[float], x_name: str, y_name: str) -> str:
    parts, last = [], -1e9
    for y in (0.0, top / 2, top):
        down = at(0, y)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{down + 5:.1f}" text-anchor="end">{_short(y)}</text>')
    for x in xs:
        right, _ = at(x, 0)
        if right - last < 64:  # labels that would touch
            continue
        last = right
        parts.append(f'<text x="{right:.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{_number(x)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{html.escape(x_name)}</text>')
    parts.append(f'<text x="4" y="19">{html.escape(y_name)}</text>')
    return "".join(parts)


def _drawn(line: Line, style: str, at: _At) -> str:
    parts = []
    for name, points in (("", line.points[: line.measured]), (" broken", line.points[max(0, line.measured - 1) :])):
        if line.joined and len(points) > 1:
            path = " ".join(",".join(f"{v:.1f}" for v in at(x, y)) for x, y, _ in points)
            parts.append(f'<polyline class="{style}{name}" points="{path}"/>')
    for number, (x, y, error) in enumerate(line.points):
        right, down = at(x, y)
        if error:
            high, low = at(x, min(100, y + error))[1], at(x, max(0, y - error))[1]
            parts.append(f'<line class="{style}" x1="{right:.1f}" x2="{right:.1f}" y1="{high:.1f}" y2="{low:.1f}"/>')
        if not line.dots:
            continue
        hollow = "" if number < line.measured else " hollow"
        parts.append(f'<circle class="{style}{hollow}" cx="{right:.1f}" cy="{down:.1f}" r="4"/>')
    return "".join(parts)
