"""The page to decide by: opened in a real browser, and hostile texts in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.cli import main
from fct.errors import FctError
from fct.report.decision_page import write_decision_page
from fct.report.neighbour_lists import Item, Neighbours
from fct.report.thumbnails import Thumbnails
from tests.report.browser import BROWSER, scripts_of, seen_in_a_browser

HOSTILE = "<script>alert(1)</script> \u202eevil \x1b[31m =cmd()"
CLICK = """
const first = () => [...document.querySelector("tbody").rows].map(row => row.cells[0].textContent);
const press = document.querySelectorAll("th button")[1], order = [];
for (let i = 0; i < 2; i++) { press.click(); order.push(first()); }
const speed = [...document.querySelectorAll("th button")].find(b => b.textContent === "rows/s");
const missing = [];
for (let i = 0; i < 2; i++) { speed.click(); missing.push(first().slice(-1)); }
const svg = document.querySelector("svg");
const size = parseFloat(getComputedStyle(svg.querySelector("text")).fontSize);
return {order, missing,
  name: document.querySelector("tbody td").getBoundingClientRect().width,
  letters: size * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width,
  wide: document.documentElement.scrollWidth,
  pictures: [...document.images].map(i => [i.alt.startsWith("Picture of "), i.naturalWidth > 0]),
  window: innerWidth, links: [...document.querySelectorAll("a")].map(a => a.protocol),
  scripts: document.scripts.length};
