"""Partial backfill: some rows true, the others mapped, a column that says which, and no vector paid for twice."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.cli.app import main
from fct.errors import BackfillError, FctWarning
from fct.gallery import vector_array
from fct.mixed_gallery import MixedCorrection
from fct.rows import rows_of
from tests.backfilling.conftest import D_NEW, QUICK, contents

pytestmark = pytest.mark.filterwarnings("ignore:reembed")
N = 900


def true_vector(i: int) -> Any:
    return np.random.default_rng([7, i]).standard_normal(D_NEW).astype(np.float32)


class Model:
    """The new model, which costs money: counts each id that it was asked for, and fails where a test wants it to."""

    def __init__(self, fails_at: int | None = None, how: str = "raises") -> None:
        self.asked: list[str] = []
        self.fails_at, self.how, self.calls = fails_at, how, 0

    def __call__(self, ids: list[str]) -> Any:
        self.calls += 1
        failing = self.fails_at is not None and self.calls >= self.fails_at
        if failing and self.how == "raises":
            raise ConnectionError("quota used up")
        self.asked += ids
        out = np.stack([true_vector(int(i.removeprefix("item-"))) for i in ids])
        if failing and self.how == "short":
            return out[:-1]
        if failing and self.how == "wide":
            return np.pad(out, ((0, 0), (0, 3)))
        if failing and self.how == "nan":
            out[1] = np.nan
        return out


def table_of(folder: Path) -> pa.Table:
    return pq.read_table([folder / f for f in sorted(p.name for p in folder.glob("*.parquet"))])


def vectors_of(table: pa.Table) -> Any:
    return np.stack([np.asarray(v, np.float32) for v in table["old"].to_pylist()])


def test_chosen_rows_are_true_and_the_others_what_a_whole_backfill_writes(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path
) -> None:
    old = gallery(N)
    fct.backfill(old, tmp_path / "whole", h, **QUICK)
    report = fct.backfill(old, tmp_path / "part", h, reembed=Model(), budget=0.3, **QUICK)
    assert (report.reembedded, report.chosen, report.rows_out) == (270, 270, N)
    whole, part = table_of(tmp_path / "whole"), table_of(tmp_path / "part")
    true = np.asarray(part["reembedded"])
    assert true.sum() == 270
    assert part.drop_columns(["old", "reembedded"]).equals(whole.drop_columns(["old"]))
    numbers = [int(i.removeprefix("item-")) for i in part["id"].to_pylist()]
    got = vectors_of(part)
    np.testing.assert_array_equal(got[true], np.stack([true_vector(numbers[row]) for row in np.flatnonzero(true)]))
    np.testing.assert_array_equal(got[~true], vectors_of(whole)[~true])


def test_the_same_seed_chooses_the_same_rows_and_another_one_others(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path
) -> None:
    old = gallery(N)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fct.backfill(old, tmp_path / name, h, reembed=Model(), budget=0.2, reembed_seed=seed, **QUICK)
    a, b, c = (np.asarray(table_of(tmp_path / name)["reembedded"]) for name in "abc")
    assert (a == b).all()
    assert not (a == c).all()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", r"reembed: the function raised ConnectionError: quota used up, for 20 ids \('item-\d+'.*is kept"),
        (
            "short",
            r"reembed: expected \(20, 12\), a vector of 'random-new' for each id, from the .*, got \(19, 12\)",
        ),
        ("wide", r"reembed: expected \(20, 12\), .*got \(20, 15\)"),
        ("nan", r"reembed: expected finite vectors, got NaN or infinity for 'item-\d+'; 19 other vectors .* are kept"),
    ],
)
def test_what_fails_in_the_middle_costs_no_vector_twice(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path, how: str, words: str
) -> None:
    old, kw = gallery(N), {"budget": 0.5, "reembed_ids": 20, **QUICK}
    fct.backfill(old, tmp_path / "straight", h, reembed=Model(), **kw)
    first = Model(fails_at=8, how=how)
    with pytest.raises(BackfillError, match=words):
        fct.backfill(old, tmp_path / "new", h, reembed=first, **kw)
    second = Model()
    report = fct.backfill(old, tmp_path / "new", h, reembed=second, **kw)
    assert report.reembedded == 450
    again = set(first.asked) & set(second.asked)
    assert len(again) <= {"raises": 0, "short": 20, "wide": 20, "nan": 1}[how]
    assert len(second.asked) == len(set(second.asked)) < 450
    data = {n: b for n, b in contents(tmp_path / "new").items() if n.endswith(".parquet")}
    assert data == {n: b for n, b in contents(tmp_path / "straight").items() if n.endswith(".parquet")}


def test_a_shard_that_is_done_again_asks_for_nothing(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path
) -> None:
    old, new, kw = gallery(N), tmp_path / "new", {"budget": 0.5, **QUICK}
    fct.backfill(old, new, h, reembed=Model(), **kw)
    before = contents(new)
    victim = sorted(new.glob("*.parquet"))[1]
    victim.write_bytes(victim.read_bytes()[:-9])
    model = Model()
    assert fct.backfill(old, new, h, reembed=model, **kw).shards_done == 1
    assert model.asked == []
    assert contents(new) == before
    # A damaged store is as good as none: what it held is asked for anew.
    for kept in (new / "_fct/true").iterdir():
        kept.write_bytes(kept.read_bytes()[:-4] + b"oops")
    victim.write_bytes(b"")
    assert fct.backfill(old, new, h, reembed=model, **kw).shards_done == 1
    assert len(model.asked) > 0
    assert contents(new) == before


def test_a_choice_that_is_gone_is_not_made_anew_beside_shards(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path
) -> None:
    old, new = gallery(N), tmp_path / "new"
    fct.backfill(old, new, h, reembed=Model(), budget=0.5, **QUICK)
    for bits in (new / "_fct/chosen").iterdir():
        bits.write_bytes(b"\xff" * bits.stat().st_size)
    with pytest.raises(BackfillError, match="lacks the choice of rows that shards were made with: restore it"):
        fct.backfill(old, new, h, reembed=Model(), budget=0.5, **QUICK)


def test_a_budget_of_none_and_of_all(gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path) -> None:
    old, model = gallery(N, bad=(5,)), Model()
    report = fct.backfill(old, tmp_path / "none", h, reembed=model, budget=0, **QUICK)
    assert (report.reembedded, report.rows_out, report.rejects, model.calls) == (0, N - 1, 1, 0)
    assert not np.asarray(table_of(tmp_path / "none")["reembedded"]).any()
    report = fct.backfill(old, tmp_path / "all", h, reembed=model, budget=1, **QUICK)
    assert (report.reembedded, report.chosen, report.rejects) == (N - 1, N, 1)
    assert np.asarray(table_of(tmp_path / "all")["reembedded"]).all()
    for name in ("none", "all"):
        assert fct.verify_gallery(tmp_path / name, source=old).proven


def test_items_that_are_gone_are_mapped_and_counted(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path
) -> None:
    def model(ids: list[str]) -> list[Any]:
        return [None if i.endswith("7") else true_vector(int(i[5:])) for i in ids]

    report = fct.backfill(gallery(N), tmp_path / "new", h, reembed=model, budget=1.0, **QUICK)
    assert (report.chosen, report.reembedded, report.rows_out) == (N, N - 90, N)
    table = table_of(tmp_path / "new")
    assert [i.endswith("7") for i in table["id"].to_pylist()] == [not t for t in table["reembedded"].to_pylist()]


def test_the_function_sees_the_payload_where_it_asks_for_it(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path
) -> None:
    def model(ids: list[str], rows: pa.RecordBatch) -> Any:
        assert rows["id"].to_pylist() == ids
        assert len(rows["tag"]) == len(ids)
        return np.stack([true_vector(int(i[5:])) for i in ids])

    report = fct.backfill(gallery(N), tmp_path / "new", h, reembed=model, budget=0.1, reembed_payload=True, **QUICK)
    assert report.reembedded == 90


def pairs_file(tmp_path: Path, numbers: list[int], **more: Any) -> Path:
    table = pa.table(
        {"id": [f"item-{i}" for i in numbers], "new": vector_array(np.stack([true_vector(i) for i in numbers])), **more}
    )
    pq.write_table(table, tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


def test_pairs_of_ids_and_vectors(gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path) -> None:
    old, pairs = gallery(N), pairs_file(tmp_path, [*range(0, N, 3), 5000, 5001])
    report = fct.backfill(old, tmp_path / "new", h, reembed=pairs, **QUICK)
    assert (report.reembedded, report.unknown, report.unknown_ids) == (300, 2, ("'item-5000'", "'item-5001'"))
    some = fct.backfill(old, tmp_path / "some", h, reembed=str(pairs), budget=0.1, **QUICK)
    assert some.reembedded == 90
    true = table_of(tmp_path / "some").filter(pa.compute.field("reembedded"))
    np.testing.assert_array_equal(vectors_of(true), [true_vector(int(i[5:])) for i in true["id"].to_pylist()])


def test_verify_compares_true_rows_with_their_pairs_and_not_with_h(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path
) -> None:
    old, pairs = gallery(N), pairs_file(tmp_path, list(range(0, N, 3)))
    fct.backfill(old, tmp_path / "new", h, reembed=pairs, **QUICK)
    blind = fct.verify_gallery(tmp_path / "new", source=old)
    assert blind.ok
    assert not blind.proven
    assert "300 re-embedded rows" in blind.unproven[0]
    seen = fct.verify_gallery(tmp_path / "new", source=old, reembed=pairs)
    assert seen.proven
    assert seen.true_rows == 300
    assert seen.spot_checked == 600
    others = {
        "id": [f"item-{i}" for i in range(0, N, 3)],
        "new": np.stack([true_vector(i + 1) for i in range(0, N, 3)]),
    }
    wrong = fct.verify_gallery(tmp_path / "new", source=old, reembed=others)
    assert "is not the vector that it was re-embedded with (" in wrong.problems[0]


def test_verify_compares_what_a_function_gave_with_the_journal(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path
) -> None:
    old = gallery(N)
    fct.backfill(old, tmp_path / "new", h, reembed=Model(), budget=0.5, **QUICK)
    report = fct.verify_gallery(tmp_path / "new", source=old, deep=True)
    assert report.proven
    assert report.true_rows == 450
    assert report.spot_checked == 450
    for kept in (tmp_path / "new/_fct/true").iterdir():
        kept.unlink()
    assert "450 re-embedded rows" in fct.verify_gallery(tmp_path / "new", source=old).unproven[0]
    # Calling a mapped row true does not hide it from the check: the journal knows which rows were chosen.
    from fct.backfilling.row_choice import RowChoice, keep_choice
    from fct.backfilling.verify import gallery_journal

    journal, job = gallery_journal(tmp_path / "new")
    for bits in (tmp_path / "new/_fct/chosen").iterdir():
        bits.unlink()
    keep_choice(journal, job, RowChoice([]), np.zeros(N, bool))
    assert "is called re-embedded, and was not chosen" in fct.verify_gallery(tmp_path / "new", source=old).problems[0]


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ({"id": ["item-1"], "new": np.zeros((1, 3), np.float32)}, r"reembed: expected \(n, 12\)"),
        ({"id": ["item-1"], "new": np.zeros((2, 12), np.float32)}, "expected an id for each of 2 vectors, got 1"),
        ({"id": ["item-1"], "vec": np.zeros((1, 12), np.float32)}, "expected arrays id and new, got id, vec"),
        (
            {"id": ["a", "a"], "new": np.eye(2, 12, dtype=np.float32)},
            "rows 0 and 1 have two of 'a'",
        ),
        ({"id": ["a"], "new": np.full((1, 12), np.nan, np.float32)}, "reembed: .*(finite|NaN)"),
        ({"id": ["a", None], "new": np.zeros((2, 12), np.float32)}, "an id for each vector, row 1 has none"),
    ],
)
def test_pairs_that_are_none(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path, pairs: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        fct.backfill(gallery(N), tmp_path / "new", h, reembed=pairs, **QUICK)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0.1}, "budget: expected reembed beside it"),
        ({"order": "tag"}, "order: expected reembed beside it"),
        ({"reembed": Model()}, "budget: expected the share of rows to ask the function for, from 0 to 1, got None"),
        ({"reembed": Model(), "budget": 1.5}, "budget: expected a share of the rows from 0 to 1, got 1.5"),
        ({"reembed": Model(), "budget": 0.1, "order": "colour"}, r"order: expected .* or a column .*\(id, side, tag\)"),
        ({"reembed": Model(), "budget": 0.1, "order": "id"}, "order: expected a column of numbers.*'id' is string"),
        ({"reembed": Model(), "budget": 0.1, "order": "access"}, "access_log: expected a table of ids and counts"),
        (
            {"reembed": Model(), "budget": 0.1, "true_column": "tag"},
            "true_column: expected a name",
        ),
        ({"reembed": Model(), "budget": 0.1, "order": "variance"}, "unit-length embeddings alone"),
    ],
)
def test_options_that_do_not_fit(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path, options: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        fct.backfill(gallery(N), tmp_path / "new", h, **options, **QUICK)


def test_order_by_a_column_and_by_an_access_log(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path
) -> None:
    old = gallery(N)
    fct.backfill(old, tmp_path / "tag", h, reembed=Model(), budget=0.25, order="tag", **QUICK)
    table = table_of(tmp_path / "tag")
    tags, true = np.asarray(table["tag"]), np.asarray(table["reembedded"])
    assert true.sum() == 225
    assert tags[true].min() >= tags[~true].max()
    log = pa.table({"id": ["item-9", "item-3", "item-9", "item-800"]})
    pq.write_table(log, tmp_path / "log.parquet")
    fct.backfill(
        old, tmp_path / "log", h, reembed=Model(), budget=3 / N, order="access", access_log=tmp_path / "log.parquet",
        **QUICK,
    )  # fmt: skip
    found = table_of(tmp_path / "log").filter(pa.compute.field("reembedded"))["id"].to_pylist()
    assert sorted(found) == ["item-3", "item-800", "item-9"]


def unit_h(**info: Any) -> fct.Transformation:
    h = fct.Transformation.random(16, 8, D_NEW, inner=64, normalise=True)
    return h.with_(new_space=fct.EmbeddingSpace("unit", D_NEW, metric="ip", normalised=True), info=info)


def unit_model(ids: list[str]) -> Any:
    rows = np.stack([true_vector(int(i[5:])) for i in ids])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_order_by_the_variance_that_h_predicts(gallery: Callable[..., Path], tmp_path: Path) -> None:
    old, h = gallery(N), unit_h()
    fct.backfill(old, tmp_path / "new", h, reembed=unit_model, budget=0.2, order="variance", **QUICK)
    table = pq.read_table(old)
    raw = fct.transform_batch(
        vectors_of(table), np.stack([np.asarray(s, np.float32) for s in table["side"].to_pylist()]),
        h.with_(normalise=False), precision="fp32",
    )  # fmt: skip
    length = dict(zip(table["id"].to_pylist(), np.linalg.norm(rows_of(raw, "raw").float32(), axis=1), strict=True))
    new = table_of(tmp_path / "new")
    lengths = np.array([length[i] for i in new["id"].to_pylist()])
    true = np.asarray(new["reembedded"])
    assert true.sum() == 180
    assert lengths[true].max() <= lengths[~true].min() * 1.0001


def test_vectors_that_are_not_of_unit_length_are_another_model_s(gallery: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(
        BackfillError, match=r"reembed: expected vectors of 'unit'.*unit length, that of 'item-\d+' has"
    ):
        fct.backfill(gallery(N), tmp_path / "new", unit_h(), reembed=Model(), budget=0.1, **QUICK)
    assert not list((tmp_path / "new/_fct").glob("true/*"))


def test_mapped_rows_get_the_length_that_the_artifact_says(gallery: Callable[..., Path], tmp_path: Path) -> None:
    point = {"true_share": 0.5, "recall": 0.5, "corrected_recall": 0.6}
    h = unit_h(mixed={"correction": {"kind": "length", "value": 0.9}, "points": [point], "k": 10})
    with warnings.catch_warnings():
        warnings.simplefilter("error", FctWarning)
        fct.backfill(gallery(N), tmp_path / "new", h, reembed=unit_model, budget=0.5, **QUICK)
    table = table_of(tmp_path / "new")
    lengths, true = np.linalg.norm(vectors_of(table), axis=1), np.asarray(table["reembedded"])
    np.testing.assert_allclose(lengths[true], 1, atol=1e-5)
    np.testing.assert_allclose(lengths[~true], 0.9, atol=1e-5)
    from fct.gallery import open_source

    space = open_source(tmp_path / "new").space
    assert space is not None
    assert space.mapped_length == 0.9


def test_without_a_correction_the_loss_is_said(gallery: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.warns(FctWarning, match=r"mapped rows stand among true ones uncorrected.*was not measured"):
        fct.backfill(gallery(N), tmp_path / "new", unit_h(), reembed=unit_model, budget=0.5, **QUICK)
    assert MixedCorrection("length", 1.0).value == 1.0


def test_bare_matrices_go_by_row_number(h: fct.Transformation, tmp_path: Path, rng: np.random.Generator) -> None:
    h = fct.Transformation.random(8, 8, D_NEW, inner=16, side_info=False)
    np.save(tmp_path / "old.npy", rng.standard_normal((N, 8), dtype=np.float32))
    asked: list[int] = []

    def model(ids: list[int]) -> Any:
        asked.extend(ids)
        return np.stack([true_vector(i) for i in ids])

    kw = {"old_model": "random-old", **QUICK}
    report = fct.backfill(tmp_path / "old.npy", tmp_path / "new", h, reembed=model, budget=0.1, **kw)
    assert report.reembedded == 90
    rows = np.concatenate([np.load(f) for f in sorted((tmp_path / "new").glob("*.npy"))])
    np.testing.assert_array_equal(rows[asked], [true_vector(i) for i in asked])
    beside = pa.concat_tables([pq.read_table(f) for f in sorted((tmp_path / "new/_rows").glob("*.parquet"))])
    assert np.flatnonzero(np.asarray(beside["reembedded"])).tolist() == sorted(asked)
    assert fct.verify_gallery(tmp_path / "new", source=tmp_path / "old.npy", deep=True).true_rows == 90
    pairs = {"id": np.array([3, 901]), "new": np.stack([true_vector(3), true_vector(901)])}
    report = fct.backfill(tmp_path / "old.npy", tmp_path / "two", h, reembed=pairs, **kw)
    assert (report.reembedded, report.unknown_ids) == (1, ("901",))


def test_another_rule_is_another_backfill(gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path) -> None:
    old, new = gallery(N), tmp_path / "new"
    fct.backfill(old, new, h, reembed=Model(), budget=0.5, **QUICK)
    with pytest.raises(BackfillError, match=r"the rule by which rows are re-embedded: 'random, budget 0\.5"):
        fct.backfill(old, new, h, reembed=Model(), budget=0.6, **QUICK)
    with pytest.raises(BackfillError, match="the rule by which rows are re-embedded"):
        fct.backfill(old, new, h, **QUICK)


def test_files_that_came_are_chosen_from_as_well(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path
) -> None:
    old, new = gallery(N), tmp_path / "new"
    fct.backfill(old, new, h, reembed=Model(), budget=0.5, **QUICK)
    first = contents(new)
    pq.write_table(pq.read_table(old / "part-2.parquet").slice(0, 100), old / "part-99.parquet")
    report = fct.backfill(old, new, h, reembed=Model(), budget=0.5, follow=True, **QUICK)
    assert report.rows_out == N + 100
    assert report.chosen == 500
    assert {n: b for n, b in contents(new).items() if n in first} == first


def test_the_command_line_takes_pairs(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    old, pairs = gallery(N), pairs_file(tmp_path, [0, 1, 2, 4000])
    h.save(tmp_path / "h.safetensors")
    args = [str(old), str(tmp_path / "new"), "-t", str(tmp_path / "h.safetensors"), "--reembed", str(pairs)]
    with pytest.raises(SystemExit) as left:
        main(["backfill", *args, "--order", "tag", "--budget", "0.5"])
    assert left.value.code == 0
    out = capfd.readouterr().out
    assert "3 rows re-embedded of 3 that were chosen" in out
    assert "--reembed: 1 ids are not in the gallery ('item-4000')" in out
    with pytest.raises(SystemExit) as left:
        main(["verify", str(tmp_path / "new"), "--source", str(old), "--reembed", str(pairs), "--deep"])
    assert left.value.code == 0
    assert "3 re-embedded rows are the vectors that they were given" in capfd.readouterr().out
