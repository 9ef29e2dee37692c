"""fct fit, evaluate and search take what a backfill takes and writes, and name the option that was given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

import fct
from fct.cli import main
from fct.fit.recipes import FitConfig

N, D = 120, 6
WORDS = np.array(["shoe", "shirt", "bag"])
LABELS = np.arange(N) % 3
ROWS = (np.eye(D)[LABELS] * 4 + np.random.default_rng(0).standard_normal((N, D))).astype(np.float32)


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    with pytest.raises(SystemExit) as left:
        main([str(w) for w in words])
    said = capsys.readouterr()
    assert left.value.code == 0, said.err
    return said.out


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    with pytest.raises(SystemExit) as left:
        main([str(w) for w in words])
    assert left.value.code == 1
    return capsys.readouterr().err


def fixed(rows: Any) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def shards(folder: Path, **columns: Any) -> Path:
    folder.mkdir()
    table = pa.table(columns)
    for i, start in enumerate(range(0, N, 50)):
        pq.write_table(table.slice(start, 50), folder / f"part-{i}.parquet")
    return folder


VECTORS = {
    "fixed_size_list": fixed(ROWS),
    "list": pa.array(ROWS.tolist(), pa.list_(pa.float32())),
    "large_list": pa.array(ROWS.tolist(), pa.large_list(pa.float32())),
    "binary": pa.array([row.tobytes() for row in ROWS], pa.binary()),
    "binary of one width": pa.array([row.tobytes() for row in ROWS], pa.binary(4 * D)),
}
NAMES = {
    "numbers": pa.array(LABELS),
    "string": pa.array(WORDS[LABELS].tolist()),
    "large_string": pa.array(WORDS[LABELS].tolist(), pa.large_string()),
    "categories": pa.array(WORDS[LABELS].tolist()).dictionary_encode(),
    "small numbers": pa.array(LABELS.astype(np.uint8)),
}


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("labels", NAMES)
def test_evaluate_takes_every_spelling(
    vectors: str, labels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shards(tmp_path / "g", embedding=VECTORS[vectors], label=NAMES[labels])
    words = ["evaluate", "--queries", f"{folder}:embedding", "--query-labels", f"{folder}:label", "--bootstrap", 0]
    run(capsys, *words, "--out", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    want = fct.evaluate(ROWS, ROWS, LABELS, same_items=True, bootstrap=0, progress=False)
    assert found["map"] == pytest.approx(want.map)


def test_evaluate_takes_files_folders_globs_and_feather(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shards(tmp_path / "g", embedding=fixed(ROWS), label=NAMES["string"])
    feather.write_feather(pa.table({"vector": fixed(ROWS), "y": NAMES["string"]}), str(tmp_path / "q.feather"))
    np.save(tmp_path / "q.npy", ROWS)
    np.save(tmp_path / "y.npy", WORDS[LABELS])
    seen = set()
    for queries, labels in (("q.feather", "q.feather:y"), ("q.npy", "y.npy"), ("g/*.parquet", "g/*.parquet:label")):
        words = ["--queries", tmp_path / queries, "--query-labels", tmp_path / labels, "--same-items", "--bootstrap", 0]
        seen.add(run(capsys, "evaluate", *words, "--gallery", folder, "--gallery-labels", f"{folder}:label"))
    assert len(seen) == 1


def test_evaluate_names_the_option_that_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "q.npy", ROWS)
    np.save(tmp_path / "g.npy", ROWS[:, :4])
    np.save(tmp_path / "y.npy", LABELS)
    np.save(tmp_path / "bad.npy", np.where(np.arange(N)[:, None] == 7, np.float32("nan"), ROWS))
    q, y, bad = tmp_path / "q.npy", tmp_path / "y.npy", tmp_path / "bad.npy"
    assert refused(capsys, "evaluate", "--queries", bad, "--query-labels", y).startswith(
        "error: --queries: expected fin"
    )
    assert "error: --queries: expected (n, 4) to match the gallery, got (120, 6)" in refused(
        capsys, "evaluate", "--queries", q, "--query-labels", y, "--gallery", tmp_path / "g.npy", "--gallery-labels", y
    )
    folder = shards(tmp_path / "g", a=fixed(ROWS), b=fixed(ROWS))
    said = refused(capsys, "evaluate", "--queries", folder, "--query-labels", y)
    assert said == "error: --queries: expected the name of a column, since several could be meant: a, b\n"
    said = refused(capsys, "evaluate", "--queries", f"{folder}:a", "--query-labels", f"{folder}:none")
    assert "--query-labels: expected a column of" in said


@pytest.mark.parametrize(
    "labels",
    [
        WORDS[LABELS].tolist(),
        WORDS[LABELS].astype(object),
        pa.array(WORDS[LABELS].tolist()),
        pa.chunked_array([WORDS[LABELS].tolist()]),
        LABELS.astype(object),
    ],
    ids=["list", "objects", "Arrow", "chunks", "integers as objects"],
)
def test_python_takes_labels_as_they_come(labels: Any) -> None:
    want = fct.evaluate(ROWS, ROWS, LABELS, same_items=True, bootstrap=0, progress=False)
    assert fct.evaluate(ROWS, ROWS, labels, same_items=True, bootstrap=0, progress=False).map == want.map


def test_python_takes_text_of_pandas_and_numpy() -> None:
    pandas = pytest.importorskip("pandas")
    want = fct.evaluate(ROWS, ROWS, LABELS, same_items=True, bootstrap=0, progress=False)
    for labels in (
        pandas.Series(WORDS[LABELS]),
        pandas.Series(WORDS[LABELS], dtype="category"),
        pandas.Categorical(WORDS[LABELS]),
        *([WORDS[LABELS].astype(np.dtypes.StringDType())] if hasattr(np.dtypes, "StringDType") else []),
    ):
        assert fct.evaluate(ROWS, ROWS, labels, same_items=True, bootstrap=0, progress=False).map == want.map


def test_a_missing_label_is_refused_by_its_row() -> None:
    labels = WORDS[LABELS].astype(object)
    labels[5] = None
    with pytest.raises(ValueError, match=r"query_labels: expected integer or string .* None in row 5"):
        fct.evaluate(ROWS, ROWS, labels, same_items=True, bootstrap=0, progress=False)


def pairs_of(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    new = (ROWS @ rng.standard_normal((D, 5)) + 0.1 * rng.standard_normal((N, 5))).astype(np.float32)
    return {"old": ROWS, "side": ROWS[:, :3].copy(), "new": new}


def written(path: Path) -> Any:
    """What a search wrote, as its suffix says."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def known() -> list[fct.Transformation]:
    return []