"""


def row(name: str, recall: float, **more: Any) -> dict[str, Any]:
    figures = {
        "name": name, "recall_at_10": recall, "cmc1": None, "map": None, "fit_seconds": 0.5, "mflop_per_row": 0.04,
        "rows_per_s": 1_200_000.0, "bytes_per_row": 1536, "hours": 0.23, "cost": 0.6,
    }  # fmt: skip
    return figures | more


COMPARISON: dict[str, Any] = {
    "metric": "l2", "train_pairs": 480, "held_out_pairs": 120, "ceiling": {"old": 0.47}, "curve_of": "ridge",
    "unlike_gallery": 0.031, "rows": 1e9,
    "alternatives": [row("nothing", 0.23, rows_per_s=None), row("ridge", 0.39), row("auto", 0.47), row(HOSTILE, 0.1)],
    "curve": [
        {"pairs": 240, "recall": 0.3, "error": 0.01, "measured": True},
        {"pairs": 480, "recall": 0.39, "error": 0.01, "measured": True},
        {"pairs": 960, "recall": 0.44, "error": 0.02, "measured": False},
    ],
}  # fmt: skip
GAIN = {"queries": 400, "mean": 0.09, "low": 0.08, "high": 0.1}
VERDICT: dict[str, Any] = {
    "word": "go", "reason": f"more is found: {HOSTILE}", "candidate": "mapped", "queries": 400,
    "left_out": {"without_judgement": 3, "without_relevant": 2, "unknown_queries": 1, "unknown_items": 4},
    "systems": [
        {"name": "old/old", "nDCG@10": 0.4, "MRR@10": 0.5, "recall@10": 0.6, "gain": None, "slices": {}},
        {"name": "mapped", "nDCG@10": 0.5, "MRR@10": 0.6, "recall@10": 0.7, "gain": GAIN, "slices": {HOSTILE: GAIN}},
    ],
}  # fmt: skip
MIXED: dict[str, Any] = {
    "mapped_recall": 0.05, "correction": {"kind": "length", "value": 0.87}, "rows": 2000,
    "points": [{"true_share": s, "recall": s, "corrected_recall": min(1, s + 0.1)} for s in (0.1, 0.5, 0.9)],
}  # fmt: skip
LOSSES: dict[str, Any] = fct.who_loses(
    np.repeat([1.0, 0.5], 40), np.repeat([1.0, 0.1], 40), np.repeat(["fine", HOSTILE], 40)
).to_dict()


def near(pictures: Any = None) -> list[Neighbours]:
    """Texts, hostile, long and twice the same; and an item with pictures."""
    a, twin = Item(1, "a" * 300), Item(2, "a" * 300)
    found = [Neighbours(Item(0, HOSTILE), [a, Item(3, HOSTILE)], [twin, Item(4, "c")], [a, Item(5, "d")])]
    if pictures is not None:
        items = [Item(row, f"{HOSTILE} {row}", pictures[row]) for row in range(6)]
        found.append(Neighbours(items[0], items[1:6], items[2:6], items[1:4]))
    return found


def pictures_of(n: int = 6) -> Any:
    """(n, 40, 60, 3) uint8, of which no two are alike."""
    rows = np.arange(n)[:, None, None, None]
    return np.broadcast_to(40 * rows + np.arange(60)[None, None, :, None], (n, 40, 60, 3)).astype(np.uint8)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return write_decision_page(tmp_path / "page.html", COMPARISON, verdict=VERDICT, mixed=MIXED, losses=LOSSES,
                               neighbours=near(Thumbnails(pictures_of(), 6)))  # fmt: skip


def test_nothing_of_a_user_s_is_markup(page: Path) -> None:
    text = page.read_text()
    assert "<script>alert" not in text
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert not re.search(r"(src|href)=.?(https?:|//)", text), "a page that asks somebody for something"


def test_the_verdict_stands_first_and_the_tables_can_be_taken_along(page: Path) -> None:
    text = page.read_text()
    assert text.index("<b>go</b>") < text.index("<table>")
    files = [base64.b64decode(data).decode() for data in re.findall(r"utf-8;base64,([A-Za-z0-9+/=]+)", text)]
    assert len(files) == 6
    assert files[1].splitlines()[-1] == "960,44.0,2.0,extrapolated"
    assert files[0].splitlines()[2].startswith("ridge,39.0,0.5,0.04,")
    assert "CMC top-1 %" not in text, "a column that holds nothing"
    alone = write_decision_page(page.with_name("alone.html"), COMPARISON).read_text()
    assert "<b>undecided</b>: On 120 held-out pairs auto keeps 47.0 %" in alone
    assert "doing nothing keeps 23.0 %" in alone


# Stays: the package has no browser among its extras, and a machine without one can still run every other test.
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(page: Path, width: int) -> None:
    """No error, no request, headings that sort, nothing wider than the window."""
    seen = seen_in_a_browser(page, CLICK, width)
    assert seen["problems"] == []
    assert seen["window"] == width
    assert seen["wide"] <= seen["window"]
    assert seen["pictures"] == [[True, True]] * 13, "each has an alternative text and is drawn"
    assert set(seen["links"]) == {"data:"}
    assert seen["scripts"] == 3, "the page's own and the two of this test"
    assert seen["order"][0] == seen["order"][1][::-1]
    assert seen["order"][1][0] == "auto"
    assert seen["missing"] == [["nothing"], ["nothing"]], "what has no figure stands last, whichever way it is sorted"
    assert seen["name"] >= 100, "a column of names that breaks between letters"
    assert seen["letters"] >= 9, "the charts' letters, in pixels"


def test_no_script_but_the_page_s_own_may_run(page: Path) -> None:
    """One script, and the policy names it by its hash."""
    text = page.read_text()
    (script,) = scripts_of(text)
    ours = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    assert f"script-src 'sha256-{ours}';" in policy[1]
    assert "default-src 'none'" in policy[1]


def test_from_the_command_line(tmp_path: Path, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "compare.json").write_text(json.dumps(COMPARISON))
    (tmp_path / "verdict.json").write_text(json.dumps(VERDICT))
    fct.Transformation.random(6, 6, 4, inner=8, side_info=False).save(tmp_path / "h.safetensors")
    old, new = rng.standard_normal((40, 6), dtype=np.float32), rng.standard_normal((40, 4), dtype=np.float32)
    np.savez(tmp_path / "held.npz", old=old, new=new)
    pq.write_table(pa.table({"title": [f"title {i}" for i in range(40)]}), tmp_path / "titles.parquet")

    def run(*words: str) -> tuple[int, str]:
        args = ["report", str(tmp_path / "compare.json"), "--out", str(tmp_path / "page.html"), *words]
        with pytest.raises(SystemExit) as left:
            main(args)
        return int(left.value.code or 0), "".join(capfd.readouterr())

    h = ["-t", str(tmp_path / "h.safetensors")]
    pairs = ["--pairs", str(tmp_path / "held.npz"), "--texts", f"{tmp_path / 'titles.parquet'}:title"]
    code, out = run("--verdict", str(tmp_path / "verdict.json"), *h, *pairs, "--items", "2")
    assert (code, out) == (0, f"wrote {tmp_path / 'page.html'}\n")
    text = (tmp_path / "page.html").read_text()
    assert text.count('class="near"') == 2
    nearest = fct.topk(new, new, 2).indices
    asked = [int(n) for n in re.findall(r"<b>title ([0-9]+)</b>", text)]
    first = [int(n) for n in re.findall(r"new model alone<ol><li class=kept>title ([0-9]+)", text)]
    assert "<h2>Who loses</h2>" not in text
    assert first == [int(nearest[i][nearest[i] != i][0]) for i in asked]
    assert "--out: expected a new path" in run()[1] or "exists" in run()[1]
    assert "--pairs: expected -t beside it" in run("--overwrite", *pairs)[1]
    (tmp_path / "compare.json").write_text("{}")
    assert "report: expected the figures that fct compare --out" in run("--overwrite")[1]
    (tmp_path / "compare.json").write_text(json.dumps(COMPARISON | {"unlike_gallery": float("nan")}))
    assert "a figure is NaN" in run("--overwrite")[1]
    (tmp_path / "compare.json").write_text("[" * 100_000)
    assert "COMPARISON: expected JSON" in run("--overwrite")[1]


def test_other_figures_are_refused(tmp_path: Path) -> None:
    for wrong in ({}, COMPARISON | {"alternatives": []}, COMPARISON | {"rows": "many"}, COMPARISON | {"curve": [1, 2]}):
        with pytest.raises(FctError, match="report: expected the figures that fct compare"):
            write_decision_page(tmp_path / "page.html", wrong)
    assert not (tmp_path / "page.html").exists()


def test_who_loses_stands_there_with_every_group_in_the_file(tmp_path: Path, page: Path) -> None:
    text = page.read_text()
    part = text[text.index("<h2>Who loses</h2>") :]
    assert part.index("&lt;script&gt;") < part.index("fine"), "the greatest loss first"
    assert "2 groups, 1 of which lose beyond what chance explains" in part
    many = fct.who_loses(np.ones(200), np.zeros(200), np.arange(200) // 2).to_dict()
    text = write_decision_page(tmp_path / "many.html", COMPARISON, losses=many).read_text()
    assert "the 30 that lose most are shown, all are in the file" in text
    data = re.findall(r'download="losses.csv" href="data:text/csv;charset=utf-8;base64,([^"]*)"', text)
    assert len(base64.b64decode(data[0]).decode().splitlines()) == 1 + 1 + 100
    with pytest.raises(FctError, match=r"report: expected the figures that fct compare --out, .* fct evaluate --out"):
        write_decision_page(tmp_path / "wrong.html", COMPARISON, losses={"groups": []})


def test_twins_are_told_apart(page: Path) -> None:
    """Two items of one text: only the one that the new model finds has its tick."""
    text = page.read_text()
    today = re.findall(r"<div>today<ol>(.*?)</ol>", text)
    assert today
    assert "class=kept" not in today[0]


def image_files(folder: Path, names: list[str]) -> Path:
    from PIL import Image

    folder.mkdir()
    for row, name in enumerate(names):
        Image.fromarray(pictures_of(len(names))[row]).save(folder / name)
    return folder


def colour(url: str) -> int:
    """Of a thumbnail's first pixel."""
    import io

    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as picture:
        assert max(picture.size) <= 96
        return int(np.asarray(picture.convert("L"))[0, 0])


