"""The page of a backfill: what its journal says of rows over time, restarts, rejects and what is left."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.backfilling.journal import Journal
from fct.backfilling.marker import Marker, ShardTimes
from fct.backfilling.timeline import Timeline, backfill_timeline
from fct.cli import main
from fct.errors import BackfillError, FctError
from fct.gallery import location_of, vector_array
from fct.report.decision_page import write_decision_page
from tests.report.browser import BROWSER, seen_in_a_browser

N, D_OLD, D_NEW = 1200, 8, 6
QUICK: dict[str, Any] = {"progress": False, "shard_rows": 100, "batch_rows": 64, "old_model": "random-old"}
HOSTILE = "<img src=x onerror=alert(1)> \u202eevil"
LOOK = """
const rates = [...document.querySelectorAll("table")].find(t => t.textContent.includes("began (UTC)"));
const press = [...rates.querySelectorAll("th button")].find(b => b.textContent === "began (UTC)");
const at = press.closest("th").cellIndex;
press.click();
const began = [...rates.tBodies[0].rows].map(row => row.cells[at].textContent);
rates.querySelector("th button").click();
const svgs = [...document.querySelectorAll("svg")];
return {began, numbers: [...rates.tBodies[0].rows].map(row => row.cells[0].textContent),
  wide: document.documentElement.scrollWidth, window: innerWidth,
  alts: svgs.map(s => s.getAttribute("aria-label")), bands: svgs.map(s => s.querySelectorAll("rect.band").length),
  outside: svgs.flatMap(s => [...s.querySelectorAll("text")].filter(t => {
    const b = t.getBBox(), v = s.viewBox.baseVal;
    return b.x < -1 || b.x + b.width > v.width + 1 || b.y < -1 || b.y + b.height > v.height + 1;
  }).map(t => t.textContent)),
  touching: svgs.some(s => { const xs = [...s.querySelectorAll("text[text-anchor=middle]")].slice(0, -1)
    .map(t => t.getBBox()).sort((a, b) => a.x - b.x);
    return xs.some((b, i) => i && b.x < xs[i - 1].x + xs[i - 1].width); }),
  colours: [getComputedStyle(document.body).color, getComputedStyle(document.documentElement).colorScheme],
  dark: matchMedia("(prefers-color-scheme: dark)").matches};
"""


@pytest.fixture(scope="module")
def h() -> fct.Transformation:
    return fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=16, side_info=False)


@pytest.fixture
def old(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A gallery of two files, one of a hostile name; 5 rows hold a NaN, one is null."""
    rows = rng.standard_normal((N, D_OLD), dtype=np.float32)
    rows[10:15, 0] = np.nan
    column = vector_array(rows)
    mask = pa.array(np.arange(N) == 700)
    vectors = pa.array(
        [None if m else v for m, v in zip(mask.to_pylist(), column.to_pylist(), strict=True)], column.type
    )
    table = pa.table({"id": np.arange(N), "old": vectors})
    folder = tmp_path / "old"
    folder.mkdir()
    pq.write_table(table.slice(0, 600), folder / "a.parquet", row_group_size=100)
    pq.write_table(table.slice(600), folder / f"b {HOSTILE}.parquet", row_group_size=100)
    return folder


def marked(new: Path, change: Callable[[Marker], Marker | None], root: str = "_fct") -> None:
    """Rewrites the markers of a journal; those that become None are taken away, and their files with them."""
    journal = Journal(location_of(new / root), location_of(new))
    for number in journal.marked():
        marker = journal.marker(number)
        assert marker is not None
        after = change(marker)
        if after is not None:
            journal.mark(after)
            continue
        (new / root / f"done/{number:08d}.json").unlink()
        for output in marker.outputs:
            (new / output.name).unlink()


def at(marker: Marker, began: float, ended: float, worker: str = "a" * 32) -> Marker:
    return replace(marker, times=ShardTimes(began, ended, worker))