@pytest.mark.parametrize("form", ["parquet", "npz", "folder", "apart"])
def test_fit_takes_pairs_in_one_file_or_apart(
    form: str,
    known: list[fct.Transformation],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arrays = pairs_of(tmp_path)
    table = {name: fixed(rows) for name, rows in arrays.items()}
    if form == "npz":
        np.savez(tmp_path / "pairs.npz", **arrays)
        words = ["--pairs", tmp_path / "pairs.npz"]
    elif form == "parquet":
        pq.write_table(pa.table(table), tmp_path / "pairs.parquet")
        words = ["--pairs", tmp_path / "pairs.parquet"]
    else:
        folder = shards(tmp_path / "pairs", **table)
        words = ["--pairs", folder] if form == "folder" else []
        if form == "apart":
            words = ["--old", f"{folder}:old", "--side-info", f"{folder}:side", "--new", f"{folder}:new"]
    given: list[Any] = []
    real = fct.fit_transformation

    def fitted(*pairs: Any, **how: Any) -> fct.Transformation:
        given.extend(pairs)
        assert how["config"] == "auto"
        if not known:  # the same pairs each time: one fit is enough, and a short one
            short = FitConfig(inner=16, epochs=2, batch_size=32)
            known.append(real(*pairs, **{**how, "config": short}))
        return known[0]

    monkeypatch.setattr("fct.fit.transformation_fit.fit_transformation", fitted)
    run(capsys, "fit", *words, "--out", tmp_path / "h.safetensors")
    for got, name in zip(given, ("old", "side", "new"), strict=True):
        np.testing.assert_array_equal(np.asarray(got), arrays[name], err_msg=name)
    h = fct.Transformation.load(tmp_path / "h.safetensors")
    assert (h.d_old, h.d_side, h.d_new) == (D, 3, 5)


def test_fit_names_the_option_that_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "old.npy", ROWS)
    np.save(tmp_path / "new.npy", ROWS[:50])
    out = ["--out", tmp_path / "h.safetensors"]
    said = refused(capsys, "fit", "--old", tmp_path / "old.npy", "--new", tmp_path / "new.npy", *out)
    assert said.startswith("error: --new: expected")
    assert "error: --new: expected vectors, or --pairs" in refused(capsys, "fit", "--old", tmp_path / "old.npy", *out)
    pq.write_table(pa.table({"old": fixed(ROWS), "y": LABELS}), tmp_path / "p.parquet")
    said = refused(capsys, "fit", "--pairs", tmp_path / "p.parquet", *out)
    assert "error: --pairs: expected columns old and new" in said
    assert said.rstrip().endswith("has old, y")