def test_files_belong_to_items_by_id_or_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = image_files(tmp_path / "by-number", ["1.png", "2.png", "10.png"])  # 10 comes before 2 in a listing
    found = Thumbnails(folder, 3)
    assert [round(colour(found[row]) / 40) for row in range(3)] == [0, 1, 2]
    found = Thumbnails(folder, 2, ["10", "1"])
    assert [round(colour(found[row]) / 40) for row in range(2)] == [2, 0]
    with pytest.raises(ValueError, match=r"images: expected a file for each of 2 ids, .* lacks 1 \('7'\)"):
        Thumbnails(folder, 2, ["10", "7"])
    with pytest.raises(ValueError, match=r"images: expected 4 image files, one for each pair, .* has 3"):
        Thumbnails(folder, 4, ["a", "b", "c", "d"])
    (folder / "1.png").write_bytes(b"no image")
    with pytest.raises(FctError, match=r"images: expected an image, .*1\.png is none"):
        Thumbnails(folder, 3)[0]


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((3, 4)), r"images: expected \(3, height, width\) or"),
        (np.zeros((2, 8, 8), np.uint8), r"to match the pairs, got \(2, 8, 8\)"),
        (np.zeros((3, 8, 8), np.int64), "images: expected uint8, or floats from 0 to 1, got int64"),
        (np.full((3, 8, 8), 7.0), "got floats beyond"),
    ],
)
def test_arrays_that_are_no_pictures(pixels: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Thumbnails(pixels, 3)[0]


def test_grey_floats_and_transparent_files_are_shown(tmp_path: Path) -> None:
    from PIL import Image

    assert colour(Thumbnails(np.full((1, 28, 28), 0.5, np.float32), 1)[0]) in range(126, 131)
    Image.new("RGBA", (300, 200), (0, 0, 0, 0)).save(tmp_path / "empty.png")
    assert colour(Thumbnails(tmp_path, 1)[0]) > 250, "on white, as on paper"


def test_groups_and_pictures_from_the_command_line(
    tmp_path: Path, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    """The losers are those whose neighbours the map loses, measured item by item."""
    (tmp_path / "compare.json").write_text(json.dumps(COMPARISON))
    h = fct.Transformation.random(6, 6, 4, inner=8, side_info=False)
    h.save(tmp_path / "h.safetensors")
    old = rng.standard_normal((80, 6), dtype=np.float32)
    new = fct.transform_batch(old, None, h, progress=False)
    new[40:] = rng.standard_normal((40, 4), dtype=np.float32)
    np.savez(tmp_path / "held.npz", old=old, new=new, id=np.array([f"item {i}" for i in range(80)]))
    np.save(tmp_path / "pixels.npy", rng.integers(0, 255, (80, 12, 12), dtype=np.uint8))
    np.save(tmp_path / "groups.npy", np.repeat([7, 8], 40))

    def run(*words: str) -> str:
        args = ["report", str(tmp_path / "compare.json"), "--out", str(tmp_path / "page.html"), "--overwrite", *words]
        with pytest.raises(SystemExit):
            main(args)
        return "".join(capfd.readouterr())

    pairs = ["-t", str(tmp_path / "h.safetensors"), "--pairs", str(tmp_path / "held.npz")]
    pictures = ["--images", str(tmp_path / "pixels.npy"), "--groups", str(tmp_path / "groups.npy")]
    assert "wrote" in run(*pairs, *pictures, "--items", "3")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<img ") == 3 * (1 + 3 * 5)
    assert 'alt="Picture of item ' in text
    part = text[text.index("<h2>Who loses</h2>") :]
    assert "recall@10 before %" in part
    rows = dict(re.findall(r"<td>(7|8|all)</td><td>\d+</td><td>[\d.]+</td><td>([\d.]+)</td>", part))
    assert float(rows["7"]) > float(rows["8"])
    assert "--images: expected --pairs beside it" in run(*pictures[:2])
    assert "--groups: expected" in run(*pairs, "--groups", str(tmp_path / "pixels.npy"))
    (tmp_path / "losses.json").write_text(json.dumps({"map": 0.5, "groups": LOSSES}))
    assert "wrote" in run("--losses", str(tmp_path / "losses.json"))
    assert "fine" in (tmp_path / "page.html").read_text()
    assert "--losses: expected what fct evaluate" in run("--losses", str(tmp_path / "compare.json"))
