"""A figure of speed in a document names its machine and where it was measured, and is what stands there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tools import speed_table

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    p
    for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if p.name not in ("history.md", "open-work.md")
]
UNITS = {"rows/s": "rows_per_s", "ms": "ms", "µs": "us_per_query", "GFLOP/s": "gflops", "GOP/s": "gflops"}
FIGURE = re.compile(r"(\d[\d,]*(?:\.\d+)?) (rows/s|ms|µs|GFLOP/s|GOP/s)(?!\w)")
MARK = re.compile(r"<!-- (report|measured): ([^>]+?) -->\n*$")
MACHINE = re.compile(r"EPYC|Zen [45]|Xeon|H200|Apple M\d")


def tables_of(text: str) -> list[tuple[str, str]]:
    """(what stands before, the table) of every Markdown table."""
    return [(text[: m.start()], m[0]) for m in re.finditer(r"(?:^\|.*\n)+", text, re.MULTILINE)]


def unnamed(text: str) -> list[str]:
    """The first line of every table of speed that does not say where its figures come from."""
    text = re.sub(f"{speed_table.BEGIN}.*?{speed_table.END}", "", text, flags=re.DOTALL)
    bad = []
    for before, table in tables_of(text):
        if FIGURE.search(table):
            mark = MARK.search(before)
            if mark is None or (mark[1] == "measured" and not MACHINE.search(mark[2])):
                bad.append(table.splitlines()[0])
    return bad


def strangers(text: str, rows: list[speed_table.Row]) -> list[str]:
    """Figures of the tables marked ``report:`` that stand in none of the report's tables that the mark names."""
    bad = []
    for before, table in tables_of(text):
        mark = MARK.search(before)
        if mark is None or mark[1] != "report":
            continue
        named = [name.strip() for name in re.split(r"[;\n]", mark[2])]
        mine = [row for row in rows if row["table"] in named]
        for figure, unit in FIGURE.findall(table):
            value, places = float(figure.replace(",", "")), len(figure.partition(".")[2])
            slack = 0.5 * 10**-places if places or value < 1000 else 0.005 * value
            known = [v for row in mine if isinstance(v := row.get(UNITS[unit]), (int, float))]
            if not any(abs(v - value) <= slack * 1.001 for v in known):
                bad.append(f"{figure} {unit}")
    return bad


def test_the_readme_shows_the_report() -> None:
    text = speed_table.README.read_text()
    _, _, rest = text.partition(speed_table.BEGIN)
    shown, mark, _ = rest.partition(speed_table.END)
    assert mark, "the README has lost its mark"
    assert shown.strip() == speed_table.table(), "run: python -m tools.speed_table"
    assert speed_table.machine(speed_table.rows_of_report()) in shown


def test_one_case_stands_in_one_table_of_the_report() -> None:
    """Two tables that measured the same case would offer the better of two figures."""
    fields = ("who", "queries", "state", "gallery", "d", "k", "threads")
    searches = [r for r in speed_table.rows_of_report() if str(r["table"]).startswith("topk") and "d" in r]
    cases = Counter(tuple(row.get(field) for field in fields) for row in searches)
    assert [case for case, count in cases.items() if count > 1] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_a_table_of_speed_names_its_source(document: Path) -> None:
    assert unnamed(document.read_text()) == [], (
        "put <!-- report: TABLE --> or <!-- measured: machine, command --> above"
    )
    assert strangers(document.read_text(), speed_table.rows_of_report()) == []


def test_the_rule_sees_what_it_forbids() -> None:
    rows: list[speed_table.Row] = [{"table": "t", "ms": 8.396, "rows_per_s": 19412.4}]
    table = "| a | b |\n|---|---|\n| x | {} |\n"
    assert unnamed(table.format("8.4 ms")) == ["| a | b |"]
    assert unnamed("<!-- measured: somewhere -->\n" + table.format("8.4 ms")) == ["| a | b |"]
    assert unnamed("<!-- measured: Zen 5, by hand -->\n\n" + table.format("8.4 ms")) == []
    marked = "<!-- report: t -->\n" + table
    assert unnamed(marked.format("8.4 ms")) == []
    assert strangers(marked.format("8.4 ms, 19,400 rows/s"), rows) == []
    assert strangers(marked.format("5.4 ms, 82,000 rows/s"), rows) == ["5.4 ms", "82,000 rows/s"]
    two: list[speed_table.Row] = [*rows, {"table": "t", "ms": 5.4}]
    with pytest.raises(KeyError, match="found 2"):
        speed_table.pick(two, "t")
