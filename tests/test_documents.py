"""What the documents show runs: every Python block, and every `fct` line has only options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer

import fct
from fct import errors
from fct.cli import app as cli
from fct.cli import commands
from fct.fit import auto_plan
from tests.command_line import run_here

assert commands
ROOT = Path(__file__).parents[1]
COMMANDS: Any = typer.main.get_group(cli.app).commands
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "KERNELS.md", *sorted((ROOT / "docs").glob("*.md"))]
# Names that a page speaks of without making them. Elsewhere: docs/engines.md in tests/engines; docs/gpu.md needs a GPU;
# docs/export.md in tests/gallery/test_importers.py.
STAND_INS = {
    "docs/text-embeddings.md": """
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
class new_model:
    encode = staticmethod(lambda texts: np.ones((len(texts), 6), np.float32))
texts = [f"text {i}" for i in range(50)]
pq.write_table(pa.table({"id": range(50), "text": texts, "embedding": list(np.ones((50, 4)))}), "gallery.parquet")
""",
    "docs/retrieval.md": """
import numpy as np
rng = np.random.default_rng(0)
items = rng.integers(0, 60, 300)  # near copies, as deduplication finds them
noise = rng.standard_normal((2, 300, 8), dtype=np.float32)
old, new = rng.standard_normal((2, 60, 8), dtype=np.float32)[:, items] + 0.3 * noise
gallery, queries, mapped = old, old[:20], new + 0.1
labels = gallery_labels = rng.integers(0, 3, 300)
query_labels = labels[:20]
""",
    "docs/backfill.md": """
import fct, fct.gallery, numpy as np, os, pyarrow as pa, pyarrow.parquet as pq
rows = np.random.default_rng(0).standard_normal((400, 8), dtype=np.float32)
h = fct.fit_transformation(rows, None, np.tanh(rows[:, :4]), progress=False)
os.mkdir("old")
pq.write_table(pa.table({"id": range(50), "old": list(np.ones((50, 8), np.float32))}), "old/part.parquet")
fct.gallery.tag_space("old", h.old_space)
pq.write_table(pa.table({"id": [3, 3, 7], "count": [1, 2, 5]}), "clicks.parquet")
embed = lambda ids: np.ones((len(ids), 4), np.float32)
""",
    "docs/galleries.md": """
import datasets, fct, fct.gallery, numpy as np, os, polars as pl, pyarrow as pa, pyarrow.parquet as pq
for folder in ("gallery", "new-gallery"):
    os.mkdir(folder)
    pq.write_table(pa.table({"id": [1], "old": list(np.ones((1, 128), np.float32))}), f"{folder}/part.parquet")
""",
}
RUN = [
    "README.md", "docs/index.md", "docs/store-side-information.md", "docs/quickstart.md", "docs/cli.md", *STAND_INS,
]  # fmt: skip


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps of training: what a document shows is that it runs, not how good h is on random rows."""
    monkeypatch.setattr(auto_plan, "_FEW_STEPS", 60)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", RUN)
def test_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "docs/galleries.md":
        pytest.importorskip("polars")
    scope: dict[str, Any] = {}
    exec(STAND_INS.get(name, ""), scope)
    for block in blocks(ROOT / name, "python"):
        exec(compile(block, name, "exec"), scope)


def test_every_page_with_python_is_run_somewhere() -> None:
    elsewhere = {"docs/engines.md", "docs/export.md", "docs/gpu.md"}
    pages = {str(d.relative_to(ROOT)) for d in DOCUMENTS if blocks(d, "python")}
    assert pages <= {*RUN, *elsewhere}


@pytest.mark.usefixtures("quick")
def test_the_readmes_commands_follow_one_from_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever brings a gallery and pairs gets from the first command to the last."""
    (block,) = (b for b in blocks(ROOT / "README.md", "bash") if "fct backfill" in b)
    rng = np.random.default_rng(0)
    old, side = rng.standard_normal((2, 400, 8), dtype=np.float32)
    new = np.tanh(old @ rng.standard_normal((8, 6), dtype=np.float32) + side[:, :1])
    columns = {"id": np.arange(400), "old": list(old), "side": list(side)}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gallery").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "gallery/part-0.parquet")
    pq.write_table(pa.table({**columns, "new": list(new)}), tmp_path / "pairs.parquet")
    lines = [line.partition("  #")[0] for line in block.splitlines() if line.startswith("fct ")]
    assert [line.split()[1] for line in lines] == ["fit", "plan", "backfill", "verify"]
    for line in lines:
        code, out, err = run_here(*shlex.split(line)[1:])
        assert code == 0, f"{line}: {out[-2000:]}{err[-2000:]}"
    assert out.rstrip().endswith("ok"), out


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


def test_examples_in_docstrings_are_shown_as_code() -> None:
    """A section named "Example" is a quotation on the site, its lines run together; "Examples" is code."""
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert [p.name for p in files if re.search(r"^\s+Example:\s*$", p.read_text(), re.MULTILINE)] == []


def test_the_reference_has_every_public_name() -> None:
    pages = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("reference", "reference-gallery"))
    shown = set(re.findall(r"^::: fct\.(\w+)$", pages, re.MULTILINE))
    assert set(fct.__all__) - set(errors.__all__) - shown == set(), "the others are on the page of exceptions"


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs" / "images" / "quickstart.png").stat().st_size < 400_000


def test_the_two_commands_are_as_promised() -> None:
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("pip install -c ")]
    assert lines == [
        "pip install -c constraints.txt '.[train]' && fct quickstart",
        "pip install -c constraints.txt '.[test]' && pytest",
    ]
