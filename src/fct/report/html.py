"""One page that needs nothing beside it: style and picture are inside."""

from __future__ import annotations

import base64
import html
import os
from pathlib import Path

from fct.atomic_files import write_text
from fct.report.table import ResultTable
from fct.report.verdict import Verdict

__all__ = ["write_html"]

_STYLE = """
:root { color-scheme: light dark; --line: #d5d9e0; --muted: #667; --good: #18794e; --bad: #b42318; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 74rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin-bottom: .3rem; }
.verdict { font-size: 1.1rem; border-left: 4px solid var(--good); padding: .4rem 1rem; margin: 1.2rem 0; }
.verdict.no { border-color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; }
tr.chosen td { font-weight: 600; }
p.note, footer { color: var(--muted); font-size: .9rem; }
img { width: 100%; height: auto; background: #fff; border-radius: 6px; margin-top: 1rem; }
"""


def write_html(
    path: str | os.PathLike[str],
    table: ResultTable,
    *,
    verdict: Verdict | None = None,
    picture: str | os.PathLike[str] | None = None,
    chosen: str | None = None,
) -> Path:
    """Writes the report page.

    Args:
        path: where to.
        table: its title becomes the page's, its notes stand below it, its facts at the foot.
        verdict: the sentence above the table.
        picture: a PNG file to embed.
        chosen: name of the row to stress.
    """
    title = html.escape(table.title or "Upgrade report")
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.headings())
    body = "".join(
        f"<tr{' class=chosen' if row.name == chosen else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for row, cells in zip(table.rows, table.cells(), strict=True)
    )
    parts = [f"<h1>{title}</h1>"]
    if verdict is not None:
        kind = "verdict" if verdict.migrate else "verdict no"
        parts.append(f'<p class="{kind}">{html.escape(verdict.sentence)}</p>')
    parts.append(f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")
    parts += [f"<p class=note>{html.escape(note)}</p>" for note in table.notes]
    if picture is not None:
        data = base64.b64encode(Path(picture).read_bytes()).decode("ascii")
        alt = "Queries with their nearest gallery items, and the table as bars"
        parts.append(f'<img alt="{alt}" src="data:image/png;base64,{data}">')
    if table.facts:
        facts = " · ".join(f"{html.escape(str(key))}: {html.escape(str(value))}" for key, value in table.facts.items())
        parts.append(f"<footer><p>{facts}</p></footer>")
    write_text(
        path,
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n",
    )
    return Path(path)
