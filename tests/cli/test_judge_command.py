"""``fct judge``: a verdict from galleries as they lie, joined by id."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fct.cli import main
from fct.gallery import vector_array

N, Q = 300, 60


@pytest.fixture
def case(tmp_path: Path, rng: np.random.Generator) -> list[str]:
    """A new model that finds each query's item, an old one that hardly does; the new gallery in another order."""
    truth = rng.standard_normal((N, 8)).astype(np.float32)
    ids = [f"item {i}" for i in range(N)]
    asked = rng.permutation(N)[:Q]
    new = truth[asked] + 0.05 * rng.standard_normal((Q, 8)).astype(np.float32)
    old = rng.standard_normal((Q, 5)).astype(np.float32)
    order = rng.permutation(N)[: N - 3]  # three rows were never mapped
    write = {
        "old": {"id": ids, "embedding": vector_array(rng.standard_normal((N, 5)).astype(np.float32))},
        "mapped": {"id": [ids[i] for i in order], "vector": vector_array(truth[order])},
        "q": {
            "query": [f"q{i}" for i in range(Q)], "old": vector_array(old), "new": vector_array(new),
            "lang": ["de" if i % 2 else "en" for i in range(Q)],
        },
        "qrels": {
            "query": [*(f"q{i}" for i in range(Q)), "q0", "stranger"],
            "item": [*(ids[i] for i in asked), "gone", ids[0]],
            "grade": [1] * (Q + 2),
        },
    }  # fmt: skip
    for name, columns in write.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    q = tmp_path / "q.parquet"
    return [
        "judge", str(tmp_path / "qrels.parquet"), "--queries-old", f"{q}:old", "--queries-new", f"{q}:new",
        "--query-ids", f"{q}:query", "--old", str(tmp_path / "old.parquet"),
        "--mapped", str(tmp_path / "mapped.parquet"),
        "--query-slices", f"lang={q}:lang",
    ]  # fmt: skip


def run(args: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(args)
    out, err = capfd.readouterr()
    return int(left.value.code or 0), out, err


def test_go(case: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(case, capfd)
    assert (code, err) == (0, "")
    assert out.startswith("**go**: ")
    assert "3 rows of the old gallery are not in the new one" in out
    assert "1 judged queries not given (stranger)" in out
    assert "relevant items not given (" in out
    assert "gone" in out
    assert "lang=de: +" in out
    code, out, _ = run([*case, "--json"], capfd)
    found = json.loads(out)
    assert (code, found["word"], found["rows_not_mapped"]) == (0, "go", 3)
    assert {s["name"] for s in found["systems"]} >= {"old/old", "mapped", "fused"}


def test_no_go(case: list[str], tmp_path: Path, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]) -> None:
    """What the old model finds, a map that knows nothing loses."""
    table = pq.read_table(tmp_path / "mapped.parquet")
    lost = vector_array(rng.standard_normal((len(table), 8)).astype(np.float32))
    asked, items = (
        pq.read_table(tmp_path / "qrels.parquet")["item"].to_pylist()[:Q],
        pq.read_table(tmp_path / "old.parquet"),
    )
    pq.write_table(table.set_column(1, "vector", lost), tmp_path / "mapped.parquet")
    old = np.stack(items["embedding"].to_numpy())
    q = pq.read_table(tmp_path / "q.parquet")
    near = old[[int(one.split()[1]) for one in asked]]
    pq.write_table(q.set_column(1, "old", vector_array(near)), tmp_path / "q.parquet")
    code, out, _ = run(case, capfd)
    assert code == 3
    assert out.startswith("**no-go**: ")


def test_inconclusive_with_few_queries(case: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pq.read_table(tmp_path / "qrels.parquet").slice(0, 5), tmp_path / "qrels.parquet")
    code, out, _ = run(case, capfd)
    assert code == 5
    assert out.startswith("**inconclusive**: ")


def test_two_galleries_of_other_items(case: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table = pq.read_table(tmp_path / "mapped.parquet")
    pq.write_table(
        table.set_column(0, "id", pa.array([f"x{i}" for i in range(len(table))])), tmp_path / "mapped.parquet"
    )
    code, _, err = run(case, capfd)
    assert code == 1
    assert "--mapped: expected rows of the old gallery, 297 of 297 ids are not in" in err


def test_messages_name_the_option(case: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = [word.replace("lang=", "lang") for word in case]
    assert "--query-slices: expected NAME=FILE:COLUMN" in run(wrong, capfd)[2]
    wrong = [word.replace("q.parquet:new", "q.parquet:nope") for word in case]
    assert "--queries-new" in run(wrong, capfd)[2]
    (tmp_path / "qrels.parquet").unlink()
    assert "qrels" in run(case, capfd)[2]
