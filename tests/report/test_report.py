"""The table says the same in every form, the sentence never recommends a loss, the picture and the page are whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fct.report import Example, ResultTable, Row, judge, write_html, write_picture

OLD, NEW, H = "old/old", "new/new", "new/old, h"


def table(cmc1: float = 0.8, mean: float = 0.7, **more: Any) -> ResultTable:
    rows = (
        Row(OLD, 0.5, 0.7, 0.4, 0.1),
        Row(H, cmc1, 0.9, mean, 0.5, 12.34),
        Row(NEW, 0.9, 0.95, 0.8, 1.0, 0.031),
    )
    return ResultTable(rows, **more)


def test_share_of_the_gap() -> None:
    t = table()
    assert t.gap_closed(H, "cmc1") == pytest.approx(0.75)
    assert t.gap_closed(H, "map") == pytest.approx(0.75)
    assert table(0.4).gap_closed(H, "cmc1") == pytest.approx(-0.25)
    assert t.gap_closed(OLD, "map") is None
    assert t.gap_closed(NEW, "map") is None
    no_gap = ResultTable((Row(OLD, 0.9, 0.9, 0.9, 0.1), Row(H, 0.9, 0.9, 0.9, 0.5), Row(NEW, 0.9, 0.95, 0.8, 1.0)))
    assert no_gap.gap_closed(H, "map") is None


def test_every_form_has_the_same_numbers() -> None:
    t = table(title="Upgrade", notes=("what seconds are",), facts={"seed": 3})
    back = ResultTable.from_dict(json.loads(t.to_json()))
    assert back == t
    markdown = t.to_markdown()
    assert "| new/old, h | 80.0 | 90.0 | 70.0 | 50.0 | 75 % | 75 % | 12 |" in markdown
    assert "| new/new | 90.0 | 95.0 | 80.0 | 100.0 | – | – | 0.03 |" in markdown
    assert "what seconds are" in markdown
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(t.to_rich())
    text = console.export_text()
    for cell in (c for row in t.cells() for c in row):
        assert cell in text
    assert "…" not in text, "the table is cut at 80 columns"


def test_bad_tables_are_refused() -> None:
    with pytest.raises(ValueError, match=r"map: expected a share from 0 to 1, got 70"):
        Row(H, 0.5, 0.5, 70, 0.5)
    with pytest.raises(ValueError, match=r"cmc1: expected a share from 0 to 1, got nan"):
        Row(H, float("nan"), 0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"rows: expected one named 'new/new', got \['old/old'\]"):
        ResultTable((Row(OLD, 0.5, 0.7, 0.4, 0.1),))
    with pytest.raises(ValueError, match=r"rows: expected unique names"):
        ResultTable((Row(OLD, 0.5, 0.7, 0.4, 0.1),) * 2)
    with pytest.raises(ValueError, match=r"measure: expected one of cmc1, cmc5, map, recall10, got 'f1'"):
        table().gap_closed(H, "f1")
    with pytest.raises(ValueError, match=r"table: expected what ResultTable.to_dict gives"):
        ResultTable.from_dict({"rows": []})


@pytest.mark.parametrize(
    ("cmc1", "mean", "lead", "migrate"),
    [
        (0.8, 0.7, None, True),
        (0.8, 0.7, (0.2, 0.4), True),
        (0.8, 0.7, (-0.01, 0.4), False),
        (0.5, 0.7, None, False),  # mAP alone flatters a smooth map
        (0.8, 0.4, None, False),
        (0.1, 0.1, None, False),
    ],
)
def test_verdict(cmc1: float, mean: float, lead: tuple[float, float] | None, migrate: bool) -> None:
    verdict = judge(table(cmc1, mean), H, lead=lead)
    assert verdict.migrate is migrate
    assert verdict.sentence.startswith("Migrate:" if migrate else "Do not migrate:")
    assert verdict.sentence.count("\n") == 0
    if migrate:
        assert "75 % of the top-1 gap and 75 % of the mAP gap" in verdict.sentence


def example(systems: tuple[str, ...] = ("old/old", "FCT")) -> Example:
    image = np.arange(784, dtype=np.uint8).reshape(28, 28)
    return Example(image, "Boot", {s: [(image, True), (image, False)] for s in systems})


def test_picture_and_page(tmp_path: Path) -> None:
    picture = write_picture(tmp_path / "p.png", [example(), example()], table(title="Upgrade"))
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert write_picture(tmp_path / "q.png", [example(), example()], table(title="Upgrade")).read_bytes() == data
    page = write_html(
        tmp_path / "p.html",
        table(title="a < b", facts={"seed": 1}),
        verdict=judge(table(), H),
        picture=picture,
        chosen=H,
    ).read_text()
    assert "a &lt; b" in page
    assert "data:image/png;base64," in page
    assert not re.search(r"(src|href)=[\"']?(http|//|/)", page), "the page asks for something outside itself"
    with pytest.raises(ValueError, match=r"examples: expected at least one, got none"):
        write_picture(tmp_path / "n.png", [], table())
    with pytest.raises(ValueError, match=r"examples: expected the same systems"):
        write_picture(tmp_path / "n.png", [example(), example(("FCT",))], table())
    assert not (tmp_path / "n.png").exists()
