"""``fct evaluate`` by judgements: one system, an upgrade's verdict, limits as exit codes; and the rerank curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.cli import main
from fct.gallery import vector_array

N, Q, D = 120, 40, 8


@pytest.fixture
def files(tmp_path: Path, rng: np.random.Generator) -> dict[str, str]:
    """Old vectors that say nothing of what h makes of them; queries that ask for one item each."""
    h = fct.Transformation.random(D, D, D, inner=16, side_info=False)
    h.save(tmp_path / "h.safetensors")
    old = rng.standard_normal((N, D), dtype=np.float32)
    mapped = fct.transform_batch(old, None, h, precision="fp32", progress=False)
    ids = [f"d{i}" for i in range(N)]
    pq.write_table(pa.table({"id": ids, "embedding": vector_array(old)}), tmp_path / "old.parquet")
    back = np.arange(N)[::-1]  # the new gallery in another order: rows go by their ids
    table = {"id": [ids[i] for i in back], "embedding": vector_array(np.ascontiguousarray(mapped[back]))}
    pq.write_table(pa.table(table), tmp_path / "new.parquet")
    queries = {
        "id": [f"q{i}" for i in range(Q)],
        "old": vector_array(rng.standard_normal((Q, D), dtype=np.float32)),
        "new": vector_array(mapped[:Q]),
    }
    pq.write_table(pa.table(queries), tmp_path / "q.parquet")
    (tmp_path / "qrels.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(Q)) + "q0\tgone\t1\n")
    np.savez(tmp_path / "pairs.npz", old=old, new=mapped + 0.3 * rng.standard_normal((N, D)).astype(np.float32))
    names = ("old.parquet", "new.parquet", "q.parquet", "qrels.tsv", "h.safetensors", "pairs.npz", "out.json")
    return {name.partition(".")[0]: str(tmp_path / name) for name in names}


def run(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main(["evaluate", *words])
    return int(left.value.code or 0), " ".join("".join(capfd.readouterr()).split())


def asked(files: dict[str, str]) -> list[str]:
    return ["--qrels", files["qrels"], "--queries", f"{files['q']}:new", "--query-ids", f"{files['q']}:id"]


def before(files: dict[str, str]) -> list[str]:
    return ["--before-queries", f"{files['q']}:old", "--before-gallery", files["old"]]


def test_one_system_by_judgements(files: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    words = [*asked(files), "--gallery", files["new"], "--out", files["out"]]
    code, said = run(capfd, *words)
    assert code == 0
    assert "recall@10 98.75 %" in said, "one of two relevant items of q0 is not in the gallery"
    assert (
        "40 queries; 0 more have no relevant item or were not judged; 1 relevant items are not in the gallery" in said
    )
    figures = json.loads(Path(files["out"]).read_text())
    assert figures["MRR@10"] == 1.0
    assert figures["recall@10"] == pytest.approx(0.9875)
    code, said = run(capfd, *words, "--overwrite", "--min-recall", "0.99")
    assert code == 3
    assert "refused: recall@10 is 0.988, below 0.99" in said


def test_an_upgrade_s_verdict_of_galleries_and_of_h(files: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    found: list[dict[str, Any]] = []
    ways = (["--gallery", files["new"]], ["-t", files["h"], "--precision", "fp32"])
    for how in ways:
        code, said = run(capfd, *asked(files), *before(files), *how, "--out", files["out"], "--overwrite")
        assert code == 0, said
        assert "**go**: nDCG@10 of mapped against old/old" in said
        found.append(json.loads(Path(files["out"]).read_text()))
    assert found[0]["systems"] == found[1]["systems"]
    words = [*asked(files), *before(files), *ways[0]]
    assert run(capfd, *words, "--min-ndcg", "0.999")[0] == 3
    few = pq.read_table(files["q"]).slice(0, 20)
    pq.write_table(few, files["q"])
    assert run(capfd, *words)[0] == 5
    assert run(capfd, *words, "--allow-inconclusive")[0] == 0


def test_the_mapped_rows_are_of_the_dtype_that_is_asked_for(
    files: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Lengths that float16 cannot hold are no gallery."""
    table = pq.read_table(files["old"])
    rows = np.stack([np.asarray(v, np.float32) for v in table["embedding"].to_pylist()]) * np.float32(1e7)
    pq.write_table(pa.table({"id": table["id"], "embedding": vector_array(rows)}), files["old"])
    words = [*asked(files), *before(files), "-t", files["h"], "--precision", "fp32"]
    assert run(capfd, *words)[0] in (0, 3, 5)
    code, said = run(capfd, *words, "--dtype", "float16")
    assert code == 1
    assert "finite" in said


def test_the_rerank_curve(files: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    code, said = run(capfd, "--pairs", files["pairs"], "-t", files["h"], "--depth", "30", "--out", files["out"])
    assert code == 0
    with np.load(files["pairs"]) as pairs:
        h = fct.Transformation.load(files["h"])
        want = fct.rerank_curve(pairs["old"], None, pairs["new"], h, depths=(30,), progress=False).recalls
    assert json.loads(Path(files["out"]).read_text()) == {"rerank": {str(depth): r for depth, r in want.items()}}
    assert f"{100 * want[30]:.1f}" in said
    assert "10 (mapped rows alone)" in said
    assert want[30] > want[10]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--queries: expected it (or --qrels and --query-ids; or --pairs and -t), got none"),
        (["--pairs", "{pairs}"], "--pairs: expected -t beside it"),
        (["--depth", "5"], "--depth: expected --pairs beside it"),
        (["--min-ndcg", "0.5"], "--qrels: expected judgements beside"),
        (["--qrels", "{qrels}", "--queries", "{q}:new"], "--query-ids: expected it"),
        (["--qrels", "{qrels}", "--query-labels", "{q}:id"], "--qrels: expected it or --query-labels, got both"),
        (["--qrels", "{qrels}", "--queries", "{q}:new", "--query-ids", "{q}:id"], "--gallery: expected it"),
    ],
)
def test_what_does_not_fit(
    files: dict[str, str], words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = run(capfd, *(word.format(**files) for word in words))
    assert code == 1 or code == 2
    assert message in said


def test_ids_that_are_not_the_gallery_s(files: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    Path(files["qrels"]).write_text("nobody\td1\t1\n")
    code, said = run(capfd, *asked(files), "--gallery", files["new"])
    assert code == 1
    assert "--qrels: expected a relevant item for one of 40 queries at least" in said
