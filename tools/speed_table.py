"""The README's table of speed, made from ``benchmarks/report/results.json``: ``python -m tools.speed_table``.

Each line names the rows of the report that it is made of; a test holds the README against what this writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
REPORT = ROOT / "benchmarks" / "report" / "results.json"
BEGIN, END = "<!-- speed: python -m tools.speed_table -->", "<!-- /speed -->"

Value: TypeAlias = "str | int | float | None"
Row: TypeAlias = "dict[str, Value]"

FLAT = "FAISS IndexFlatIP"
LOOP = "numpy + scikit-learn loop"


def rows_of_report() -> list[Row]:
    rows: list[Row] = json.loads(REPORT.read_text())["rows"]
    return rows


def number(row: Row, field: str) -> float:
    value = row[field]
    assert isinstance(value, (int, float)), (field, row)
    return float(value)


def pick(rows: Sequence[Row], table: str, **fields: Value) -> Row:
    """The one row of a table with these fields; KeyError where there is none or more than one."""
    found = [row for row in rows if row["table"] == table and all(row.get(k) == v for k, v in fields.items())]
    if len(found) != 1:
        raise KeyError(f"benchmarks/report: expected one row of {table!r} with {fields}, found {len(found)}")
    return found[0]


def shown(value: float, digits: int = 3) -> str:
    """With so many digits that count, and commas: 19,400; 5.41."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.{digits}g}"


def machine(rows: Sequence[Row]) -> str:
    """The one machine of the tables that are shown; ValueError where they come from several."""
    names = {str(dict(row["context"])["machine"]) for row in rows if row["table"] in TABLES}  # type: ignore[arg-type, index]
    if len(names) != 1:
        raise ValueError(f"benchmarks/report: expected one machine, the tables come from {sorted(names)}")
    return names.pop()


def _transform(rows: Sequence[Row]) -> list[list[str]]:
    lines = []
    for precision in ("fp32", "bf16", "int8"):
        table = [r for r in rows if r["table"] == "transform" and r.get("rows") == 4096 and "rows_per_s" in r]
        ours = pick(table, "transform", peer="fct", precision=precision)
        peers = [r for r in table if r["precision"] == precision and not str(r["peer"]).startswith("fct")]
        best = max(peers, key=lambda r: number(r, "rows_per_s"))
        rate, theirs = number(ours, "rows_per_s"), number(best, "rows_per_s")
        lines.append(
            [
                f"h, inner 2048, {precision}",
                f"{shown(rate)} rows/s, {100 * number(ours, 'share_of_peak'):.0f} % of the peak",
                f"{best['peer']} {shown(theirs)}",
                f"{rate / theirs:.2f} ×",
            ]
        )
    reference = number(pick(table, "transform", peer="reference code", precision="fp32"), "rows_per_s")
    rates = [number(pick(table, "transform", peer="fct", precision=p), "rows_per_s") for p in ("fp32", "int8")]
    lines.append(
        [
            "the reference code's layers, fp32; fct in fp32 · int8",
            " · ".join(shown(rate) for rate in rates) + " rows/s",
            shown(reference),
            " · ".join(f"{rate / reference:.1f} ×" for rate in rates),
        ]
    )
    small = [r for r in rows if r["table"] == SMALL and r.get("state") == "warm"]
    ours = pick(small, SMALL, peer="fct", precision="int8")
    old = pick(small, SMALL, peer="reference code, the paper's h", precision="fp32")
    lines.append(
        [
            "the h that `fct fit` makes (128-d, 0.49 MFLOP), int8, beside the paper's h by the reference code",
            f"{shown(number(ours, 'rows_per_s'))} rows/s, {100 * number(ours, 'share_of_peak'):.0f} % of the peak",
            shown(number(old, "rows_per_s")),
            f"{number(ours, 'rows_per_s') / number(old, 'rows_per_s'):.0f} ×",
        ]
    )
    return lines


def _search(rows: Sequence[Row]) -> list[list[str]]:
    lines = []
    for queries, what in ((1000, "1,000 queries"), (1, "one query")):
        case: dict[str, Value] = {"queries": queries, "k": 10, "gallery": 1_000_000, "state": "warm"}
        ours, theirs = (number(pick(rows, "topk", who=who, **case), "ms") for who in ("fct, prepared", FLAT))
        label = f"exact top-10 of {what} in 1,000,000 × 128"
        lines.append([label, f"{shown(ours)} ms", f"FAISS flat {shown(theirs)} ms", f"{theirs / ours:.1f} ×"])
    for name, what in (("MiniLM texts", "120,000 × 384"), ("Fashion-MNIST pixels", "60,000 × 784")):
        mine = [
            r for r in rows if r["table"] == SETS and (r["set"], r["queries"]) == (name, 1) and r["state"] == "warm"
        ]
        fct = number(pick(mine, SETS, who="fct, prepared"), "ms")
        best = min((r for r in mine if not str(r["who"]).startswith("fct")), key=lambda r: number(r, "ms"))
        peer = f"{str(best['who']).replace('FlatL2', '')} {shown(number(best, 'ms'))} ms"
        ratio = f"{number(best, 'ms') / fct:.1f} ×"
        lines.append([f"exact top-10 of one query in {name}, {what}", f"{shown(fct)} ms", peer, ratio])
    return lines


def _evaluate(rows: Sequence[Row]) -> list[list[str]]:
    us = [number(pick(rows, "evaluate", who=who, classes=10), "us_per_query") for who in ("fct.evaluate", LOOP)]
    peer = f"numpy + scikit-learn {shown(us[1])} µs"
    return [["CMC + mAP, 10,000 × 10,000", f"{shown(us[0])} µs a query", peer, f"{us[1] / us[0]:.0f} ×"]]


def _backfill(rows: Sequence[Row]) -> list[list[str]]:
    row = pick(rows, BACKFILL, what="fct, parquet, binary", inner=2048, precision="bf16")
    rate, alone = number(row, "rows_per_s"), number(row, "kernel_rows_per_s")
    label = "10,000,000 rows, Parquet to Parquet, bf16"
    return [[label, f"{shown(rate)} rows/s", f"h alone {shown(alone)}", f"{100 * rate / alone:.0f} %"]]


BACKFILL = "backfill, 10,000,000 rows"
SMALL = "transform 128-d, small, 4096 rows"
SETS = "search sets"
TABLES = ("transform", SMALL, "topk", SETS, "evaluate", BACKFILL)


def table() -> str:
    """What stands between the marks in the README."""
    rows = rows_of_report()
    lines = [*_transform(rows), *_search(rows), *_evaluate(rows), *_backfill(rows)]
    cells = [["", "fct", "best peer", ""], ["---", "--:", "--:", "--:"], *lines]
    head = f"Measured on: {machine(rows)}; every figure is a row of [the report](benchmarks/report/results.md)."
    return "\n".join([head, "", *(f"| {' | '.join(line)} |" for line in cells)])


def main() -> None:
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{table()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
