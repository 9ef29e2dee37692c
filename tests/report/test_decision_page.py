"""The page to decide by: opened in a real browser, and hostile texts in it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.cli import main
from fct.errors import FctError
from fct.report.decision_page import Neighbours, write_decision_page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>alert(1)</script> \u202eevil \x1b[31m =cmd()"
WATCH = """<script>window.problems = [];
addEventListener("error", e => problems.push(e.message));
addEventListener("securitypolicyviolation", e => problems.push(e.violatedDirective));</script>"""
CLICK = """<script>
const first = () => [...document.querySelector("tbody").rows].map(row => row.cells[0].textContent);
const press = document.querySelectorAll("th button")[1], order = [];
for (let i = 0; i < 2; i++) { press.click(); order.push(first()); }
const speed = [...document.querySelectorAll("th button")].find(b => b.textContent === "rows/s");
const missing = [];
for (let i = 0; i < 2; i++) { speed.click(); missing.push(first().slice(-1)); }
const svg = document.querySelector("svg");
const size = parseFloat(getComputedStyle(svg.querySelector("text")).fontSize);
parent.postMessage(JSON.stringify({problems, order, missing,
  name: document.querySelector("tbody td").getBoundingClientRect().width,
  letters: size * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width,
  wide: document.documentElement.scrollWidth,
  window: innerWidth, links: [...document.querySelectorAll("a")].map(a => a.protocol),
  scripts: document.scripts.length}), "*");
</script>"""


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
MIXED = {"points": [{"true_share": s, "recall": s, "corrected_recall": min(1, s + 0.1)} for s in (0.1, 0.5, 0.9)]}
NEAR = [Neighbours(HOSTILE, ["a" * 300, HOSTILE], ["b", "c"], ["a" * 300, "d"])]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return write_decision_page(tmp_path / "page.html", COMPARISON, verdict=VERDICT, mixed=MIXED, neighbours=NEAR)


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
    files = [base64.b64decode(data).decode() for data in re.findall(r"base64,([A-Za-z0-9+/=]+)", text)]
    assert len(files) == 3
    assert files[0].splitlines()[2].startswith("ridge,39.0,0.5,0.04,")
    assert "CMC top-1 %" not in text, "a column that holds nothing"
    alone = write_decision_page(page.with_name("alone.html"), COMPARISON).read_text()
    assert "<b>undecided</b>: On 120 held-out pairs auto keeps 47.0 %" in alone
    assert "doing nothing keeps 23.0 %" in alone


def scripts_of(text: str) -> list[str]:
    return re.findall(r"<script>(.*?)</script>", text, re.DOTALL)


# Stays: the package has no browser among its extras, and a machine without one can still run every other test.
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(page: Path, width: int) -> None:
    """No error, no request, headings that sort, nothing wider than the window.

    In a frame of that width: no window of Chromium is narrower than 500.
    """
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts_of(WATCH + CLICK)
    )
    text = page.read_text().replace("script-src ", f"script-src {hashes} ")
    text = text.replace("<body>", f"<body>{WATCH}").replace("</body>", f"{CLICK}</body>")
    opened = page.with_name("opened.html")
    opened.write_text(
        "<!doctype html><body><script>addEventListener('message', e => document.body.dataset.seen = e.data)</script>"
        f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{html.escape(text)}"></iframe></body>'
    )
    with tempfile.TemporaryDirectory() as profile:
        command = [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--window-size=1400,1000", "--virtual-time-budget=3000", "--dump-dom", opened.as_uri(),
        ]  # fmt: skip
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found, dom[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["problems"] == []
    assert seen["window"] == width
    assert seen["wide"] <= seen["window"]
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