def stopped(old: Path, new: Path, h: fct.Transformation) -> Timeline:
    """Six of twelve shards, made by two runs: 100 rows in each of 4 seconds, an hour of nothing, and two more."""
    fct.backfill(old, new, h, **QUICK)
    (new / "_fct/manifest.json").unlink()
    begin = 1_764_400_000.0

    def change(marker: Marker) -> Marker | None:
        number = marker.shard
        if number >= 6:
            return None
        if number < 4:
            return at(marker, begin + max(0, number - 1), begin + number + 1)
        return at(marker, begin + 3600 + max(0, number - 5), begin + 3601 + 2 * (number - 4), "b" * 32)

    marked(new, change)
    return backfill_timeline(new)


def test_a_run_says_when_each_shard_was_made(old: Path, h: fct.Transformation, tmp_path: Path) -> None:
    import time

    before = time.time()
    fct.backfill(old, tmp_path / "new", h, **QUICK)
    found = backfill_timeline(tmp_path / "new")
    assert found.finished
    assert (found.rows_done, len(found.shards), found.left, found.troubles) == (N, 12, (), ())
    assert found.span is not None
    assert before - 0.01 <= found.span[0] <= found.span[1] <= time.time() + 0.01
    assert len({shard.worker for shard in found.shards}) == 1
    assert all(shard.began <= shard.ended for shard in found.timed if shard.began and shard.ended)
    assert not any(pause.restarted for pause in found.pauses)
    assert sum(found.reasons.values()) == found.rejects == 6
    assert sorted(found.reasons.values()) == [1, 5]


def test_a_restart_is_a_pause_and_what_is_left_is_named(old: Path, h: fct.Transformation, tmp_path: Path) -> None:
    found = stopped(old, tmp_path / "new", h)
    assert not found.finished
    assert found.rows_done == 600
    assert [(p.ended - p.began, p.restarted) for p in found.pauses] == [(3596.0, True)]
    assert [shard.seconds for shard in found.shards] == [1.0, 1.0, 1.0, 1.0, 1.0, 2.0]
    assert found.rate == pytest.approx(600 / 7)
    assert found.seconds_left == pytest.approx(7.0)
    assert [(one.name, one.rows, one.shards) for one in found.left] == [(f"b {HOSTILE}.parquet", 600, 6)]
    page = write_decision_page(tmp_path / "page.html", backfill=found).read_text()
    assert "<b>unfinished</b>: 600 of 1,200 rows are done (50.0 %), 600 are left, about 7.0 seconds at the" in page
    assert "Rows done over time. 50.0 % of the rows were done after 60 minutes, with 1 pause" in page
    assert "started again</td>" in page
    # And it goes on: a pause that ends now, and no marker of before is touched.
    report = fct.backfill(old, tmp_path / "new", h, **QUICK)
    assert (report.shards_kept, report.shards_done) == (6, 6)
    again = backfill_timeline(tmp_path / "new")
    assert [p.restarted for p in again.pauses] == [True, True]
    assert [s for s in again.shards if s.number < 6] == [s for s in found.shards if s.number < 6]


def test_what_a_worker_waits_for_is_no_restart(old: Path, h: fct.Transformation, tmp_path: Path) -> None:
    """One worker that pauses; two at a time of which one is gone; and a clock that was set back."""
    fct.backfill(old, tmp_path / "new", h, **QUICK)
    times = {
        0: (0.0, 10.0, "a"), 1: (0.0, 20.0, "b"), 2: (500.0, 510.0, "b"), 3: (900.0, 910.0, "c"),
        4: (920.0, 915.0, "c"), 5: (911.0, 912.0, "c"),
    }  # fmt: skip
    marked(
        tmp_path / "new",
        lambda m: at(m, *times[m.shard]) if m.shard in times else replace(m, times=None),
    )
    found = backfill_timeline(tmp_path / "new")
    assert [(p.began, p.ended, p.restarted) for p in found.pauses] == [(20.0, 500.0, False), (510.0, 900.0, True)]
    assert len(found.timed) == 5
    page = write_decision_page(tmp_path / "page.html", backfill=found).read_text()
    assert "7 of 12 shards do not say when they were made" in page
    assert "waited</td>" in page


