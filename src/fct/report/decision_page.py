"""One page to decide by, of what ``fct compare`` and ``fct judge`` measured; it needs nothing beside it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from fct.atomic_files import write_text
from fct.errors import FctError
from fct.report.charts import Line, line_chart
from fct.report.decision_style import SCRIPT, STYLE
from fct.report.escaped_text import escaped
from fct.report.neighbour_lists import Neighbours, neighbour_lists

__all__ = ["write_decision_page"]

Figures: TypeAlias = Mapping[str, Any]  # what JSON holds
Cells: TypeAlias = list[list[str]]
SHOWN = 30  # groups, of which a file may hold thousands


def write_decision_page(
    path: str | os.PathLike[str],
    comparison: Figures,
    *,
    verdict: Figures | None = None,
    mixed: Figures | None = None,
    losses: Figures | None = None,
    neighbours: Sequence[Neighbours] = (),
    title: str = "Upgrade of an embedding model",
) -> Path:
    """Writes the page.

    Args:
        path: where to. comparison: of :meth:`fct.Comparison.to_json`. verdict: of :meth:`fct.UpgradeVerdict.to_dict`.
        mixed: what an artifact holds of mixed galleries (``h.info["mixed"]``). losses: of
            :meth:`fct.GroupLosses.to_dict`. neighbours: a few items.

    Raises:
        FctError: figures that are not of these forms.
    """
    try:
        parts = [f"<h1>{escaped(title)}</h1>", _sentence(comparison, verdict), *_compared(comparison)]
        parts += _judged(verdict) + _losses(losses) + _mixed(mixed) + neighbour_lists(neighbours)
        parts.append(_foot(comparison))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FctError(
            f"report: expected the figures that fct compare --out, fct judge --json and fct evaluate --out write, got "
            "others "
            f"({type(error).__name__}: {error})"
        ) from error
    ours = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{ours}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    write_text(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}"
        f"<script>{SCRIPT}</script></body></html>\n",
    )
    return Path(path)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _sentence(comparison: Figures, verdict: Figures | None) -> str:
    if verdict is not None:
        word = str(verdict["word"])
        kind = word if word in ("go", "no-go") else "open"
        return f'<p class="verdict {kind}"><b>{escaped(word)}</b>: {escaped(verdict["reason"])}</p>'
    rows = {str(row["name"]): row for row in comparison["alternatives"]}
    today = rows.pop("nothing", None)
    best = max(rows.values(), key=lambda row: float(row["recall_at_10"]))
    said = (
        f"On {int(comparison['held_out_pairs']):,} held-out pairs {best['name']} keeps "
        f"{_share(best['recall_at_10'])} % of the ten nearest that the new model finds"
    )
    if today is not None:
        said += f"; doing nothing keeps {_share(today['recall_at_10'])} %"
    return (
        f'<p class="verdict"><b>undecided</b>: {escaped(said)}. Pairs of documents rank maps well and cannot decide: '
        "what counts is what queries find (fct judge).</p>"
    )


def _compared(comparison: Figures) -> list[str]:
    alternatives = comparison["alternatives"]
    best = max(alternatives, key=lambda row: float(row["recall_at_10"]))["name"]
    heads = [
        "",
        "recall@10 %",
        "CMC top-1 %",
        "mAP %",
        "fit s",
        "MFLOP a row",
        "rows/s",
        "bytes a row",
        "hours",
        "money",
    ]
    cells = [
        [
            str(row["name"]), _share(row["recall_at_10"]), _share(row["cmc1"]), _share(row["map"]),
            f"{row['fit_seconds']:.1f}", f"{row['mflop_per_row']:.3g}",
            "–" if row["rows_per_s"] is None else f"{row['rows_per_s']:,.0f}", f"{row['bytes_per_row']:,}",
            f"{row['hours']:.3g}", "–" if row["cost"] is None else f"{row['cost']:,.2f}",
        ]
        for row in alternatives
    ]  # fmt: skip
    parts = ["<h2>What could be done</h2>", _table(heads, cells, "compare.csv", best=str(best))]
    parts.append(
        f'<p class="note">{int(comparison["train_pairs"]):,} pairs fitted, '
        f"{int(comparison['held_out_pairs']):,} held out; hours and money for {float(comparison['rows']):,.0f} rows, "
        "on a machine like the one that measured.</p>"
    )
    ceiling = comparison["ceiling"]
    if ceiling:
        said = ", ".join(f"{escaped(name)} {_share(value)} %" for name, value in ceiling.items())
        parts.append(
            '<p class="note">What the old space holds of the new one, by a k-NN oracle (an estimate from below): '
            f"{said}.</p>"
        )
    notes = [str(note) for note in comparison.get("notes", ())]
    if comparison["unlike_gallery"] is not None and not any("resembles no pair" in note for note in notes):
        parts.append(
            f'<p class="note">{_share(comparison["unlike_gallery"])} % of the gallery resembles no pair: there h is '
            "untried.</p>"
        )
    parts += [f'<p class="note"><strong>Note:</strong> {escaped(note)}.</p>' for note in notes]
    curve = comparison["curve"]
    if len(curve) > 1:
        points = [(float(p["pairs"]), 100 * float(p["recall"]), 100 * float(p["error"])) for p in curve]
        measured = sum(bool(p["measured"]) for p in curve)
        parts.append("<h2>How many pairs</h2>")
        name = f"{comparison['curve_of']} (hollow: extrapolated)"
        parts.append(
            line_chart("Recall@10 by the number of pairs", [Line(name, points, measured)], x_name="pairs",
                       y_name="recall@10 %", logarithmic=True)
        )  # fmt: skip
    return parts


def _judged(verdict: Figures | None) -> list[str]:
    if verdict is None:
        return []
    systems = verdict["systems"]
    names = [key for key in systems[0] if "@" in key]
    cells = []
    for system in systems:
        gain = system["gain"]
        gained = (
            "–"
            if gain is None
            else f"{100 * gain['mean']:+.1f} ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
        )
        cells.append([str(system["name"]), *(_share(system[name]) for name in names), gained])
    heads = ["", *(f"{name} %" for name in names), "nDCG against old/old, points"]
    parts = [f"<h2>On your queries</h2>{_table(heads, cells, 'judge.csv', best=str(verdict['candidate']))}"]
    left = verdict["left_out"]
    parts.append(
        f'<p class="note">{int(verdict["queries"]):,} queries; left out: {int(left["without_judgement"]):,} that '
        f"nobody judged, {int(left['without_relevant']):,} without a relevant item. Judged, but not given: "
        f"{int(left['unknown_queries']):,} "
        f"queries, {int(left['unknown_items']):,} items.</p>"
    )
    mine = next(s for s in systems if s["name"] == verdict["candidate"])
    if mine["slices"]:
        rows = [
            [
                str(name),
                f"{g['queries']:,}",
                f"{100 * g['mean']:+.1f}",
                f"{100 * g['low']:+.1f}",
                f"{100 * g['high']:+.1f}",
            ]
            for name, g in mine["slices"].items()
        ]
        parts.append("<h2>Who gains, who loses</h2>")
        parts.append(_table(["slice", "queries", "nDCG, points", "from", "to"], rows, "slices.csv"))
    return parts


def _mixed(mixed: Figures | None) -> list[str]:
    points = (mixed or {}).get("points") or ()
    if not points:
        return []
    lines = [
        Line(name, [(100 * float(p["true_share"]), 100 * float(p[key]), 0.0) for p in points], len(points))
        for name, key in (("as they are", "recall"), ("corrected", "corrected_recall"))
    ]
    return [
        "<h2>While old and new rows stand side by side</h2>",
        line_chart(
            "Recall@10 by the share of re-embedded rows", lines, x_name="re-embedded rows %", y_name="recall@10 %"
        ),
        '<p class="note">The correction is the length of mapped rows that the artifact holds (fct backfill --mixed).'
        "</p>",
    ]


def _losses(losses: Figures | None) -> list[str]:
    """Group by group, the greatest loss first; all of them in the CSV."""
    if losses is None:
        return []
    rows = [losses["overall"], *losses["groups"]]
    cells = [
        [
            str(row["name"]), f"{int(row['queries']):,}", _share(row["before"]), _share(row["after"]),
            f"{100 * float(row['change']):+.1f}", _share(row["negative_flips"]), "loses" if row["loses"] else "–",
        ]
        for row in rows
    ]  # fmt: skip
    measure = str(losses["measure"])
    heads = ["group", "queries", f"{measure} before %", "after %", "change", "negative flips %", "beyond chance"]
    parts = ["<h2>Who loses</h2>", _table(heads, cells, "losses.csv", shown=SHOWN + 1)]
    losers = sum(bool(row["loses"]) for row in losses["groups"])
    said = [f"{len(losses['groups']):,} groups, {losers:,} of which lose beyond what chance explains"]
    if len(losses["groups"]) > SHOWN:
        said.append(f"the {SHOWN} that lose most are shown, all are in the file")
    if losses["gap_before"] is not None and losses["gap_after"] is not None:
        said.append(
            f"the worst group of at least 10 queries is {_share(losses['gap_before'])} points below the mean before, "
            f"{_share(losses['gap_after'])} after"
        )
    parts.append(
        f'<p class="note">{"; ".join(said)}. A negative flip is a query that scores less after than before.</p>'
    )
    return parts


def _foot(comparison: Figures) -> str:
    return f'<p class="note">Vectors are compared by {escaped(comparison["metric"])}. Made by fct report.</p>'


def _table(heads: Sequence[str], cells: Cells, file: str, *, best: str = "", shown: int | None = None) -> str:
    """A table whose columns sort, without those that hold nothing, and the same as CSV to take along."""
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
        f'<div class="scroll" tabindex="0" role="region" aria-label="{file}"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<p class="note"><a download="{file}" href="data:text/csv;charset=utf-8;base64,{data}">{file}</a></p>'
    )


def _inert(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if cell[:1] in ("=", "@", "\t", "\r") or (cell[:1] in "+-" and not cell[1:2].isdigit()) else cell
