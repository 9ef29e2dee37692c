"""The gate on queries of one's own: judged rows of the gallery, old and as the job will store them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.backfilling import judged_gate
from fct.cli import main
from fct.gallery import vector_array
from tests.backfilling.conftest import QUICK

N = 300


def table_of(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(f) for f in sorted(folder.glob("*.parquet"))])


def vectors(table: pa.Table, name: str) -> Any:
    return np.stack([np.asarray(row, np.float32) for row in table[name].to_pylist()])


@pytest.fixture
def asked(
    gallery: Callable[..., Path], h: fct.Transformation, rng: np.random.Generator
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """(an old gallery, queries whose new embedding is what h makes of one item, and which item that is).

    The old embeddings are noise, so that the old gallery answers nothing.
    """
    folder = gallery(N)
    table = table_of(folder)
    mapped = fct.transform_batch(vectors(table, "old"), vectors(table, "side"), h, precision="fp32", progress=False)
    rows = rng.permutation(N)[:40]
    ids = [f"q{i}" for i in range(40)]
    queries = {"id": ids, "old": rng.standard_normal((40, h.d_old), dtype=np.float32), "new": mapped[rows]}
    items = table["id"].to_pylist()
    return folder, queries, {"query": ids, "item": [items[row] for row in rows], "grade": [1] * 40}


def turned_round(h: fct.Transformation, asked: tuple[Path, Any, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Queries that the old gallery answers, and the mapped one does not."""
    folder, queries, qrels = asked
    table = table_of(folder)
    places = {one: row for row, one in enumerate(table["id"].to_pylist())}
    old = vectors(table, "old")[[places[one] for one in qrels["item"]]]
    return queries | {"old": old, "new": rng.standard_normal((40, h.d_new), dtype=np.float32)}


def test_go_passes_and_no_go_is_refused_before_anything_is_written(
    asked: tuple[Path, Any, Any], h: fct.Transformation, tmp_path: Path, rng: np.random.Generator
) -> None:
    old, queries, qrels = asked
    report = fct.backfill(
        old, tmp_path / "new", h, queries=queries, qrels=qrels, min_ndcg=0.99, precision="fp32", **QUICK
    )
    assert report.judged is not None
    assert (report.judged.verdict.word, report.judged.rows, report.judged.of) == ("go", N, N)
    assert report.judged.verdict.result("mapped").measures.mean("ndcg") == 1.0
    worse = turned_round(h, asked, rng)
    with pytest.raises(fct.QualityGateError, match=r"quality gate: no-go: nDCG@10 of mapped against old/old: -\d"):
        fct.backfill(old, tmp_path / "other", h, queries=worse, qrels=qrels, **QUICK)
    assert not (tmp_path / "other").exists()
    # A loss that is accepted is no reason; a limit of its own still is.
    fine = fct.plan_backfill(
        old, tmp_path / "other", h, queries=worse, qrels=qrels, ndcg_margin=1.0, allow_inconclusive=True,
        measure_seconds=0.001,
    )  # fmt: skip
    assert fine.gate_refusals == ()
    limits: dict[str, Any] = {
        "ndcg_margin": 1.0,
        "allow_inconclusive": True,
        "min_ndcg": 0.5,
        "min_query_recall": 0.9,
        "measure_seconds": 0.001,
    }
    plan = fct.plan_backfill(old, tmp_path / "other", h, queries=worse, qrels=qrels, **limits)
    assert [why.split(" is ")[0] for why in plan.gate_refusals] == [
        "quality gate: nDCG@10 of the mapped rows",
        "quality gate: recall@10 of the mapped rows",
    ]


