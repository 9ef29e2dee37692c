"""A worker's whole life, command by command: ``python worker.py FCT FOLDER``, in an environment of the base alone.

FCT: the command, or "blocked" for this interpreter with the packages of the extras hidden.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import fct

EXTRAS = ("torch", "torchvision", "matplotlib", "yaml", "pytorch_metric_learning", "triton", "ray", "faiss", "onnx",
          "lance", "psycopg", "qdrant_client", "pymilvus", "chromadb")  # fmt: skip
BLOCKED = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
from fct.cli import main
main(sys.argv[1:])
"""
D_OLD, D_NEW, ROWS = 16, 24, 500


def call(command: str, *words: str | Path, code: int = 0) -> str:
    start = [sys.executable, "-c", BLOCKED] if command == "blocked" else [command]
    done = subprocess.run(
        [*start, *map(str, words)], capture_output=True, text=True, env={**os.environ, "COLUMNS": "400"}
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, f"fct {' '.join(map(str, words))}: exit code {done.returncode}:\n{said}"
    return " ".join(said.split())


def live(command: str, folder: Path) -> None:
    """plan, backfill, verify, search, export, info and doctor; then one line each from what needs an extra."""
    (folder / "old").mkdir(parents=True)
    rng = np.random.default_rng(0)
    old = rng.standard_normal((ROWS, D_OLD), dtype=np.float32)
    np.save(folder / "old" / "part-0.npy", old)
    fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=32, side_info=False).save(folder / "h.safetensors")
    job = (folder / "old", folder / "new", "-t", folder / "h.safetensors", "--old-model", "random-old")

    assert f"{ROWS} rows" in call(command, "plan", *job)
    assert f"{ROWS} out" in call(command, "backfill", *job, "--no-progress")
    call(command, "verify", folder / "new")
    from fct.cli.app import app

    if any((c.name or c.callback.__name__) == "search" for c in app.registered_commands if c.callback):
        np.save(folder / "queries.npy", rng.standard_normal((3, D_NEW), dtype=np.float32))
        call(command, "search", "--queries", folder / "queries.npy", "--gallery", folder / "new", "-k", "5")
    call(command, "export", folder / "new", folder / "out", "--to", "pgvector")
    assert "needs torch, which is not installed: pip install 'fct-embeddings[train]'" in call(command, "info")
    assert "wrong" not in call(command, "doctor").split()

    for words in (["quickstart"], ["train-side-info", folder, "--out", folder / "s"], ["reproduce", "any"],
                  ["fit", "--old", "a", "--new", "b", "--out", folder / "c"]):  # fmt: skip
        said = call(command, *words, code=1)
        want = f"error: fct {words[0]}: needs torch, which is not installed: pip install 'fct-embeddings[train]'"
        assert said == want, said
    said = call(command, "backfill", *job[:1], folder / "ray", *job[2:], "--ray", "local", "--no-progress", code=1)
    assert said == "error: ray: needs ray, which is not installed: pip install 'fct-embeddings[ray]'", said
    said = call(command, "backfill", folder / "old", folder / "new.lance", *job[2:], "--no-progress", code=1)
    assert said == "error: lance: needs pylance, which is not installed: pip install 'fct-embeddings[lance]'", said


if __name__ == "__main__":
    from fct.cli import commands

    assert commands
    live(sys.argv[1], Path(sys.argv[2]))
    print("ok: a worker's commands run on the base install")