def test_markers_without_times_are_believed(old: Path, h: fct.Transformation, tmp_path: Path) -> None:
    """As version 0.1, and every version before these times, wrote them; the fingerprint knows nothing of times."""
    new = tmp_path / "new"
    report = fct.backfill(old, new, h, **QUICK)
    marked(new, lambda marker: replace(marker, times=None))
    assert all("times" not in f.read_text() for f in (new / "_fct/done").iterdir())
    again = fct.backfill(old, new, h, **QUICK)
    assert (again.shards_kept, again.shards_done, again.fingerprint) == (12, 0, report.fingerprint)
    assert fct.verify_gallery(new, source=old).ok
    found = backfill_timeline(new)
    assert (found.span, found.rate, found.pauses) == (None, None, ())
    page = write_decision_page(tmp_path / "page.html", backfill=found).read_text()
    assert "12 of 12 shards do not say when they were made" in page
    assert "<svg" not in page


@pytest.mark.parametrize(
    "times",
    [
        {"began": -1.0, "ended": 2.0, "worker": "a"}, {"began": 1.0, "ended": 1e300, "worker": "a"},
        {"began": 1.0, "ended": 2.0, "worker": "<b>"}, {"began": 1.0, "ended": 2.0}, [1.0, 2.0], "now",
        {"began": 1.0, "ended": 2.0, "worker": "a", "more": 1},
    ],
)  # fmt: skip
def test_times_that_nobody_could_have_written_are_a_damaged_marker(times: Any) -> None:
    from fct.atomic_files import checksum_bytes

    marker = Marker(0, "f", 1, 1, 0, "0" * 16, (), None, "cpu")
    body = json.dumps({**asdict(marker), "times": times})
    data = json.dumps({"marker": body, "xxh64": checksum_bytes(body.encode())}).encode()
    assert Marker.from_json(data) is None
    assert Marker.from_json(marker.to_json()) == marker


def test_what_cannot_be_believed_is_said(old: Path, h: fct.Transformation, tmp_path: Path) -> None:
    new = tmp_path / "new"
    fct.backfill(old, new, h, **QUICK)
    done, rejects = new / "_fct/done", sorted((new / "_fct/rejects").iterdir())
    (done / "00000003.json").write_text("torn")
    (done / "00000099.json").write_bytes((done / "00000002.json").read_bytes())
    rejects[0].write_bytes(rejects[0].read_bytes()[:-5] + b"oops\n")
    rejects[1].unlink()
    (new / "_fct/manifest.json").write_text("{}")
    found = backfill_timeline(new)
    assert not found.finished
    assert found.rows_done == 1100
    said = " ".join(found.troubles)
    assert "2 markers are damaged or of another job" in said
    assert "does not match its checksum" in said
    assert "the lines of its 1 rejected rows are missing" in said
    assert "manifest.json is damaged" in said


def files_of(text: str) -> dict[str, str]:
    links = re.findall(r'download="([^"]*)" href="data:text/csv;charset=utf-8;base64,([^"]*)"', text)
    return {name: base64.b64decode(data).decode() for name, data in links}


def test_nothing_of_a_gallery_s_is_markup_and_all_can_be_taken_along(
    old: Path, h: fct.Transformation, tmp_path: Path
) -> None:
    page = write_decision_page(tmp_path / "page.html", backfill=stopped(old, tmp_path / "new", h)).read_text()
    assert "<img" not in page
    assert "\u202e" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    files = files_of(page)
    assert sorted(files) == ["backfill.csv", "left.csv", "pauses.csv", "rejects.csv", "shards.csv"]
    facts = dict(line.split(",", 1) for line in files["backfill.csv"].splitlines())
    assert facts["new space"].strip('"').startswith("'random-new' (6-d, l2")
    assert facts["precision"].startswith('"fp32, ')
    assert facts["h"] == h.fingerprint
    assert len(files["shards.csv"].splitlines()) == 1 + 6
    assert files["shards.csv"].splitlines()[1].startswith("5,50,100,0,2025-11-29 ")
    assert [line.rpartition(",")[2] for line in files["rejects.csv"].splitlines()] == ["rows", "5"]