@pytest.mark.filterwarnings("ignore:reembed. mapped rows stand among true ones uncorrected")  # h is untrained
def test_rows_that_will_be_re_embedded_are_judged_as_true_ones(
    asked: tuple[Path, Any, Any], h: fct.Transformation, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Queries that no mapped row answers, and true vectors of the judged rows that do, in whole or in part."""
    old, _, qrels = asked
    new = rng.standard_normal((40, h.d_new), dtype=np.float32)
    if h.new_space.normalised:
        new /= np.linalg.norm(new, axis=1, keepdims=True)
    queries = {"id": qrels["query"], "old": rng.standard_normal((40, h.d_old), dtype=np.float32), "new": new}
    how: dict[str, Any] = {"queries": queries, "qrels": qrels, "allow_inconclusive": True, "ndcg_margin": 1.0}
    pairs = {"id": qrels["item"], "new": new}

    def plan(**more: Any) -> fct.BackfillPlan:
        return fct.plan_backfill(old, tmp_path / "new", h, measure_seconds=0.001, **how, **more)

    def recall(judged: Any) -> float:
        return float(judged.verdict.result("mapped").measures.mean("recall"))

    plain, whole, part = (
        plan(**more).judged for more in ({}, {"reembed": pairs}, {"reembed": pairs, "budget": 20 / N})
    )
    assert plain is not None
    assert whole is not None
    assert part is not None
    assert (plain.reembedded, whole.reembedded, part.reembedded) == (0, 40, 20)
    assert recall(plain) < 0.2
    assert recall(whole) == 1.0
    assert recall(part) == pytest.approx(0.5, abs=0.1)
    report = fct.backfill(old, tmp_path / "new", h, reembed=pairs, budget=20 / N, **how, **QUICK)
    assert report.judged is not None
    assert (report.judged.reembedded, report.reembedded) == (20, 20)


def test_few_queries_decide_nothing_and_that_is_refused_unless_it_is_allowed(
    asked: tuple[Path, Any, Any], h: fct.Transformation, tmp_path: Path
) -> None:
    old, queries, qrels = asked
    few = {name: values[:20] for name, values in queries.items()}
    with pytest.raises(fct.QualityGateError, match=r"quality gate: inconclusive \(allow_inconclusive, .*fewer than 30"):
        fct.backfill(old, tmp_path / "new", h, queries=few, qrels=qrels, **QUICK)
    report = fct.backfill(old, tmp_path / "new", h, queries=few, qrels=qrels, allow_inconclusive=True, **QUICK)
    assert report.judged is not None
    assert report.judged.verdict.word == "inconclusive"
    assert len(report.judged.verdict.unknown_queries) == 20


def test_rows_are_mapped_as_the_job_will_store_them(
    gallery: Callable[..., Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    """Rows that bf16 cannot tell apart, and values that float16 cannot hold."""
    h = fct.Transformation.random(16, 16, 12, inner=32, side_info=False)
    near = rng.standard_normal(16).astype(np.float32) + 1e-3 * rng.standard_normal((N, 16)).astype(np.float32)
    pq.write_table(pa.table({"id": np.arange(N), "old": vector_array(near)}), tmp_path / "old.parquet")
    new = fct.transform_batch(near, None, h, precision="fp32", progress=False)
    queries = {"id": np.arange(N), "old": near, "new": new}
    qrels = {"query": np.arange(N), "item": np.arange(N), "grade": np.ones(N, int)}
    options: dict[str, Any] = {"queries": queries, "qrels": qrels, "old_model": "random-old", "measure_seconds": 0.001}
    found = {
        precision: fct.plan_backfill(tmp_path / "old.parquet", tmp_path / "new", h, precision=precision, **options)
        for precision in ("fp32", "bf16")
    }
    ndcg = {p: plan.judged.verdict.result("mapped").measures.mean("ndcg") for p, plan in found.items() if plan.judged}
    assert ndcg["fp32"] == 1.0
    assert ndcg["bf16"] < 0.9
    pq.write_table(pa.table({"id": np.arange(N), "old": vector_array(near * 1e6)}), tmp_path / "large.parquet")
    plan = fct.plan_backfill(
        tmp_path / "large.parquet", tmp_path / "new", h, dtype="float16", precision="fp32", **options
    )
    assert any("h's output is not finite in float16" in why or "none of" in why for why in plan.refusals)


def test_judgements_in_every_form_say_the_same(
    asked: tuple[Path, Any, Any], h: fct.Transformation, tmp_path: Path
) -> None:
    old, queries, qrels = asked
    rows = list(zip(*qrels.values(), strict=True))
    (tmp_path / "trec.txt").write_text("".join(f"{q} 0 {i} {g}\n" for q, i, g in rows))
    beir = "query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{i}\t{g}\n" for q, i, g in rows)
    (tmp_path / "beir.tsv").write_text(beir)
    pq.write_table(pa.table(qrels), tmp_path / "qrels.parquet")
    pq.write_table(
        pa.table({k: v if k == "id" else vector_array(v) for k, v in queries.items()}), tmp_path / "q.parquet"
    )
    np.savez(tmp_path / "q.npz", **queries)
    own = fct.UpgradeQueries(queries["id"], queries["old"], queries["new"])
    forms: list[tuple[Any, Any]] = [
        (queries, qrels), (tmp_path / "q.parquet", tmp_path / "trec.txt"), (tmp_path / "q.npz", tmp_path / "beir.tsv"),
        (own, tmp_path / "qrels.parquet"), (str(tmp_path / "q.parquet"), fct.Judgements.of(*qrels.values())),
    ]  # fmt: skip
    found = [
        fct.plan_backfill(old, tmp_path / "new", h, queries=q, qrels=r, measure_seconds=0.001).judged for q, r in forms
    ]
    assert len({str(one and one.verdict.to_dict()) for one in found}) == 1


def test_of_a_large_gallery_every_judged_row_is_searched_and_others_by_lot(
    asked: tuple[Path, Any, Any], h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, queries, qrels = asked
    monkeypatch.setattr(judged_gate, "_MOST_ROWS", 100)
    qrels = {name: [*values, more] for (name, values), more in zip(qrels.items(), ("q0", "nowhere", 1), strict=True)}
    plan = fct.plan_backfill(old, tmp_path / "new", h, queries=queries, qrels=qrels, measure_seconds=0.001)
    assert plan.judged is not None
    assert 100 < plan.judged.rows <= 140
    assert plan.judged.verdict.unknown_items == ("nowhere",)
    assert plan.judged.verdict.result("mapped").measures.mean("recall") == pytest.approx((39 + 0.5) / 40)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_ndcg": 0.5}, "queries: expected queries and qrels to check min_ndcg on, got None"),
        ({"min_query_recall": 0.5}, "queries: expected queries and qrels to check min_query_recall on"),
        ({"allow_inconclusive": True}, "allow_inconclusive: expected queries and qrels beside it, got none"),
        ({"qrels": {"query": [], "item": [], "grade": []}}, "queries: expected them beside qrels, got None"),
        ({"queries": {"id": ["a"]}, "qrels": {"query": ["a"], "item": ["b"], "grade": [1]}}, "id, old and new, got id"),
        ({"queries": 3, "qrels": "x"}, "queries: expected a mapping of id, old and new, or the path of a table, got 3"),
        ({"ndcg_margin": 2}, "ndcg_margin: expected a share"),
    ],
)
def test_what_does_not_fit_is_refused(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path, options: Any, words: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        fct.backfill(gallery(50), tmp_path / "new", h, **options, **QUICK)
    assert not (tmp_path / "new").exists()


def test_ids_that_are_not_the_gallery_s_are_named(
    asked: tuple[Path, Any, Any], h: fct.Transformation, tmp_path: Path
) -> None:
    old, queries, qrels = asked
    strange = qrels | {"item": [f"doc-{i}" for i in range(40)]}
    with pytest.raises(ValueError, match=r"qrels: .*\(the column 'id'\), none of 40 judged items is in .*'doc-0'"):
        fct.backfill(old, tmp_path / "new", h, queries=queries, qrels=strange, **QUICK)
    nothing = qrels | {"grade": [0] * 40}
    plan = fct.plan_backfill(old, tmp_path / "new", h, queries=queries, qrels=nothing, measure_seconds=0.001)
    assert any("expected a relevant item for at least one of 40 queries" in why for why in plan.refusals)
    with pytest.raises(
        ValueError, match=r"queries: old: expected \(n, 16\) to match the transformation, got \(40, 5\)"
    ):
        fct.backfill(
            old, tmp_path / "new", h, queries=queries | {"old": np.ones((40, 5), np.float32)}, qrels=qrels, **QUICK
        )


def test_from_the_command_line(
    asked: tuple[Path, Any, Any], h: fct.Transformation, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    rng: np.random.Generator,
) -> None:  # fmt: skip
    old, queries, qrels = asked
    h.save(tmp_path / "h.safetensors")
    pq.write_table(pa.table(qrels), tmp_path / "qrels.parquet")
    worse = turned_round(h, asked, rng)
    for name, values in (("good", queries), ("bad", worse)):
        np.savez(tmp_path / f"{name}.npz", **values)

    def run(command: str, name: str, *more: str) -> tuple[int, str]:
        gate = ["--queries", str(tmp_path / f"{name}.npz"), "--qrels", str(tmp_path / "qrels.parquet"), *more]
        with pytest.raises(SystemExit) as left:
            main([command, str(old), str(tmp_path / "new"), "-t", str(tmp_path / "h.safetensors"), *gate])
        return int(left.value.code or 0), " ".join("".join(capfd.readouterr()).split())

    code, said = run("plan", "bad", "--measure-seconds", "0.001")
    assert code == 3
    assert "refused: quality gate: no-go" in said
    assert run("backfill", "bad", "--no-progress")[0] == 3
    assert not (tmp_path / "new").exists()
    code, said = run("backfill", "good", "--no-progress", "--min-ndcg", "0.9")
    assert code == 0
    assert "**go**: nDCG@10 of mapped against old/old" in said
    assert f"searched: {N} of {N} rows" in said
