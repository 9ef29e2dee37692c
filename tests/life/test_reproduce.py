"""Experiments: every YAML that comes with fct runs all stages on generated data of its shape; resuming; refusals."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fct
from fct.fit.bct import train_bct
from fct.fit.recipes import paper_config
from fct.life import Experiment, experiment_names, load_experiment, run_experiment
from fct.terminal import PlainConsole

ROWS = [
    "old/old",
    "BCT new/old",
    "BCT new/new",
    "new/old, h without side-info",
    "new/old, h with side-info",
    "new/new",
]


def shrunk(experiment: Experiment, classes: int) -> Experiment:
    """One epoch, small images and vectors; the networks, losses and methods are the experiment's own."""
    small = experiment.with_epochs(1)
    size: dict[str, Any] = {"image_size": 32, "dim": 8, "batch_size": 12}
    return replace(
        small,
        old_classes=classes // 2,
        old=replace(small.old, **size),
        new=replace(small.new, **size),
        side_info=replace(small.side_plan, **size),
        h={**paper_config().to_dict(), "inner": 16, "batch_size": 8},
    )


def write_folder(root: Path, splits: dict[str, int], classes: list[str]) -> None:
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (36, 48, 3), dtype=np.uint8)).save(folder / f"{i:04}.jpg")


def write_cifar(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, n in (("train", 32), ("test", 16)):
        batch = {b"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), b"fine_labels": [i % 4 for i in range(n)]}
        (root / split).write_bytes(pickle.dumps(batch, protocol=2))
    (root / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"a", b"b", b"c", b"d"]}, protocol=2))


DATA = {
    "imagenet": lambda root: write_folder(
        root, {"train": 6, "val": 3}, ["n01440764", "n01443537", "n01484850", "n0149"]
    ),
    "places": lambda root: write_folder(root, {"train": 6, "val": 3}, ["a/airfield", "b/bar", "f/field/wild", "z/zoo"]),
    "vggface2": lambda root: write_folder(root, {"train": 26}, ["n000002", "n000003", "n000004", "n000005"]),
    "cifar": write_cifar,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in experiment_names() if not n.startswith("fashion")])
def test_the_large_experiments_run_an_epoch(tmp_path: Path, name: str) -> None:
    DATA[name.partition("-")[0]](tmp_path)
    out = tmp_path / "out"
    table = run_experiment(
        shrunk(load_experiment(name), 4), tmp_path, out, progress=False, console=PlainConsole(quiet=True)
    )
    assert [row.name for row in table.rows] == ROWS
    assert table.row("new/new").recall10 == 1.0
    h = fct.Transformation.load(out / name / "h" / "h.safetensors")
    assert (h.d_old, h.d_side, h.d_new) == (8, 8, 8)


def tiny() -> Experiment:
    small = load_experiment("fashion-mnist-arcface").with_epochs(1)
    return replace(small, h={**paper_config().to_dict(), "inner": 16, "batch_size": 32})


