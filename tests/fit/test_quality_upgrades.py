"""The quality experiments: train, validation and test are apart; a rehearsal writes its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.slow
def test_parts_are_apart_and_a_rehearsal_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.quality import __main__ as program
    from benchmarks.quality.upgrades import IMAGE_UPGRADES, image_upgrade

    assert len(IMAGE_UPGRADES) == 3
    upgrade = image_upgrade("image size 14 to 28", data_root=None, seed=0, pairs=300, epochs=1)
    keys = [set(rows.keys) for rows in upgrade.values()]
    assert [len(k) for k in keys] == [len(rows.old) for rows in upgrade.values()]
    assert not keys[0] & keys[1]
    assert not (keys[0] | keys[1]) & keys[2]
    out = tmp_path / "table.md"
    monkeypatch.setattr(program, "IMAGE_UPGRADES", {"image size 14 to 28": IMAGE_UPGRADES["image size 14 to 28"]})
    arguments = ["--out", str(out), "--seeds", "1", "--pairs", "300", "--epochs", "1", "--side-dim", "16"]
    monkeypatch.setattr(sys, "argv", ["quality", *arguments, "--recipes", "ridge;Procrustes;auto"])
    program.main()
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    reached = {row["recipe"]: row["recall@10"] for row in rows}
    assert reached["auto"] >= max(reached["ridge"], reached["Procrustes"]) - 0.01
    assert out.read_text().count("image size 14 to 28") == 3
