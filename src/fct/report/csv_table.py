"""A table inside a page, whose columns sort, and the same as CSV to take along."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from typing import TypeAlias

from fct.report.escaped_text import escaped

__all__ = ["Cells", "csv_table"]

Cells: TypeAlias = list[list[str]]


def csv_table(
    heads: Sequence[str], cells: Cells, file: str, *, best: str = "", shown: int | None = None, kind: str = ""
) -> str:
    """A table without the columns that hold nothing, and a link to it as a file.

    Args:
        heads: names of the columns. cells: rows of texts, escaped here; "–" is nothing.
        file: the CSV's name. best: the first cell of the row to stress. shown: rows on the page; all are in the file.
        kind: a class of :data:`fct.report.decision_style.STYLE`.
    """
    full = [at for at in range(len(heads)) if at == 0 or any(row[at] != "–" for row in cells)]
    heads, cells = [heads[at] for at in full], [[row[at] for at in full] for row in cells]
    top = "".join(f'<th scope="col"><button type="button">{escaped(head or "way")}</button></th>' for head in heads)
    body = "".join(
        f"<tr{' class=best' if row[0] == best else ''}>{''.join(f'<td>{escaped(cell)}</td>' for cell in row)}</tr>"
        for row in cells[:shown]
    )
    out = io.StringIO()
    csv.writer(out).writerows([[head or "way" for head in heads], *([_inert(cell) for cell in row] for row in cells)])
    data = base64.b64encode(out.getvalue().encode()).decode("ascii")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{file}"><table{f" class={kind}" if kind else ""}>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<p class="note"><a download="{file}" href="data:text/csv;charset=utf-8;base64,{data}">{file}</a></p>'
    )


def _inert(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if cell[:1] in ("=", "@", "\t", "\r") or (cell[:1] in "+-" and not cell[1:2].isdigit()) else cell