# Stays: the package has no browser among its extras, and a machine without one can still run every other test.
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_in_a_browser(old: Path, h: fct.Transformation, tmp_path: Path, width: int, dark: bool) -> None:
    page = write_decision_page(tmp_path / "page.html", backfill=stopped(old, tmp_path / "new", h))
    seen = seen_in_a_browser(page, LOOK, width, dark=dark)
    assert seen["problems"] == []
    assert seen["window"] == width
    assert seen["wide"] <= width
    assert seen["began"] == sorted(seen["began"]), "times are put in order as times"
    assert seen["numbers"] == ["0", "1", "2", "3", "4", "5"]
    assert [alt.partition(".")[0] for alt in seen["alts"]] == [
        "Rows done over time", "Rows a second of a worker, shard by shard"
    ]  # fmt: skip
    assert seen["bands"] == [1, 1], "the hour in which nothing was under way"
    assert seen["outside"] == [], "letters that the picture cuts off"
    assert not seen["touching"], "numbers on an axis that run into each other"
    assert seen["dark"] is dark


def run(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main(["report", *map(str, words)])
    return int(left.value.code or 0), " ".join("".join(capfd.readouterr()).split())


def test_from_the_command_line(
    old: Path, h: fct.Transformation, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the new gallery, by its journal where that lies elsewhere, and with what verify found."""
    new, apart, out = tmp_path / "new", tmp_path / "apart", tmp_path / "page.html"
    fct.backfill(old, new, h, **QUICK)
    fct.backfill(old, apart, h, journal=tmp_path / "j", **QUICK)
    assert run(capfd, "--backfill", new, "--out", out) == (0, f"wrote {out}")
    assert "<b>finished</b>: 1,200 rows in = 1,194 out + 6 rejected; not verified here" in out.read_text()
    assert run(capfd, "--backfill", tmp_path / "j", "--out", out, "--overwrite")[0] == 0
    assert str(apart) in out.read_text()
    with pytest.raises(SystemExit):
        main(["verify", str(new), "--source", str(old), "--json"])
    (tmp_path / "verify.json").write_text(capfd.readouterr().out)
    words = ["--backfill", new, "--verify", tmp_path / "verify.json", "--out", out, "--overwrite"]
    assert run(capfd, *words)[0] == 0
    text = out.read_text()
    assert "1,194 out + 6 rejected; verified." in text
    assert "What fct verify found: proven" in text
    worse = json.loads((tmp_path / "verify.json").read_text()) | {"ok": False, "problems": [f"shard 0 {HOSTILE}"]}
    (tmp_path / "verify.json").write_text(json.dumps(worse))
    assert run(capfd, *words)[0] == 0
    assert "<b>not whole</b>: fct verify found 1 problem: shard 0 &lt;img" in out.read_text()


def test_what_is_no_backfill_is_refused_by_name(
    tmp_path: Path, old: Path, h: fct.Transformation, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert "COMPARISON: expected it (what fct compare --out wrote), --verdict or --backfill" in run(capfd)[1]
    assert "--verify: expected --backfill beside it" in run(capfd, "c.json", "--verify", "v.json")[1]
    found = run(capfd, "--backfill", old, "--out", out)
    assert found[0] != 0
    assert (
        "--backfill: expected a backfill's new gallery (with its journal in _fct/) or the folder of its --jou"
        in found[1]
    )
    assert "a database has no place for its journal" in run(capfd, "--backfill", "postgresql://x/y?table=z")[1]
    with pytest.raises(BackfillError, match=r"found no job\.json in"):
        backfill_timeline(tmp_path / "nowhere")
    fct.backfill(old, tmp_path / "new", h, **QUICK)
    with pytest.raises(FctError, match="fct verify --json write, got others"):
        write_decision_page(out, backfill=backfill_timeline(tmp_path / "new"), verified={"ok": True})
    assert not out.exists()