@pytest.fixture
def small_fashion(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The embedded images, 12 of each class for training and 6 for testing."""
    from fct.data import load_fashion_mnist
    from fct.life import experiment_data

    def load(split: str, root: Any = None) -> Any:
        whole = load_fashion_mnist(split, root)
        each = 12 if split == "train" else 6
        return whole.take(np.concatenate([np.flatnonzero(whole.labels == c)[:each] for c in range(10)]))

    monkeypatch.setattr(experiment_data, "load_fashion_mnist", load)


def test_stages_are_skipped_redone_and_refused(tmp_path: Path, small_fashion: Any) -> None:
    def go(experiment: Experiment, **options: Any) -> tuple[Any, list[str]]:
        console = PlainConsole(record=True, quiet=False, file=open(tmp_path / "log", "w"))  # noqa: SIM115
        table = run_experiment(experiment, None, tmp_path / "out", progress=False, console=console, **options)
        lines = [line for line in console.export_text().split("\n") if line]
        return table, [line for line in lines if "there already" not in line]

    stages = ["old", "side-info", "new", "bct", "h", "evaluation"]
    folder = tmp_path / "out" / "fashion-mnist-arcface"
    first, ran = go(tiny())
    assert ran == stages
    assert [row.name for row in first.rows] == ROWS
    assert json.loads((folder / "evaluation" / "table.json").read_text())["rows"][0]["name"] == "old/old"
    again, ran = go(tiny())
    assert ran == []
    assert again == first

    (folder / "h" / "h.safetensors").unlink()  # an output that is gone is made again, from the same vectors
    _, ran = go(tiny())
    assert ran == ["h"]

    changed = replace(tiny(), new=replace(tiny().new, lr=1e-3))
    with pytest.raises(FileExistsError, match=r"stage new: .*made with other settings .* pass --overwrite"):
        go(changed)
    other, ran = go(changed, overwrite=True)
    assert ran == ["new", "bct", "h", "evaluation"]
    assert other.row("old/old").map == first.row("old/old").map
    assert other.row("new/new").map != first.row("new/new").map


def test_an_interrupted_stage_goes_on(tmp_path: Path, small_fashion: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fct.life import stages

    real = train_bct

    def stopped(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    quiet = PlainConsole(quiet=True)
    monkeypatch.setattr(stages, "train_bct", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(tiny(), None, tmp_path, progress=False, console=quiet)
    assert not (tmp_path / tiny().name / "bct" / "stage.json").exists()
    kept = (tmp_path / tiny().name / "new" / "test.npy").stat().st_mtime_ns
    monkeypatch.setattr(stages, "train_bct", real)
    run_experiment(tiny(), None, tmp_path, progress=False, console=quiet)
    assert (tmp_path / tiny().name / "new" / "test.npy").stat().st_mtime_ns == kept


def test_every_experiment_says_what_it_is() -> None:
    assert {"fashion-mnist-5-to-10", "imagenet-500-to-1k", "places-182-to-365"} <= set(experiment_names())
    for name in experiment_names():
        assert load_experiment(name).name == name


GOOD = """
name: x
title: X
data: {set: folder}
old_classes: 2
old: {backbone: small_cnn, image_size: 28, epochs: 1}
side_info: {backbone: small_cnn, image_size: 28, epochs: 1}
new: {backbone: small_cnn, image_size: 28, epochs: 1}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("old_classes: 2", "old_classes: 0", r"old_classes: expected a positive int, got 0"),
        ("old_classes: 2", "", r"missing 1 required positional argument: 'old_classes'"),
        ("old_classes: 2", "old_clases: 2", r"expected some of .*, got old_clases"),
        ("epochs: 1}\nside", "epoch: 1}\nside", r"old: expected some of .*, got epoch"),
        ("{set: folder}", "{set: mnist}", r"data.set: expected one of fashion-mnist, .*, got 'mnist'"),
        ("{set: folder}", "3", r"data: expected a mapping, got 3"),
        ("title: X", "title: X\nbct: {dim: 3}", r"bct.dim: expected none"),
        ("title: X", "title: X\nbct: {los: 3}", r"bct: expected some of .*, got los"),
        ("title: X", "title: X\nh: good", r"config: expected 'auto', 'best', 'paper'"),
        ("epochs: 1}\nside", "epochs: 1, lr: 1e-3}\nside", r"old: lr: expected a positive number .* got '1e-3'"),
        ("title: X", "title: [", r"expected YAML in"),
    ],
)
def test_bad_experiments_are_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(GOOD)
    assert load_experiment(file).old_classes == 2
    assert old in GOOD
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_experiment(file)


def test_missing_experiment_or_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a YAML file or one of .*cifar-50-to-100.*, got 'nope'"):
        load_experiment("nope")
    with pytest.raises(
        ValueError, match=r"--data-root: expected the folder of the images of cifar-50-to-100, got none"
    ):
        run_experiment(load_experiment("cifar-50-to-100"), None, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data: expected the folder"):
        run_experiment(load_experiment("imagenet-500-to-1k"), tmp_path, tmp_path)
    write_folder(tmp_path, {"train": 1, "val": 1}, ["a1", "b1"])
    (tmp_path / "val" / "b1").rename(tmp_path / "val" / "c1")
    with pytest.raises(ValueError, match=r"same classes in train and val, got only in one: \['b1', 'c1'\]"):
        run_experiment(load_experiment("imagenet-500-to-1k"), tmp_path, tmp_path)
