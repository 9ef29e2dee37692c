"""The stages of an experiment: each leaves its output and its settings behind, and is skipped when both are there."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fct
from fct.atomic_files import atomic_path, write_text
from fct.errors import ArtifactError
from fct.fit.backbones import embedding_model
from fct.fit.recipes import FitConfig
from fct.fit.supervised import make_head
from fct.life.experiment import Experiment
from fct.life.experiment_data import data_fingerprint, load_splits, plain_images
from fct.life.stages import Classifier, SpaceNames, Stages, Stopwatch
from fct.life.table_stage import SECONDS, Spent, Vectors, measure
from fct.report import ResultTable, Row
from fct.terminal import PlainConsole
from fct.transform import transform_batch
from fct.types import Floats

__all__ = ["run_experiment"]

_VERSION = 1  # of the stages: raised when the same settings would give another output
_TRAINED = ("old", "side-info", "new", "bct", "h")  # each with a seed of its own


def run_experiment(
    experiment: Experiment,
    data_root: str | os.PathLike[str] | None,
    out: str | os.PathLike[str] = "fct-reproduce",
    *,
    overwrite: bool = False,
    device: str = "auto",
    workers: int = 0,
    progress: bool = True,
    console: PlainConsole | None = None,
) -> ResultTable:
    """Runs every stage that has not run yet: old, side-info, new, bct, h, evaluation.

    ``out/NAME/STAGE/stage.json`` tells each stage's settings, seconds and fingerprint (settings, data and the stages
    before it). A stage that was interrupted goes on from its last checkpoint.

    Args:
        experiment: from :func:`fct.life.load_experiment`.
        data_root: the data set's folder; None for the subset of Fashion-MNIST that comes with fct.
        out: where the stages' folders go.
        overwrite: run a stage again whose settings or data have changed, instead of refusing.
        workers: processes that read images, for folders.

    Returns:
        The table, which is also in ``out/NAME/evaluation/`` as table.md and table.json.

    Raises:
        FileExistsError: a stage is there with other settings, and ``overwrite`` is False. FileNotFoundError,
        ArtifactError, ValueError: the data is not there or not what it should be.
    """
    return _Run(experiment, data_root, Path(out), overwrite, device, workers, progress, console or PlainConsole()).all()


class _Run:
    def __init__(
        self,
        experiment: Experiment,
        data_root: str | os.PathLike[str] | None,
        out: Path,
        overwrite: bool,
        device: str,
        workers: int,
        progress: bool,
        console: PlainConsole,
    ) -> None:
        self.experiment, self.overwrite, self.device = experiment, overwrite, device
        self.progress, self.console = progress, console
        self.folder = out / experiment.name
        train, self.test = load_splits(experiment, data_root)
        name = experiment.name
        names = SpaceNames(old=f"{name}-old", side_model=f"{name}-{experiment.side_plan.method}", new=f"{name}-new")
        self.stages = Stages(
            experiment=experiment, images=train, names=names, device=device, workers=workers, progress=progress
        )
        self.seeds = {stage: 10 * experiment.seed + i for i, stage in enumerate(_TRAINED)}
        self.fingerprints: dict[str, str] = {"data": data_fingerprint(train, self.test)}
        self.seconds: dict[str, dict[str, float]] = {}

    def all(self) -> ResultTable:
        e = self.experiment
        seed = self.seeds
        common = {"normalise": e.normalise, "device": self.device}
        self._stage(
            "old", {**asdict(e.old), "old_classes": e.old_classes, "seed": seed["old"], **common}, ["data"], self._old
        )
        self._stage(
            "side-info",
            {**asdict(e.side_plan), "old_classes": e.old_classes, "seed": seed["side-info"], **common},
            ["data"],
            self._side_info,
        )
        self._stage("new", {**asdict(e.new), "seed": seed["new"], **common}, ["data"], self._new)
        self._stage("bct", {**asdict(e.bct_plan), "seed": seed["bct"], **common}, ["data", "old"], self._bct)
        self._stage("h", {**_recipe(e.fit_config), "seed": seed["h"], **common}, ["old", "side-info", "new"], self._h)
        self._stage("evaluation", {"title": e.title}, ["old", "new", "bct", "h"], self._evaluation)
        return ResultTable.from_dict(json.loads((self.folder / "evaluation" / "table.json").read_text()))

    # ---- stages ----
    def _stage(
        self, name: str, settings: Mapping[str, object], after: list[str], run: Callable[[Path, int], dict[str, float]]
    ) -> None:
        """Runs ``run(folder, seed)``, unless its output is there with these very settings."""
        identity = [_VERSION, name, dict(settings), [self.fingerprints[stage] for stage in after]]
        fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.fingerprints[name] = fingerprint
        folder = self.folder / name
        done = _read_stage(folder / "stage.json")
        if done and done["fingerprint"] != fingerprint and not self.overwrite:
            raise FileExistsError(
                f"stage {name}: {folder} was made with other settings or other data; pass --overwrite to make it "
                "again, or choose another --out"
            )
        if done and done["fingerprint"] == fingerprint and all((folder / file).is_file() for file in done["files"]):
            self.seconds[name] = done["seconds"]
            self.console.print(f"{name}: there already", style="dim", highlight=False)
            return
        if done:
            for file in ("stage.json", "checkpoint.safetensors", "checkpoint-without.safetensors"):
                (folder / file).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        began = _read_stage(folder / "begun.json")
        if not began or began["fingerprint"] != fingerprint:  # a checkpoint of other settings is no start
            for checkpoint in folder.glob("checkpoint*.safetensors"):
                checkpoint.unlink()
        begun = {"fingerprint": fingerprint, "seconds": {}, "files": []}
        write_text(folder / "begun.json", json.dumps(begun))
        self.console.print(name, style="bold", highlight=False)
        self.seconds[name] = run(folder, self.seeds.get(name, 0))
        (folder / "begun.json").unlink()
        written = {
            "fingerprint": fingerprint,
            "settings": settings,
            "seconds": self.seconds[name],
            "files": sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")),
        }
        write_text(folder / "stage.json", json.dumps(written, indent=2) + "\n")

    def _old(self, folder: Path, seed: int) -> dict[str, float]:
        def train(checkpoint: Path) -> Classifier:
            return self.stages.old_model(seed, describe=folder.name, checkpoint=checkpoint)

        return self._trained(folder, train, self.experiment.old.image_size)

    def _side_info(self, folder: Path, seed: int) -> dict[str, float]:
        def train(checkpoint: Path) -> nn.Module:
            return self.stages.side_model(seed, checkpoint=checkpoint)

        return self._trained(folder, train, self.experiment.side_plan.image_size)

    def _new(self, folder: Path, seed: int) -> dict[str, float]:
        def train(checkpoint: Path) -> Classifier:
            return self.stages.new_model(seed, describe=folder.name, checkpoint=checkpoint)

        return self._trained(folder, train, self.experiment.new.image_size)

    def _bct(self, folder: Path, seed: int) -> dict[str, float]:
        def train(checkpoint: Path) -> Classifier:
            return self.stages.bct_model(self._old_model(), seed, describe=folder.name, checkpoint=checkpoint)

        return self._trained(folder, train, self.experiment.bct_plan.image_size, pairs=False)

    def _trained(
        self, folder: Path, train: Callable[[Path], Classifier | nn.Module], size: int, *, pairs: bool = True
    ) -> dict[str, float]:
        """Writes the model, train.npy (the pairs that h is fitted on) and test.npy; gives the seconds."""
        watch = Stopwatch()
        with watch.timed("train"):
            trained = train(folder / "checkpoint.safetensors")
        if isinstance(trained, Classifier):
            model: nn.Module = trained.model
            _save(folder / "model.safetensors", {"model": model, "head": trained.head})
        else:
            model = trained
            _save(folder / "model.safetensors", {"model": model})
        for split, images in (("train", self.stages.images), ("test", self.test)):
            if split == "train" and not pairs:
                continue
            with watch.timed(f"embed {split}"):
                vectors = self.stages.embed(model, images, size, progress=self.progress)
                _save_npy(folder / f"{split}.npy", vectors)
        return watch.seconds

    def _h(self, folder: Path, seed: int) -> dict[str, float]:
        """h with and without side-information, and the test split's old vectors in the new space by each.

        They are mapped in memory: the paper's numbers are of h, not of a gallery's format.
        """
        watch = Stopwatch()
        old, side, new = (self._vectors(stage, "train") for stage in ("old", "side-info", "new"))
        for suffix, side_info in (("", side), ("-without", None)):
            with watch.timed(f"fit{suffix}"):
                checkpoint = folder / f"checkpoint{suffix}.safetensors"
                h = self.stages.fit(old, side_info, new, seed, checkpoint=checkpoint)
                h.save(folder / f"h{suffix}.safetensors")
            with watch.timed(f"transform{suffix}"):
                test_side = None if side_info is None else self._vectors("side-info", "test")
                _save_npy(folder / f"gallery{suffix}.npy", transform_batch(self._vectors("old", "test"), test_side, h))
        return watch.seconds

    def _evaluation(self, folder: Path, seed: int) -> dict[str, float]:
        """Every test image asks for all the others."""
        begun = time.perf_counter()
        old, new, bct = (self._vectors(stage, "test") for stage in ("old", "new", "bct"))
        upgraded, without = (_load_npy(self.folder / "h" / f"gallery{name}.npy") for name in ("", "-without"))
        measured = measure(
            Vectors(old, old),
            Vectors(bct, bct),
            Vectors(new, new),
            upgraded,
            without,
            self._spent(),
            self.test.labels,
            None,
            k=min(10, len(self.test) - 1),
            progress=self.progress,
        )
        table = self._table(measured.rows)
        write_text(folder / "table.json", table.to_json())
        write_text(folder / "table.md", table.to_markdown())
        return {"all": time.perf_counter() - begun}

    def _spent(self) -> Spent:
        s = self.seconds
        without = s["old"]["embed train"] + s["new"]["embed train"]
        return Spent(
            new=s["new"]["train"],
            bct=s["bct"]["train"],
            pairs=without + s["side-info"]["embed train"],
            pairs_without=without,
            fit=s["h"]["fit"],
            fit_without=s["h"]["fit-without"],
            rewrite=s["h"]["transform"],
            rewrite_without=s["h"]["transform-without"],
            again_new=s["new"]["embed test"],
            again_bct=s["bct"]["embed test"],
        )

    def _table(self, rows: tuple[Row, ...]) -> ResultTable:
        e = self.experiment
        return ResultTable(
            rows,
            title=e.title,
            notes=(
                f"{len(self.test):,} test images of {self.stages.classes} classes, each a query against all the "
                f"others; the old model knows {e.old_classes} classes. Shares in per cent.",
                f"Seconds: {SECONDS}.",
            ),
            facts={
                "experiment": e.to_dict(),
                "training images": len(self.stages.images),
                "test images": len(self.test),
                "fct": fct.__version__,
                "torch": torch.__version__,
                "device": self.device,
                "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
                "stages, seconds": {k: {a: round(b, 2) for a, b in v.items()} for k, v in self.seconds.items()},
            },
        )

    def _vectors(self, stage: str, split: str) -> Floats:
        return _load_npy(self.folder / stage / f"{split}.npy")

    def _old_model(self) -> Classifier:
        plan = self.experiment.old
        channels = plain_images(self.test.take(slice(0, 1)), plan.image_size).shape[0]
        model = embedding_model(plan.backbone, dim=plan.dim, image_shape=(channels, plan.image_size, plan.image_size))
        head = make_head(plan.loss, plan.dim, self.experiment.old_classes)
        path = self.folder / "old" / "model.safetensors"
        try:
            nn.ModuleDict({"model": model, "head": head}).load_state_dict(load_file(str(path)))
        except Exception as error:  # safetensors and torch each have their own
            raise ArtifactError(f"stage old: expected its model in {path}: {error}") from error
        return Classifier(model, head)


def _recipe(config: str | FitConfig) -> dict[str, object]:
    return {"recipe": config} if isinstance(config, str) else config.to_dict()


class _Done(TypedDict):
    """What a stage left behind about itself."""

    fingerprint: str
    seconds: dict[str, float]
    files: list[str]


def _read_stage(path: Path) -> _Done | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        return _Done(fingerprint=found["fingerprint"], seconds=found["seconds"], files=found["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"stage: expected what a stage wrote in {path}: {error}; remove its folder") from error


def _save(path: Path, modules: dict[str, nn.Module]) -> None:
    tensors = nn.ModuleDict(modules).state_dict()
    with atomic_path(path) as part:
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, str(part))


def _save_npy(path: Path, vectors: Floats) -> None:
    with atomic_path(path) as part, open(part, "wb") as file:
        np.save(file, vectors, allow_pickle=False)


def _load_npy(path: Path) -> Floats:
    vectors: Floats = np.load(path, mmap_mode="r", allow_pickle=False)
    return vectors
