"""The whole life of the system, on few images with short trainings: its files, its table, its verdict."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import fct
from fct import ref
from fct.cli import main
from fct.data import load_fashion_mnist
from fct.errors import BackfillError, FctError, SpaceMismatchError
from fct.fit.recipes import FitConfig
from fct.life.costs import model_flop
from fct.life.gallery_stage import upgrade_gallery
from fct.life.quickstart import QuickstartConfig, run_quickstart
from fct.life.table_stage import BCT_NEW, BCT_OLD, WITH, WITHOUT
from fct.report import ResultTable

FIT = FitConfig(inner=64, epochs=8, batch_size=64, lr=2e-3, warmup_epochs=1.0, standardise=True)
SHORT = QuickstartConfig(dim=16, old_epochs=2, new_epochs=3, queries=80, side_dim=16, fit=FIT)
NAMES = ["old/old", BCT_OLD, BCT_NEW, WITHOUT, WITH, "new/new"]


def write_idx(path: Path, array: Any) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), 1))


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 + 200 images in the publisher's files."""
    folder = tmp_path_factory.mktemp("idx")
    for split, prefix, count in (("train", "train", 600), ("test", "t10k", 200)):
        images = load_fashion_mnist(split)
        rows = np.random.default_rng(0).permutation(len(images))[:count]
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images.images[rows, 0])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", images.labels[rows])
    return folder


