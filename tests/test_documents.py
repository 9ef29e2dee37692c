"""What the documents show runs: every Python block, and every `fct` line has only options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from fct.cli import app as cli
from fct.cli import commands

assert commands
ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ["README.md", "docs/index.md", "docs/store-side-information.md", "docs/quickstart.md", "docs/cli.md"]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", RUN)
def test_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in blocks(ROOT / name, "python"):
        exec(compile(block, name, "exec"), scope)


def test_the_readme_shows_the_api_in_ten_lines() -> None:
    (block,) = blocks(ROOT / "README.md", "python")
    calls = [line for line in block.splitlines() if "fct." in line]
    assert 4 <= len(calls) <= 10


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_fct_lines_parse(document: Path) -> None:
    for block in blocks(document, "(?:bash|console|sh)"):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.partition("  #")[0].removeprefix("$ ").strip()
            if not line.startswith("fct "):
                continue
            _, name, *words = shlex.split(line)
            if name.startswith("--"):
                continue
            assert name in COMMANDS, f"{document.name}: {line}"
            known = {flag for p in COMMANDS[name].params for flag in [*p.opts, *p.secondary_opts]} | {
                "--help",
                "--debug",
            }
            used = {word.split("=")[0] for word in words if word.startswith("-")}
            assert used <= known, f"{document.name}: {line}: {sorted(used - known)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (document.parent / target).exists(), f"{document.name} links to {target}, which is not there"


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs" / "images" / "quickstart.png").stat().st_size < 400_000


def test_the_two_commands_are_as_promised() -> None:
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("pip install -c ")]
    assert lines == [
        "pip install -c constraints.txt '.[train]' && fct quickstart",
        "pip install -c constraints.txt '.[test]' && pytest",
    ]
