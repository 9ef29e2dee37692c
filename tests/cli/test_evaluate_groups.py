"""``fct evaluate --groups``: who loses by an upgrade, who is served worst without one, options that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fct.cli.app import app


@pytest.fixture
def asked(tmp_path: Path) -> tuple[list[str], Any]:
    """Two shops whose items the old vectors tell apart; in the new ones the second shop's are all alike."""
    labels = np.arange(80) % 4
    shops = np.where(np.arange(80) < 40, "small", "\x1blarge")
    old = np.eye(4, dtype=np.float32)[labels] + np.linspace(0, 0.1, 80, dtype=np.float32)[:, None]
    new = old.copy()
    new[shops == "small"] = np.random.default_rng(0).standard_normal((40, 4), dtype=np.float32)
    for name, array in (("old", old), ("new", new), ("y", labels), ("shop", shops)):
        np.save(tmp_path / f"{name}.npy", array)
    words = ["evaluate", "--queries", "new.npy", "--query-labels", "y.npy", "--groups", "shop.npy", "--bootstrap", "0"]
    return [str(tmp_path / w) if w.endswith(".npy") else w for w in words], tmp_path


def test_who_loses_is_printed_and_written(asked: tuple[list[str], Path]) -> None:
    words, folder = asked
    out = folder / "found.json"
    result = CliRunner().invoke(app, [*words, "--before-queries", str(folder / "old.npy"), "--out", str(out)])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "small" in line or "large" in line]
    assert [("loses" in line, "100.0" in line) for line in lines] == [(True, True), (False, True)]
    assert "\x1blarge" not in result.output
    groups = json.loads(out.read_text())["groups"]
    assert [g["loses"] for g in groups["groups"]] == [True, False]
    assert f"{100 * groups['gap_after']:.1f} points below the mean of all" in " ".join(result.output.split())


def test_without_a_before_the_worst_served_group_is_first(asked: tuple[list[str], Path]) -> None:
    result = CliRunner().invoke(app, asked[0])
    assert result.exit_code == 0, result.output
    assert result.output.index("small") < result.output.index("large")
    assert "negative flips" not in result.output


@pytest.mark.parametrize(
    ("more", "without", "message"),
    [
        (["--before-gallery", "old.npy"], (), "--before-queries: expected the queries before the upgrade"),
        (["--before-queries", "old.npy", "--before-gallery", "old.npy"], (), "--before-gallery: expected none, since"),
        (["--before-queries", "old.npy"], ("--groups",), "expected --groups beside them"),
        (
            ["--before-queries", "old.npy", "--gallery", "new.npy"],
            (),
            "--before-gallery: expected the rows that --gallery",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(
    asked: tuple[list[str], Path], more: list[str], without: tuple[str, ...], message: str
) -> None:
    words, folder = asked
    for name in without:
        at = words.index(name)
        words = words[:at] + words[at + 2 :]
    more = [str(folder / w) if w.endswith(".npy") else w for w in more]
    result = CliRunner().invoke(app, [*words, *more])
    assert result.exit_code != 0
    assert message in str(result.exception) + result.output