def test_search_finds_ids_rows_and_distances(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shards(tmp_path / "g", id=[f"item {i}" for i in range(N)], embedding=fixed(ROWS))
    np.save(tmp_path / "q.npy", ROWS[[7, 60]])
    want = fct.topk(ROWS[[7, 60]], ROWS, 3)
    words = ["search", "--queries", tmp_path / "q.npy", "--gallery", folder, "-k", 3]
    lines = [json.loads(line) for line in run(capsys, *words).splitlines()]
    assert [line["rows"] for line in lines] == want.indices.tolist()
    assert [line["ids"] for line in lines] == [[f"item {i}" for i in row] for row in want.indices]
    assert np.array_equal(np.array([line["distances"] for line in lines], np.float32), want.distances)
    for name in ("out.parquet", "out.json", "out.jsonl"):
        run(capsys, *words, "--out", tmp_path / name)
        assert written(tmp_path / name) == lines
        assert "exists" in refused(capsys, *words, "--out", tmp_path / name)


def test_search_in_a_new_gallery_of_matrices_knows_its_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = shards(tmp_path / "old", pk=np.arange(N) + 1000, embedding=fixed(np.where(LABELS[:, None] == 3, 0, ROWS)))
    h = fct.Transformation.random(D, D, 4, inner=16, side_info=False)
    fct.backfill(old, tmp_path / "new", h, old_model="random-old", format="npy", shard_rows=30, progress=False)
    rows = np.concatenate([np.load(f) for f in sorted((tmp_path / "new").glob("*.npy"))])
    np.save(tmp_path / "q.npy", rows[[100]])
    (line,) = run(
        capsys, "search", "--queries", tmp_path / "q.npy", "--gallery", tmp_path / "new", "-k", 1
    ).splitlines()
    assert json.loads(line)["ids"] == [1100]
    assert "error: --queries: expected vectors of" in refused(
        capsys, "search", "--queries", retagged(tmp_path), "--gallery", tmp_path / "new", "-k", 1
    )
    said = refused(capsys, "search", "--queries", tmp_path / "q.npy", "--gallery", tmp_path / "new", "-k", 1000)
    assert said.startswith("error: -k: expected")


def retagged(folder: Path) -> Path:
    """Queries of another model."""
    (folder / "other").mkdir()
    np.save(folder / "other/q.npy", np.zeros((1, 4), np.float32))
    fct.gallery.tag_space(folder / "other", fct.EmbeddingSpace("another", 4))
    return folder / "other"
