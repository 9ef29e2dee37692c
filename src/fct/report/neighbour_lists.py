"""What some items find before and after an upgrade, as a part of a page: their texts, and their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fct.report.escaped_text import escaped

__all__ = ["Item", "Neighbours", "neighbour_lists"]


@dataclass(frozen=True, slots=True)
class Item:
    """key: tells an item from every other, whatever they are called. name: its text or id. picture: a ``data:`` URL of
    :class:`fct.report.thumbnails.Thumbnails`, or ""."""

    key: int
    name: str
    picture: str = ""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What one item finds: by the new model alone, today, and in the mapped gallery, nearest first."""

    query: Item
    wanted: Sequence[Item]
    today: Sequence[Item]
    mapped: Sequence[Item]


def neighbour_lists(neighbours: Sequence[Neighbours]) -> list[str]:
    """Parts of a page; none where there are no items."""
    if not neighbours:
        return []
    parts = [
        "<h2>Neighbours</h2>",
        '<p class="note">What an item finds. Green, with a tick: also among what the new model finds everywhere.</p>',
    ]
    for one in neighbours:
        wanted = {item.key for item in one.wanted}
        columns = []
        for name, found in (("new model alone", one.wanted), ("today", one.today), ("mapped gallery", one.mapped)):
            rows = "".join(f"<li{' class=kept' if item.key in wanted else ''}>{_shown(item)}</li>" for item in found)
            kind = ' class="pictures"' if any(item.picture for item in found) else ""
            columns.append(f"<div>{name}<ol{kind}>{rows}</ol></div>")
        head = f'<div class="asked">{_shown(one.query, bold=True)}</div>'
        parts.append(f'<div class="near">{head}<div class="columns">{"".join(columns)}</div></div>')
    return parts


def _shown(item: Item, *, bold: bool = False) -> str:
    name = f"<b>{escaped(item.name)}</b>" if bold else escaped(item.name)
    if not item.picture:
        return name
    return f'<img alt="Picture of {escaped(item.name)}" src="{escaped(item.picture)}"><span>{name}</span>'
