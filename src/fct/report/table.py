"""The table of an upgrade: one row for each pair of query model and gallery, the same numbers in every form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fct.checks import check_choice
from fct.types import JsonDict

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["MEASURES", "ResultTable", "Row"]

# field of Row -> heading
MEASURES = {"cmc1": "CMC top-1", "cmc5": "CMC top-5", "map": "mAP", "recall10": "recall@10"}

# The headings for a terminal of 80 columns.
_NARROW = ("query/gallery", "CMC\ntop-1", "CMC\ntop-5", "mAP", "recall\n@10", "top-1\ngap", "mAP\ngap", "sec")


@dataclass(frozen=True, slots=True)
class Row:
    """One way to search.

    name: "query model/gallery model" and what made the gallery.
    cmc1, cmc5, map: shares from 0 to 1.
    recall10: share of the new/new top-10 that is found, from 0 to 1.
    seconds: what the row's own step cost, as the table's notes define it; None where there was nothing to do.
    """

    name: str
    cmc1: float
    cmc5: float
    map: float
    recall10: float
    seconds: float | None = None

    def __post_init__(self) -> None:
        for measure in MEASURES:
            value = getattr(self, measure)
            if not (isinstance(value, (int, float)) and 0 <= value <= 1):
                raise ValueError(f"{measure}: expected a share from 0 to 1, got {value!r}")
            object.__setattr__(self, measure, float(value))


@dataclass(frozen=True, slots=True)
class ResultTable:
    """Rows, and the share of the gap between two of them that each of the others closes.

    Args:
        rows: in the order they are shown; names are unique.
        floor, ceiling: names of the rows that the share of the gap is measured between (old/old and new/new).
        title: one line above.
        notes: lines below.
        facts: plain JSON values that tell how the numbers came about (seed, sizes, versions).

    Examples:
        >>> from fct.report import ResultTable, Row
        >>> rows = [Row("old/old", .5, .7, .4, .1), Row("new/old", .8, .9, .7, .5), Row("new/new", .9, .95, .8, 1.)]
        >>> round(ResultTable(rows).gap_closed("new/old", "map"), 2)
        0.75
    """

    rows: tuple[Row, ...]
    floor: str = "old/old"
    ceiling: str = "new/new"
    title: str = ""
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "notes", tuple(self.notes))
        names = [row.name for row in self.rows]
        if len(set(names)) != len(names):
            raise ValueError(f"rows: expected unique names, got {names}")
        for name in (self.floor, self.ceiling):
            self.row(name)

    def row(self, name: str) -> Row:
        """The row of that name; ValueError where there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise ValueError(f"rows: expected one named {name!r}, got {[row.name for row in self.rows]}")

    def gap_closed(self, name: str, measure: str) -> float | None:
        """(x - floor) / (ceiling - floor), BCT's update gain; None for the two ends and where there is no gap.

        Source: Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020, arXiv:2003.11942.
        """
        check_choice(measure, "measure", tuple(MEASURES))
        low, high = getattr(self.row(self.floor), measure), getattr(self.row(self.ceiling), measure)
        if name in (self.floor, self.ceiling) or not high > low:
            return None
        return float((getattr(self.row(name), measure) - low) / (high - low))

    # ---- forms ----
    def headings(self) -> list[str]:
        """One for each of :meth:`cells`' columns."""
        return ["query/gallery", *MEASURES.values(), "top-1 gap closed", "mAP gap closed", "seconds"]

    def cells(self) -> list[list[str]]:
        """The rows as text, shares in per cent."""
        return [
            [
                row.name,
                *(f"{100 * getattr(row, measure):.1f}" for measure in MEASURES),
                _percent(self.gap_closed(row.name, "cmc1")),
                _percent(self.gap_closed(row.name, "map")),
                "–" if row.seconds is None else _seconds(row.seconds),
            ]
            for row in self.rows
        ]

    def to_markdown(self) -> str:
        cells = self.cells()
        lines = [f"**{self.title}**", ""] if self.title else []
        lines += ["| " + " | ".join(self.headings()) + " |", "|---" + "|--:" * (len(self.headings()) - 1) + "|"]
        lines += ["| " + " | ".join(_markdown(c) for c in line) + " |" for line in cells]
        lines += [""] + [f"{note}  " for note in self.notes] if self.notes else []
        return "\n".join(lines).rstrip() + "\n"

    def to_rich(self) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title or None, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), title_justify="left")
        table.title_style = "bold"
        for i, heading in enumerate(_NARROW):
            table.add_column(Text(heading), justify="left" if i == 0 else "right", no_wrap=True)
        for row, cells in zip(self.rows, self.cells(), strict=True):
            ends = row.name in (self.floor, self.ceiling)
            table.add_row(*cells, style="dim" if ends else None)
        return table

    def to_dict(self) -> JsonDict:
        """Plain JSON values; the shares of the gap are there too, None where there is no gap."""
        return {
            "title": self.title,
            "floor": self.floor,
            "ceiling": self.ceiling,
            "rows": [
                {
                    "name": row.name,
                    **{measure: getattr(row, measure) for measure in MEASURES},
                    "gap_closed_cmc1": self.gap_closed(row.name, "cmc1"),
                    "gap_closed_map": self.gap_closed(row.name, "map"),
                    "seconds": row.seconds,
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
            "facts": dict(self.facts),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ResultTable:
        """The table that :meth:`to_dict` told of; ValueError when something is missing."""
        try:
            rows = tuple(
                Row(**{name: line[name] for name in ("name", *MEASURES, "seconds")}) for line in values["rows"]
            )
            return cls(
                rows,
                floor=values["floor"],
                ceiling=values["ceiling"],
                title=values["title"],
                notes=tuple(values["notes"]),
                facts=values["facts"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"table: expected what ResultTable.to_dict gives, got none: {error!r}") from error


def _percent(share: float | None) -> str:
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.0f} %"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 0.995 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _markdown(cell: str) -> str:
    return cell.replace("|", "\\|")
