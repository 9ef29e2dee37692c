"""One page to decide by, of what ``fct compare`` and ``fct judge`` measured, and of how a backfill went; it needs
nothing beside it."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from fct.atomic_files import write_text
from fct.backfilling.timeline import Timeline
from fct.errors import FctError
from fct.report.backfill_section import backfill_section, backfill_sentence
from fct.report.charts import Line, line_chart
from fct.report.csv_table import csv_table
from fct.report.decision_style import SCRIPT, STYLE
from fct.report.escaped_text import escaped
from fct.report.neighbour_lists import Neighbours, neighbour_lists

__all__ = ["write_decision_page"]

Figures: TypeAlias = Mapping[str, Any]  # what JSON holds
SHOWN = 30  # groups, of which a file may hold thousands


def write_decision_page(
    path: str | os.PathLike[str],
    comparison: Figures | None = None,
    *,
    verdict: Figures | None = None,
    mixed: Figures | None = None,
    losses: Figures | None = None,
    neighbours: Sequence[Neighbours] = (),
    backfill: Timeline | None = None,
    verified: Figures | None = None,
    title: str = "Upgrade of an embedding model",
) -> Path:
    """Writes the page.

    Args:
        path: where to. comparison: of :meth:`fct.Comparison.to_json`. verdict: of :meth:`fct.UpgradeVerdict.to_dict`.
        mixed: what an artifact holds of mixed galleries (``h.info["mixed"]``); None: what the comparison does. losses:
            of :meth:`fct.GroupLosses.to_dict`. neighbours: a few items.
        backfill: of :func:`fct.backfilling.timeline.backfill_timeline`. verified: what ``fct verify --json`` printed.

    Raises:
        FctError: figures that are not of these forms. ValueError: neither a comparison nor a verdict nor a backfill.
    """
    try:
        mixed = mixed if mixed is not None or comparison is None else comparison.get("mixed")
        parts = [f"<h1>{escaped(title)}</h1>", *_sentences(comparison, verdict, backfill, verified)]
        parts += _compared(comparison) + _judged(verdict) + _losses(losses) + _mixed(mixed)
        parts += [] if backfill is None else backfill_section(backfill, verified)
        parts += [*neighbour_lists(neighbours), _foot(comparison)]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FctError(
            "report: expected the figures that fct compare --out, fct judge --json, fct evaluate --out and fct verify "
            f"--json write, got others ({type(error).__name__}: {error})"
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


def _sentences(
    comparison: Figures | None, verdict: Figures | None, backfill: Timeline | None, verified: Figures | None
) -> list[str]:
    said = [] if comparison is None and verdict is None else [_sentence(comparison or {}, verdict)]
    return said + ([] if backfill is None else [backfill_sentence(backfill, verified)])


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


def _compared(comparison: Figures | None) -> list[str]:
    if comparison is None:
        return []
    parts = ["<h2>What could be done</h2>", _alternatives_table(comparison["alternatives"])]
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
    return parts + _learning_curve(comparison["curve"], str(comparison["curve_of"]))


def _alternatives_table(alternatives: Sequence[Figures]) -> str:
    best = max(alternatives, key=lambda row: float(row["recall_at_10"]))["name"]
    heads = [
        "", "recall@10 %", "CMC top-1 %", "mAP %", "fit s", "MFLOP a row", "rows/s", "bytes a row", "hours", "money",
    ]  # fmt: skip
    cells = [
        [
            str(row["name"]), _share(row["recall_at_10"]), _share(row["cmc1"]), _share(row["map"]),
            f"{row['fit_seconds']:.1f}", f"{row['mflop_per_row']:.3g}",
            "–" if row["rows_per_s"] is None else f"{row['rows_per_s']:,.0f}", f"{row['bytes_per_row']:,}",
            f"{row['hours']:.3g}", "–" if row["cost"] is None else f"{row['cost']:,.2f}",
        ]
        for row in alternatives
    ]  # fmt: skip
    return csv_table(heads, cells, "compare.csv", best=str(best))


def _learning_curve(curve: Sequence[Figures], of: str) -> list[str]:
    """Recall by the number of pairs, as a chart and as a table; nothing where there is no curve."""
    if len(curve) < 2:
        return []
    points = [(float(p["pairs"]), 100 * float(p["recall"]), 100 * float(p["error"])) for p in curve]
    measured = sum(bool(p["measured"]) for p in curve)
    cells = [[f"{int(pairs):,}", f"{recall:.1f}", f"{error:.1f}", "measured" if at < measured else "extrapolated"]
             for at, (pairs, recall, error) in enumerate(points)]  # fmt: skip
    return [
        "<h2>How many pairs</h2>",
        line_chart("Recall@10 by the number of pairs", [Line(f"{of} (hollow: extrapolated)", points, measured)],
                   x_name="pairs", y_name="recall@10 %", logarithmic=True),
        csv_table(["pairs", "recall@10 %", "±", "how"], cells, "pairs.csv"),
    ]  # fmt: skip


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
    parts = [f"<h2>On your queries</h2>{csv_table(heads, cells, 'judge.csv', best=str(verdict['candidate']))}"]
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
        parts.append(csv_table(["slice", "queries", "nDCG, points", "from", "to"], rows, "slices.csv"))
    return parts


def _mixed(mixed: Figures | None) -> list[str]:
    measured = (mixed or {}).get("points") or ()
    if mixed is None or not measured:
        return []
    points = [(float(p["true_share"]), float(p["recall"]), float(p["corrected_recall"])) for p in measured]
    if mixed.get("mapped_recall") is not None:  # every row mapped: no correction changes anything
        whole = float(mixed["mapped_recall"])
        points = [(0.0, whole, whole), *(p for p in points if 0 < p[0] < 1), (1.0, 1.0, 1.0)]
    lines = [
        Line(name, [(100 * p[0], 100 * p[at], 0.0) for p in points], len(points))
        for at, name in ((1, "as they are"), (2, "corrected"))
    ]
    cells = [[f"{100 * share:.0f}", _share(plain), _share(better)] for share, plain, better in points]
    return [
        "<h2>While old and new rows stand side by side</h2>",
        line_chart(
            "Recall@10 by the share of re-embedded rows",
            lines,
            x_name="re-embedded rows %",
            y_name="recall@10 %",
            ticks=[0, 25, 50, 75, 100],
        ),
        csv_table(["re-embedded rows %", "recall@10 as they are %", "corrected %"], cells, "mixed.csv"),
        f'<p class="note">{_correction(mixed)} 0 % is the gallery of mapped rows alone, 100 % that of the new model, '
        "which every other is measured by.</p>",
    ]


def _correction(mixed: Figures) -> str:
    how = mixed.get("correction")
    said = "The correction is the length of mapped rows that the artifact holds"
    if how is not None and how["kind"] == "coordinate":
        said = (
            f"The correction is one coordinate more, which makes mapped rows {float(how['value']):.3g} times as similar"
        )
    elif how is not None:
        said = f"Corrected, mapped rows are {float(how['value']):.3g} times as long"
        said += " (fct backfill --mixed)"
    if mixed.get("rows"):
        said += f"; measured on {int(mixed['rows']):,} held-out pairs"
    if mixed.get("chosen_on_the_same_rows"):
        said += ", too few to choose it on others: the corrected curve flatters a little"
    return f"{said}."


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
    parts = ["<h2>Who loses</h2>", csv_table(heads, cells, "losses.csv", shown=SHOWN + 1)]
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


def _foot(comparison: Figures | None) -> str:
    by = "" if comparison is None else f"Vectors are compared by {escaped(comparison['metric'])}. "
    return f'<p class="note">{by}Made by fct report.</p>'
