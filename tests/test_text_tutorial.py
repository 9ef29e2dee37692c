"""The commands of docs/text-embeddings.md run in their order on the example's files; the two models are stand-ins."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import fct
from fct.cli import main

ROOT = Path(__file__).parents[1]
WORDS = [f"word{i}" for i in range(300)]


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("text_embeddings", ROOT / "examples" / "text_embeddings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_in(d: int, seed: int) -> Any:
    """A model of d dimensions: the mean of its words' vectors."""
    vectors = dict(zip(WORDS, np.random.default_rng(seed).standard_normal((len(WORDS), d)), strict=True))

    def embed(texts: list[str], folder: Path | None = None) -> Any:
        rows = np.stack([np.mean([vectors[word] for word in text.split()], axis=0) for text in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    return embed


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/text-embeddings.md").read_text(), re.M | re.S)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines() if line.startswith("fct ")]


@pytest.mark.slow
def test_the_tutorial_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 6)) for _ in range(2300)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    module = example()
    monkeypatch.setattr(module, "glove", stand_in(12, 1))
    monkeypatch.setattr(module, "minilm", stand_in(24, 2))
    monkeypatch.setattr(sys, "argv", ["x", "--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "upgrade"),
                                      "--pairs", "800", "--queries", "100"])  # fmt: skip
    module.main()
    monkeypatch.chdir(tmp_path / "upgrade")
    asked = commands()
    assert [words[0] for words in asked] == ["inspect", "fit", "plan", "backfill", "verify", "search"]
    for words in asked:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0, words
    nearest, queries = pq.read_table("nearest.parquet"), fct.gallery.load_vectors("queries.parquet:embedding")
    assert nearest.num_rows in (len(queries), 10 * len(queries))
    mapped = fct.gallery.load_vectors("new:embedding")
    want = fct.topk(queries, np.load("truth.npy"), 10, metric="cosine").indices
    found = fct.topk(queries, mapped, 10, metric="cosine").indices
    kept = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, want, strict=True)])
    assert kept > 5 * 10 / len(mapped)