@pytest.fixture(scope="module")
def run(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("quickstart") / "first"
    return run_quickstart(out, data_root=data_root, seed=5, config=SHORT, progress=False)


def test_the_table(run: Any) -> None:
    rows = run.table.rows
    assert [row.name for row in rows] == NAMES
    assert rows[-1].recall10 == 1.0
    assert rows[0].seconds is None
    assert all(row.seconds > 0 for row in rows[1:])
    new, old = rows[-1], rows[0]
    assert new.map > old.map, "ten classes against five"
    assert run.table.row(WITH).map > old.map


def test_the_tables_schema(run: Any) -> None:
    """Other programs read table.json: its keys stay."""
    contents = json.loads(run.files["table (JSON)"].read_text())
    assert sorted(contents) == [
        "ceiling", "config", "facts", "floor", "notes", "rows", "stages, seconds", "title", "verdict",
    ]  # fmt: skip
    for row in contents["rows"]:
        assert sorted(row) == [
            "cmc1",
            "cmc5",
            "gap_closed_cmc1",
            "gap_closed_map",
            "map",
            "name",
            "recall10",
            "seconds",
        ]
    assert sorted(contents["facts"]) == [
        "backfill, rows a second", "fct", "gallery", "h alone, rows a second", "h, MFLOP an item",
        "new model, MFLOP an item", "queries", "re-embedding, images a second", "seed", "threads", "torch",
        "training images",
    ]  # fmt: skip
    assert contents["verdict"]["migrate"] in (True, False)


def test_the_files(run: Any) -> None:
    folder = next(iter(run.files.values())).parent
    assert sorted(p.name for p in folder.iterdir()) == [
        "gallery-new",
        "gallery-old.parquet",
        "h.safetensors",
        "quickstart.png",
        "report.html",
        "table.json",
        "table.md",
    ]
    contents = json.loads((folder / "table.json").read_text())
    assert ResultTable.from_dict(contents) == run.table
    assert contents["verdict"]["sentence"] == run.verdict.sentence
    assert run.verdict.sentence in (folder / "table.md").read_text()
    assert (folder / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    h = fct.Transformation.load(folder / "h.safetensors")
    assert (h.d_old, h.d_side, h.d_new) == (16, 16, 16)


def test_the_galleries_hold_no_images(run: Any) -> None:
    old = pq.read_table(run.files["old gallery"])
    assert old.schema.names == ["id", "embedding", "side_info", "label"]
    assert old.num_rows == 120
    new = pq.read_table(run.files["new gallery"])
    assert new.schema.names == ["id", "embedding", "label"]
    assert new["id"].equals(old["id"])
    h = fct.Transformation.load(run.files["h"])
    assert old["side_info"].type == pa.binary(8), "16 codes of 4 bits"
    side = fct.PackedInt4(np.stack([np.frombuffer(x, np.uint8) for x in old["side_info"].to_pylist()]), 16).codes()
    vectors = np.stack(old["embedding"].to_numpy(zero_copy_only=False))
    expected = ref.transform(vectors, side, h)
    got = np.stack(new["embedding"].to_numpy(zero_copy_only=False))
    np.testing.assert_allclose(got, expected, atol=0.06)  # "auto" may have taken a faster precision


@pytest.mark.slow
def test_same_seed_same_table(run: Any, data_root: Path, tmp_path: Path) -> None:
    again = run_quickstart(tmp_path / "again", data_root=data_root, seed=5, config=SHORT, progress=False)

    def numbers(table: ResultTable) -> Any:
        return [(r.name, r.cmc1, r.cmc5, r.map, r.recall10) for r in table.rows]

    assert numbers(again.table) == numbers(run.table)
    assert pq.read_table(tmp_path / "again" / "gallery-new").equals(pq.read_table(run.files["new gallery"]))


def test_a_bad_h_is_not_recommended(data_root: Path, tmp_path: Path) -> None:
    hopeless = FitConfig(inner=8, epochs=1, batch_size=512, lr=1e-9)
    config = QuickstartConfig(dim=16, old_epochs=2, new_epochs=3, queries=80, side_dim=16, fit=hopeless)
    report = run_quickstart(tmp_path / "bad", data_root=data_root, config=config, progress=False)
    assert not report.verdict.migrate
    assert report.verdict.sentence.startswith("Do not migrate: new/old, h with side-info does not beat old/old")


def test_backfill_refuses_another_models_gallery(run: Any, tmp_path: Path) -> None:
    h = fct.Transformation.random(16, 16, 16, inner=8)
    with pytest.raises((BackfillError, SpaceMismatchError), match=r"random-old"):
        upgrade_gallery(run.files["old gallery"], tmp_path / "new", h, progress=False)
    assert not list(tmp_path.iterdir())


def test_backfill_refuses_a_truncated_gallery(run: Any, tmp_path: Path) -> None:
    (tmp_path / "cut.parquet").write_bytes(run.files["old gallery"].read_bytes()[:-100])
    h = fct.Transformation.load(run.files["h"])
    with pytest.raises(FctError, match=r"cut\.parquet"):
        upgrade_gallery(tmp_path / "cut.parquet", tmp_path / "new", h, progress=False)
    assert not (tmp_path / "new").exists()


def test_the_backfill_is_the_product(run: Any) -> None:
    report = fct.verify_gallery(run.files["new gallery"], source=run.files["old gallery"])
    assert report.proven
    assert report.rows_out == report.compared == report.source_rows == 120
    assert set(report.checksums) == {"id", "label"}


def test_the_costs_are_those_of_these_models(run: Any) -> None:
    h = fct.Transformation.load(run.files["h"])
    assert run.table.facts["h, MFLOP an item"] == round(h.flop_per_row / 1e6, 3)
    assert any("ResNet-50" in note and "by arithmetic" in note for note in run.table.notes)
    convolution = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(256, 10))
    assert model_flop(convolution, np.zeros((1, 1, 8, 8), np.float32)) == 2 * (8 * 8 * 4 * 9 + 256 * 10)


def command(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main(["quickstart", *args])
    return int(left.value.code or 0), capsys.readouterr().err


def test_the_command_refuses_an_output_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    code, err = command(["--out", str(tmp_path)], capsys)
    assert code == 1
    assert err.startswith(f"error: --out: {tmp_path} exists; choose another place or pass --overwrite")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_names_missing_and_truncated_images(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = command(["--out", str(tmp_path / "a"), "--data-root", str(tmp_path)], capsys)
    assert code == 1
    assert "expected train-images-idx3-ubyte" in err
    for file in data_root.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:1000])
    code, err = command(["--out", str(tmp_path / "b"), "--data-root", str(tmp_path)], capsys)
    assert code == 1
    assert "train-images-idx3-ubyte.gz" in err
    assert err.count("\n") == 1
