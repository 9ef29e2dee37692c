"""fct inspect names what is wrong with a column of vectors, and keeps quiet where nothing is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.errors import FctError
from fct.gallery import tag_space
from fct.inspection import model_groups


def one_model(rng: np.random.Generator, n: int, d: int = 32, topics: int = 8, seed: int = 5) -> Any:
    """Unit vectors of n items in some topics, whose spread lies in a few directions that all topics share."""
    model = np.random.default_rng(seed)
    centres, spread = model.standard_normal((topics, d)), model.standard_normal((6, d))
    rows = 0.7 * centres[rng.integers(0, topics, n)] + rng.standard_normal((n, 6)) @ spread
    rows += 0.1 * rng.standard_normal((n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def inspected(path: Path, **options: Any) -> fct.GalleryInspection:
    return fct.inspect_gallery(path, progress=False, **options)


def test_a_sound_gallery_is_left_in_peace(tmp_path: Path, rng: np.random.Generator) -> None:
    np.save(tmp_path / "a.npy", one_model(rng, 3000))
    tag_space(tmp_path / "a.npy", fct.EmbeddingSpace("m", 32, normalised=True))
    found = inspected(tmp_path / "a.npy")
    assert found.findings == ()
    assert (found.rows, found.dim, found.zero, found.duplicates, found.bad) == (3000, 32, 0, 0, {})
    assert found.unit_share == 1.0


def test_every_fault_is_counted_and_named(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = 3 * one_model(rng, 1000)
    rows[:, 4] = 0.5
    lists: list[Any] = [row.tolist() for row in rows]
    lists[3], lists[4], lists[5] = None, [1.0] * 7, [float("nan")] * 32
    lists[10] = [0.0] * 32
    lists[20:25] = [lists[19]] * 5
    half = [[x / np.linalg.norm(v) for x in v] if v and i % 2 and any(v) else v for i, v in enumerate(lists)]
    pq.write_table(pa.table({"emb": pa.array(half, pa.list_(pa.float32()))}), tmp_path / "g.parquet")
    found = inspected(tmp_path / "g.parquet")
    assert found.bad == {"null": 1, "expected 32 elements, got 7": 1, "not finite": 1}
    assert found.zero == 1
    assert found.duplicates == 4  # three of one parity repeat, and the sixth copy's parity its own first
    said = "\n".join(found.findings)
    assert "3 of 1,000 rows hold no usable vector" in said
    assert "1 rows are zero" in said
    assert "4 rows repeat an earlier one exactly" in said
    assert "% of the rows have unit length and the others do not" in said
    assert "does not say which model" in said


def test_padding_and_codes_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    np.save(tmp_path / "padded.npy", np.pad(one_model(rng, 500), ((0, 0), (0, 3))))
    assert inspected(tmp_path / "padded.npy").constant == (32, 33, 34)
    np.save(tmp_path / "codes.npy", rng.integers(-128, 128, (500, 16)).astype(np.float32))
    assert "8-bit" in "\n".join(inspected(tmp_path / "codes.npy").findings)


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_two_models_in_one_column_are_found(tmp_path: Path, rng: np.random.Generator, share: float) -> None:
    """Half a gallery re-embedded, or a fifth: the same items' topics, another model's directions."""
    n = 3000
    rows, other = one_model(rng, n, topics=4), one_model(rng, n, topics=4, seed=6)
    second = rng.random(n) < share
    rows[second] = other[second]
    np.save(tmp_path / "a.npy", rows)
    found = inspected(tmp_path / "a.npy")
    assert found.groups is not None
    assert found.groups.share == pytest.approx(second.mean(), abs=0.03)
    small = second if second.mean() <= 0.5 else ~second
    assert np.mean([small[row] for row in found.groups.first_rows]) in (0.0, 1.0)
    assert "two models in one column, most likely" in "\n".join(found.findings)


def test_topics_of_one_model_are_not_two_models(rng: np.random.Generator) -> None:
    for topics in (1, 2, 3, 20):
        rows = one_model(rng, 3000, topics=topics)
        assert model_groups(rows, np.arange(len(rows))) is None, topics
    assert model_groups(rng.standard_normal((3000, 32)).astype(np.float32), np.arange(3000)) is None


def test_too_few_rows_tell_nothing(rng: np.random.Generator) -> None:
    assert model_groups(one_model(rng, 150), np.arange(150)) is None


def test_a_column_of_nothing_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"emb": pa.array([None, None], pa.list_(pa.float32()))}), tmp_path / "g.parquet")
    with pytest.raises(FctError, match="expected at least one whole vector in column 'emb'"):
        inspected(tmp_path / "g.parquet")
    with pytest.raises(ValueError, match="vector_column: expected a column of the gallery"):
        inspected(tmp_path / "g.parquet", vector_column="other")


def test_the_command(tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]) -> None:
    from fct.cli import main

    np.save(tmp_path / "a.npy", one_model(rng, 300))
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(tmp_path / "a.npy"), "--no-progress"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "300 rows of 32 dimensions" in out
    assert "fct.gallery.tag_space" in out
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "a.npy"), "--json"])
    assert json.loads(capsys.readouterr().out)["rows"] == 300


@pytest.mark.parametrize("value", [None, 4, "float64", True])
def test_what_a_binary_column_cannot_hold_is_refused(tmp_path: Path, value: Any) -> None:
    np.save(tmp_path / "a.npy", np.ones((20, 4), np.float32))
    with pytest.raises(ValueError, match=r"^binary_dtype: expected one of float32, float16, got "):
        inspected(tmp_path, binary_dtype=value)


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_progress_is_a_boolean_wherever_a_bar_is_shown(tmp_path: Path, value: Any) -> None:
    np.save(tmp_path / "a.npy", np.ones((20, 4), np.float32))
    with pytest.raises(ValueError, match=r"^progress: expected True or False, got "):
        fct.inspect_gallery(tmp_path, progress=value)


def test_a_gallery_without_rows_is_said(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((0, 4), np.float32))
    with pytest.raises(FctError, match=r"^source: expected at least one whole vector in column .vector., .* has none$"):
        inspected(tmp_path)
