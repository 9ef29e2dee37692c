"""nDCG, MRR and recall are trec_eval's own; three words are said when they are true; what is left out is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fct.errors import FctError
from fct.judging import Judgements, UpgradeQueries, judge_upgrade, measure_rankings, paired_interval, read_qrels
from fct.judging.upgrade_verdict import UpgradeVerdict


def drawn(rng: np.random.Generator, n: int = 40, items: int = 60) -> tuple[list[list[str]], list[dict[str, int]]]:
    names = [f"d{i}" for i in range(items)]
    rankings = [list(rng.permutation(names)[: int(rng.integers(1, 30))]) for _ in range(n)]
    relevant = [
        {
            str(d): int(g)
            for d, g in zip(rng.permutation([*names, "gone"])[:size], rng.integers(1, 4, size), strict=True)
        }
        for size in rng.integers(1, 15, n)
    ]
    return rankings, relevant


@pytest.mark.parametrize("k", [1, 5, 10, 20])
def test_measures_are_trec_evals(rng: np.random.Generator, k: int) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rankings, relevant = drawn(rng)
    mine = measure_rankings(rankings, relevant, k=k)
    run = {str(i): {d: float(-rank) for rank, d in enumerate(r)} for i, r in enumerate(rankings)}
    # trec_eval's reciprocal rank looks at the whole ranking, so it is given the k first
    cut = {q: dict(list(found.items())[:k]) for q, found in run.items()}
    qrels = {str(i): r for i, r in enumerate(relevant)}
    asked = pytrec_eval.RelevanceEvaluator(qrels, {f"ndcg_cut.{k}", f"recall.{k}"}).evaluate(run)
    ranks = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(cut)
    for name, key, found in (
        ("ndcg", f"ndcg_cut_{k}", asked),
        ("recall", f"recall_{k}", asked),
        ("mrr", "recip_rank", ranks),
    ):
        theirs = [found[str(i)][key] for i in range(len(rankings))]
        np.testing.assert_allclose(getattr(mine, name), theirs, atol=1e-12, err_msg=name)


def test_the_measures_by_hand() -> None:
    found = measure_rankings([["x", "a", "b"], ["x"]], [{"a": 3, "b": 1, "c": 2}, {"y": 1}], k=3)
    ideal = 3 / np.log2(2) + 2 / np.log2(3) + 1 / np.log2(4)
    np.testing.assert_allclose(found.ndcg, [(3 / np.log2(3) + 1 / np.log2(4)) / ideal, 0])
    np.testing.assert_allclose(found.mrr, [1 / 2, 0])
    np.testing.assert_allclose(found.recall, [2 / 3, 0])


def test_wrong_rankings_are_refused() -> None:
    with pytest.raises(ValueError, match="expected each item once, query 0 has some twice"):
        measure_rankings([["a", "a"]], [{"a": 1}])
    with pytest.raises(ValueError, match="expected items with grades above 0 for query 0"):
        measure_rankings([["a"]], [{}])
    with pytest.raises(ValueError, match="expected one entry for each of 1 rankings, got 2"):
        measure_rankings([["a"]], [{"a": 1}, {"a": 1}])


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for trial in range(200):
        low, high = paired_interval(rng.normal(0.1, 1, 80), np.zeros(80), resamples=400, seed=trial)
        inside += low <= 0.1 <= high
    assert 0.88 <= inside / 200 <= 0.99


@pytest.mark.parametrize(
    "text",
    [
        "q1 0 d1 2\nq1 0 d2 0\nq2 0 d3 1\n",
        "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td3\t1\n",
        "q1\td1\t2\nq1\td2\t0\n\nq2\td3\t1",
        "\ufeffq1 Q0 d1 2\r\nq1 Q0 d2 0\r\nq2 Q0 d3 1\r\n",
    ],
)
def test_qrels_of_every_kind(tmp_path: Path, text: str) -> None:
    (tmp_path / "qrels").write_bytes(text.encode())
    found = read_qrels(tmp_path / "qrels")
    assert found.grades == {"q1": {"d1": 2, "d2": 0}, "q2": {"d3": 1}}
    assert found.relevant("q1") == {"d1": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q1 d1\n", "expected 'query 0 item grade' .* line 1"),
        ("q1 0 d1 2\nq1 0 d2 high\n", "expected a whole number as grade, got 'high', line 2"),
        ("query-id\tcorpus-id\tscore\n", "expected at least one judgement"),
        ("", "expected at least one judgement"),
    ],
)
def test_broken_qrels_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "qrels").write_text(text)
    with pytest.raises(FctError, match=message):
        read_qrels(tmp_path / "qrels")


def test_ids_of_bytes_are_those_of_text() -> None:
    assert (
        Judgements.of(np.array([b"q", b"7"]), ["d", "e"], [1, 1]).grades
        == Judgements.of(["q", 7], ["d", "e"], [1, 1]).grades
    )


def test_two_grades_for_one_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one grade for query 'q' and item 'd', got 1 and 2"):
        Judgements.of(["q", "q"], ["d", "d"], [1, 2])
    assert Judgements.of(["q", "q"], ["d", "d"], [1, 1]).relevant("q") == {"d": 1}
    with pytest.raises(ValueError, match="queries, items and grades of one length"):
        Judgements.of(["q"], ["d", "e"], [1, 1])
    with pytest.raises(ValueError, match="expected a query id, got none in judgement 0"):
        Judgements.of([None], ["d"], [1])


# ---- the upgrade ----
class World:
    """A gallery whose new vectors are what is relevant; old ones are noisy, mapped ones in between."""

    def __init__(self, old_noise: float, mapped_noise: float, n: int = 120, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)

        def off(x: np.ndarray, noise: float) -> np.ndarray:
            return (x + noise * rng.standard_normal(x.shape)).astype(np.float32)

        self.true = rng.standard_normal((n, 16)).astype(np.float32)
        self.ids = list(range(n))
        self.old, self.mapped = off(self.true, old_noise), off(self.true, mapped_noise)
        asked = off(self.true, 0.3)
        languages = ["de" if i % 2 else "en" for i in range(n)]
        self.queries = UpgradeQueries(
            [f"q{i}" for i in range(n)], off(asked, old_noise), asked, {"language": languages}
        )
        self.judgements = Judgements.of([f"q{i}" for i in range(n)], self.ids, [1] * n)

    def judge(self, **options: Any) -> UpgradeVerdict:
        return judge_upgrade(self.queries, self.judgements, self.ids, self.old, self.mapped, **options)


def test_go_where_mapped_is_better() -> None:
    world = World(1.5, 0.3)
    verdict = world.judge(true_vectors=world.true)
    assert verdict.word == "go", verdict.reason
    gain = verdict.result("mapped").gain
    assert gain is not None
    assert gain.low > 0
    assert verdict.result("mapped + rerank").measures.mean() >= verdict.result("mapped").measures.mean()
    assert verdict.result("new/new").measures.mean() >= verdict.result("mapped + rerank").measures.mean()
    assert set(verdict.result("mapped").slices) == {"language=de", "language=en"}
    assert "re-embedding everything" in verdict.reason


def test_no_go_where_mapped_is_worse() -> None:
    assert World(0.3, 3.0).judge().word == "no-go"


def test_inconclusive_where_nobody_can_tell() -> None:
    world = World(0.6, 0.6)
    world.mapped, world.queries = world.old, UpgradeQueries(world.queries.ids, world.queries.old, world.queries.old)
    verdict = world.judge()
    assert verdict.word == "inconclusive"
    assert "holds both a gain and a loss" in verdict.reason


def test_few_queries_decide_nothing() -> None:
    verdict = World(1.5, 0.3, n=20).judge(k=1)
    assert verdict.word == "inconclusive"
    assert "fewer than 30 judged queries (20)" in verdict.reason


def test_a_margin_accepts_a_loss() -> None:
    world = World(0.6, 1.2)
    assert world.judge().word != "go"
    assert world.judge(margin=0.9).word == "go"


def test_a_slice_that_loses_is_named() -> None:
    world = World(1.5, 0.3)
    world.mapped[1::2] = np.random.default_rng(5).standard_normal((60, 16))  # the German half is mapped at random
    verdict = world.judge(margin=0.0)
    assert "language=de" in verdict.result("mapped").slices
    assert verdict.result("mapped").slices["language=de"].high < 0
    if verdict.word == "go":
        assert "worse for language=de" in verdict.reason


def test_fused_search_is_the_weighted_sum_of_both_scores(rng: np.random.Generator) -> None:
    from fct.judging.upgrade_systems import _Fused

    old, new = rng.standard_normal((50, 6)).astype(np.float32), rng.standard_normal((50, 9)).astype(np.float32)
    q_old, q_new = rng.standard_normal((7, 6)).astype(np.float32), rng.standard_normal((7, 9)).astype(np.float32)

    def score(q: np.ndarray, g: np.ndarray, metric: str) -> np.ndarray:
        if metric == "l2":
            return -((q[:, None].astype(np.float64) - g[None]) ** 2).sum(-1)
        if metric == "cosine":
            q, g = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, g))
        return q.astype(np.float64) @ g.T.astype(np.float64)

    for a, b in (("l2", "l2"), ("ip", "cosine"), ("cosine", "cosine"), ("l2", "ip"), ("cosine", "l2")):
        want = np.argsort(-(0.3 * score(q_old, old, a) + 0.7 * score(q_new, new, b)), axis=1)[:, :5]
        np.testing.assert_array_equal(_Fused(old, new, a, b).search(q_old, q_new, 0.7, 5), want)


@pytest.mark.parametrize("metrics", [("l2", "cosine"), ("ip", "l2")])
def test_both_spaces_are_fused_whatever_their_metrics(metrics: tuple[str, str]) -> None:
    verdict = World(1.5, 0.3).judge(old_metric=metrics[0], new_metric=metrics[1], candidate="fused")
    assert verdict.candidate == "fused"


def test_what_is_left_out_is_counted_and_named() -> None:
    world = World(1.5, 0.3)
    grades = {q: dict(items) for q, items in world.judgements.grades.items()}
    grades["q3"] = {"3": 0}
    del grades["q5"]
    grades["nobody asked"] = {"1": 1}
    grades["q7"]["not in the gallery"] = 1
    world.judgements = Judgements(grades)
    verdict = world.judge()
    assert (verdict.queries, verdict.without_relevant, verdict.without_judgement) == (118, 1, 1)
    assert (verdict.unknown_queries, verdict.unknown_items) == (("nobody asked",), ("not in the gallery",))
    assert "1 relevant items not given (not in the gallery)" in str(verdict)
    assert verdict.to_dict()["left_out"] == {
        "without_judgement": 1, "without_relevant": 1, "unknown_queries": 1, "unknown_items": 1,
    }  # fmt: skip


def test_reranking_asks_for_the_nearest_alone() -> None:
    world, asked = World(1.5, 0.5), []

    def true(rows: np.ndarray) -> np.ndarray:
        asked.append(len(rows))
        return world.true[rows]

    verdict = world.judge(true_vectors=true, depth=20, candidate="mapped + rerank")
    assert set(asked) == {20}
    assert verdict.candidate == "mapped + rerank"
    assert [r.name for r in verdict.results] == ["old/old", "mapped", "mapped + rerank", "fused"]


def test_bad_calls_are_refused_by_name() -> None:
    world = World(1.5, 0.3)
    with pytest.raises(ValueError, match=r"candidate: expected one of mapped, fused, got 'mapped \+ rerank'"):
        world.judge(candidate="mapped + rerank")
    with pytest.raises(ValueError, match="true_vectors"):
        world.judge(true_vectors=lambda rows: world.true[rows][:, :3])
    with pytest.raises(ValueError, match="item_ids: expected each id once, got '0' twice"):
        judge_upgrade(world.queries, world.judgements, [0] * 120, world.old, world.mapped)
    with pytest.raises(ValueError, match="are the ids those of the queries"):
        judge_upgrade(world.queries, Judgements.of(["x"], ["y"], [1]), world.ids, world.old, world.mapped)
    with pytest.raises(ValueError, match=r"queries\.slices\['language'\]: expected 2 values, got 1"):
        UpgradeQueries(["a", "b"], world.old[:2], world.mapped[:2], {"language": ["de"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidate": "new/new"}, "candidate: expected one of mapped, mapped + rerank, fused, got 'new/new'"),
        ({"candidate": ["mapped"]}, "candidate: expected one of mapped, mapped + rerank, fused, got ['mapped']"),
        ({"fused": "yes"}, "fused: expected True or False, got 'yes'"),
        ({"margin": 1.5}, "margin: expected a share from 0 to 1, got 1.5"),
        ({"confidence": 95}, "confidence: expected a share between 0 and 1, got 95"),
        ({"resamples": 0}, "resamples: expected a whole number from 1 to 10000000, got 0"),
        ({"depth": 5}, "depth: expected a whole number of at least 10, got 5"),
        ({"true_vectors": np.ones((120, 3), np.float32)}, "true_vectors: expected (120, 16) to match mapped"),
        ({"true_vectors": lambda rows: None}, "true_vectors: expected a numpy array"),
        ({"true_vectors": "true.npy"}, "true_vectors: expected a numpy array"),
    ],
)
def test_an_option_of_the_wrong_kind_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        World(1.5, 0.3).judge(**options)
    assert str(caught.value).startswith(message)


JUDGE: Any = judge_upgrade  # what a type checker refuses is called all the same
QUERIES: Any = UpgradeQueries
OF: Any = Judgements.of
MEASURE: Any = measure_rankings
INTERVAL: Any = paired_interval


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: JUDGE(None, w.judgements, w.ids, w.old, w.mapped), "queries: expected fct.UpgradeQueries"),
        (lambda w: JUDGE(w.queries, {"q": {}}, w.ids, w.old, w.mapped), "judgements: expected fct.Judgements"),
        (lambda w: JUDGE(w.queries, w.judgements, None, w.old, w.mapped), "item_ids: expected ids, one a row"),
        (lambda w: JUDGE(w.queries, w.judgements, "d" * 120, w.old, w.mapped), "item_ids: expected ids"),
        (
            lambda w: JUDGE(w.queries, w.judgements, [None, *w.ids[1:]], w.old, w.mapped),
            "item_ids: expected an id for each row, got None in row 0",
        ),
        (lambda w: QUERIES(None, w.old, w.true), "queries.ids: expected ids, one a row, got None"),
        (lambda w: QUERIES(w.ids, w.old, w.true, ["de"]), "queries.slices: expected a mapping"),
        (lambda w: QUERIES(w.ids, w.old, w.true, {"a": "x" * 120}), "queries.slices['a']: expected 120 values"),
        (lambda w: OF(None, ["d"], [1]), "qrels: queries: expected a column, got None"),
        (lambda w: OF(["q"], ["d"], [10**5000]), "qrels: expected a whole number as grade"),
        (lambda w: OF(["q"], ["d"], [float("inf")]), "qrels: expected a whole number as grade, got inf"),
        (lambda w: OF(["q"], ["d"], ["1" * 5000]), "qrels: expected a whole number as grade"),
        (lambda w: OF([["q"]], ["d"], [1]), "qrels: expected a query id, got ['q'] in judgement 0"),
        (lambda w: MEASURE(["ab"], [{"b": 1}]), "rankings: expected a list of ids for each query, got 'ab'"),
        (lambda w: MEASURE([["b"]], [["b"]]), "relevant: expected a mapping of ids to grades"),
        (lambda w: MEASURE([["b"]], [{"b": "1"}]), "relevant: expected items with grades above 0"),
        (lambda w: INTERVAL([1.0, np.nan], [0, 0]), "values: expected finite numbers, got some that are not"),
        (lambda w: INTERVAL([1.0], [0, 0]), "others: expected (1,), as values, at least one, got (2,)"),
        (
            lambda w: INTERVAL(np.ma.masked_array([1.0, 2.0], mask=np.array([False, True])), [0, 0]),
            "values: expected numbers without a",
        ),
        (lambda w: OF([b"q", "q"], ["d", ""], [1, 1]), "qrels: expected an item id, got none in judgement 1"),
    ],
)
def test_what_is_no_column_no_id_and_no_grade_is_refused(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call(World(1.5, 0.3))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q1 0 d1 high\nq1 0 d2 1\n", "expected a whole number as grade, got 'high', line 1"),
        ("q1\td1\t1.5\nq1\td2\t1\n", "expected a whole number as grade, got '1.5', line 1"),
        ("q1 0 d1\nq1 0 d2 1\n", "expected a whole number as grade, got 'd1', line 1"),
    ],
)
def test_a_bad_grade_in_the_first_line_is_no_head(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "qrels").write_text(text)
    with pytest.raises(FctError, match=message):
        read_qrels(tmp_path / "qrels")
