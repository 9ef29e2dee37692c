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
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fct
from fct.atomic_files import atomic_path, write_text
from fct.data import ImageFolder, ImageSet, first_classes, load_cifar100, load_fashion_mnist, load_image_folder
from fct.errors import ArtifactError
from fct.fit.backbones import EmbeddingModel, embedding_model
from fct.fit.bct import train_bct
from fct.fit.images import Images, embed
from fct.fit.recipes import FitConfig
from fct.fit.side_info import train_side_info
from fct.fit.supervised import ArcFaceHead, SoftmaxHead, make_head, train_supervised
from fct.fit.transformation_fit import fit_transformation
from fct.life.experiment import Experiment, ModelPlan
from fct.metrics import evaluate, recall_at_k
from fct.report import ResultTable, Row
from fct.search import topk
from fct.spaces import EmbeddingSpace
from fct.terminal import PlainConsole
from fct.transform import transform_batch

__all__ = ["run_experiment"]

WITH, WITHOUT = "new/old, h with side-info", "new/old, h without side-info"
_VERSION = 1  # of the stages: raised when the same settings would give another output
_SECONDS = (
    "Seconds: from the day the new training data is there to a searchable gallery: training the model that asks, "
    "embedding the pairs, fitting h, and rewriting the gallery, by h from stored vectors or by a network from images."
)


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
        self.workers, self.progress, self.console = workers, progress, console
        self.folder = out / experiment.name
        self.train, self.test = _load(experiment, data_root)
        self.classes = len(self.train.class_names)
        if experiment.old_classes > self.classes:
            raise ValueError(
                f"old_classes: expected at most the {self.classes} that the data has, got {experiment.old_classes}"
            )
        self.old_train = self.train.of_classes(first_classes(self.classes, experiment.old_classes))
        self.fingerprints: dict[str, str] = {"data": _data_fingerprint(self.train, self.test)}
        self.seconds: dict[str, dict[str, float]] = {}

    def all(self) -> ResultTable:
        e = self.experiment
        seed = {name: 10 * e.seed + i for i, name in enumerate(("old", "side-info", "new", "bct", "h"))}
        common = {"normalise": e.normalise, "device": self.device}
        self._stage(
            "old", {**asdict(e.old), "old_classes": e.old_classes, "seed": seed["old"], **common}, ["data"], self._old
        )
        self._stage(
            "side-info",
            {**asdict(e.side_info), "old_classes": e.old_classes, "seed": seed["side-info"], **common},
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
        self, name: str, settings: Mapping[str, Any], after: list[str], run: Callable[[Path, int], dict[str, float]]
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
        self.seconds[name] = run(folder, int(settings.get("seed", 0)))
        (folder / "begun.json").unlink()
        written = {
            "fingerprint": fingerprint,
            "settings": settings,
            "seconds": self.seconds[name],
            "files": sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")),
        }
        write_text(folder / "stage.json", json.dumps(written, indent=2) + "\n")

    def _old(self, folder: Path, seed: int) -> dict[str, float]:
        return self._supervised(folder, self.experiment.old, self.old_train, self.experiment.old_classes, seed)

    def _new(self, folder: Path, seed: int) -> dict[str, float]:
        return self._supervised(folder, self.experiment.new, self.train, self.classes, seed)

    def _supervised(self, folder: Path, plan: ModelPlan, images: Any, classes: int, seed: int) -> dict[str, float]:
        begun = time.perf_counter()
        model, head = train_supervised(
            self._training(images, plan.image_size),
            classes=classes,
            backbone=plan.backbone,
            dim=plan.dim,
            loss=plan.loss,
            config=plan.train_config(seed, self.device),
            crop=self._crop(),
            progress=self.progress,
            describe=folder.name,
            checkpoint=folder / "checkpoint.safetensors",
        )
        trained = time.perf_counter() - begun
        _save(folder / "model.safetensors", {"model": model, "head": head})
        return {"train": trained, **self._embed(folder, model, plan.image_size)}

    def _side_info(self, folder: Path, seed: int) -> dict[str, float]:
        plan, begun = self.experiment.side_info, time.perf_counter()
        model = train_side_info(
            self._training(self.old_train, plan.image_size),
            method=plan.method,
            dim=plan.dim,
            backbone=plan.backbone,
            epochs=plan.epochs,
            batch_size=plan.batch_size,
            lr=plan.lr,
            seed=seed,
            device=self.device,
            progress=self.progress,
            checkpoint=folder / "checkpoint.safetensors",
        )
        trained = time.perf_counter() - begun
        _save(folder / "model.safetensors", {"model": model})
        return {"train": trained, **self._embed(folder, model, plan.image_size)}

    def _bct(self, folder: Path, seed: int) -> dict[str, float]:
        plan, begun = self.experiment.bct_plan, time.perf_counter()
        old_model, old_head = self._old_model()
        model, head = train_bct(
            self._training(self.train, plan.image_size),
            classes=self.classes,
            old_model=old_model,
            old_head=old_head,
            old_images=self._plain(self.train, self.experiment.old.image_size),
            backbone=plan.backbone,
            loss=plan.loss,
            config=plan.train_config(seed, self.device),
            crop=self._crop(),
            progress=self.progress,
            describe=folder.name,
            checkpoint=folder / "checkpoint.safetensors",
        )
        trained = time.perf_counter() - begun
        _save(folder / "model.safetensors", {"model": model, "head": head})
        return {"train": trained, **self._embed(folder, model, plan.image_size, pairs=False)}

    def _h(self, folder: Path, seed: int) -> dict[str, float]:
        e, seconds = self.experiment, {}
        old, side, new = (self._vectors(stage, "train") for stage in ("old", "side-info", "new"))
        spaces = {
            f"{stage}_space": EmbeddingSpace(f"{e.name}-{stage}", plan.dim, normalised=e.normalise)
            for stage, plan in (("old", e.old), ("new", e.new))
        }
        for suffix, side_info in (("", side), ("-without", None)):
            begun = time.perf_counter()
            h = fit_transformation(
                old,
                side_info,
                new,
                config=e.fit_config,
                seed=seed,
                device=self.device,
                progress=self.progress,
                checkpoint=folder / f"checkpoint{suffix}.safetensors",
                old_space=spaces["old_space"],
                new_space=spaces["new_space"],
                side_model=f"{e.name}-{e.side_info.method}",
            )
            h.save(folder / f"h{suffix}.safetensors")
            seconds[f"fit{suffix}"] = time.perf_counter() - begun
            begun = time.perf_counter()
            test_side = None if side_info is None else self._vectors("side-info", "test")
            _save_npy(folder / f"gallery{suffix}.npy", transform_batch(self._vectors("old", "test"), test_side, h))
            seconds[f"transform{suffix}"] = time.perf_counter() - begun
        return seconds

    def _evaluation(self, folder: Path, seed: int) -> dict[str, float]:
        begun, spent = time.perf_counter(), self.seconds
        old, new, bct = (self._vectors(stage, "test") for stage in ("old", "new", "bct"))
        galleries = {name: _load_npy(self.folder / "h" / f"gallery{name}.npy") for name in ("", "-without")}
        new_train = spent["new"]["train"]
        pairs = sum(spent[stage]["embed train"] for stage in ("old", "side-info", "new"))
        without = pairs - spent["side-info"]["embed train"]
        systems: list[tuple[str, Any, Any, float | None]] = [
            ("old/old", old, old, None),
            ("BCT new/old", bct, old, spent["bct"]["train"]),
            ("BCT new/new", bct, bct, spent["bct"]["train"] + spent["bct"]["embed test"]),
            (
                WITHOUT,
                new,
                galleries["-without"],
                new_train + without + spent["h"]["fit-without"] + spent["h"]["transform-without"],
            ),
            (WITH, new, galleries[""], new_train + pairs + spent["h"]["fit"] + spent["h"]["transform"]),
            ("new/new", new, new, new_train + spent["new"]["embed test"]),
        ]
        truth = topk(new, new, self._k(), same_items=True, progress=self.progress).indices
        rows = []
        for name, queries, gallery, seconds in systems:
            found = topk(queries, gallery, self._k(), same_items=True, progress=self.progress).indices
            measured = evaluate(
                queries, gallery, self.test.labels, same_items=True, bootstrap=0, progress=self.progress
            )
            recall = recall_at_k(found, truth, self._k())
            rows.append(Row(name, measured.cmc1, measured.cmc5, measured.map, recall, seconds))
        e = self.experiment
        table = ResultTable(
            tuple(rows),
            title=e.title,
            notes=(
                f"{len(self.test):,} test images of {self.classes} classes, each a query against all the others; the "
                f"old model knows {e.old_classes} classes. Shares in per cent.",
                _SECONDS,
            ),
            facts={
                "experiment": e.to_dict(),
                "training images": len(self.train),
                "test images": len(self.test),
                "fct": fct.__version__,
                "torch": torch.__version__,
                "device": self.device,
                "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
                "stages, seconds": {k: {a: round(b, 2) for a, b in v.items()} for k, v in spent.items()},
            },
        )
        write_text(folder / "table.json", table.to_json())
        write_text(folder / "table.md", table.to_markdown())
        return {"all": time.perf_counter() - begun}

    # ---- images and vectors ----
    def _k(self) -> int:
        return min(10, len(self.test) - 1)

    def _crop(self) -> float:
        """In-memory images are cropped a little in training; files were cropped when they were read."""
        return 0.85 if isinstance(self.train, ImageSet) else 1.0

    def _plain(self, images: ImageSet | ImageFolder, size: int) -> Images:
        if isinstance(images, ImageSet):
            small = images.resized(size)
            return Images(small.images, small.labels)
        return Images(images.with_(size=size, random_crop=False), workers=self.workers)

    def _training(self, images: ImageSet | ImageFolder, size: int) -> Images:
        if isinstance(images, ImageSet):
            return self._plain(images, size)
        return Images(images.with_(size=size, random_crop=True), workers=self.workers)

    def _embed(self, folder: Path, model: nn.Module, size: int, pairs: bool = True) -> dict[str, float]:
        """Writes train.npy (the pairs that h is fitted on) and test.npy; gives the seconds."""
        seconds = {}
        for split, images in (("train", self.train), ("test", self.test)):
            if split == "train" and not pairs:
                continue
            begun = time.perf_counter()
            vectors = embed(model, self._plain(images, size), progress=self.progress)
            if self.experiment.normalise:
                vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
            _save_npy(folder / f"{split}.npy", vectors)
            seconds[f"embed {split}"] = time.perf_counter() - begun
        return seconds

    def _vectors(self, stage: str, split: str) -> Any:
        return _load_npy(self.folder / stage / f"{split}.npy")

    def _old_model(self) -> tuple[EmbeddingModel, SoftmaxHead | ArcFaceHead]:
        plan = self.experiment.old
        channels = self._plain(self.test.take(slice(0, 1)), plan.image_size).shape[0]
        model = embedding_model(plan.backbone, dim=plan.dim, image_shape=(channels, plan.image_size, plan.image_size))
        head = make_head(plan.loss, plan.dim, self.experiment.old_classes)
        path = self.folder / "old" / "model.safetensors"
        try:
            nn.ModuleDict({"model": model, "head": head}).load_state_dict(load_file(str(path)))
        except Exception as error:  # safetensors and torch each have their own
            raise ArtifactError(f"stage old: expected its model in {path}: {error}") from error
        return model, head


def _recipe(config: str | FitConfig) -> dict[str, Any]:
    return {"recipe": config} if isinstance(config, str) else config.to_dict()


def _load(experiment: Experiment, root: Any) -> tuple[ImageSet | ImageFolder, ImageSet | ImageFolder]:
    plan = experiment.data
    if root is None and plan.set != "fashion-mnist":
        raise ValueError(f"--data-root: expected the folder of the images of {experiment.name}, got none")
    if plan.set == "fashion-mnist":
        return load_fashion_mnist("train", root), load_fashion_mnist("test", root)
    if plan.set == "cifar-100":
        return load_cifar100("train", root), load_cifar100("test", root)
    train = load_image_folder(root, plan.train)
    if plan.held_out is not None:
        rng = np.random.default_rng(experiment.seed)
        held = np.zeros(len(train), bool)
        for label in range(len(train.class_names)):
            rows = np.flatnonzero(train.labels == label)
            if len(rows) <= plan.held_out:
                raise ValueError(
                    f"data.held_out: expected fewer than the {len(rows)} images of {train.class_names[label]!r}, "
                    f"got {plan.held_out}"
                )
            held[rng.permutation(rows)[: plan.held_out]] = True
        return train.take(~held), train.take(held)
    test = load_image_folder(root, plan.test)
    if test.class_names != train.class_names:
        odd = sorted(set(test.class_names) ^ set(train.class_names))
        raise ValueError(f"data: expected the same classes in {plan.train} and {plan.test}, got only in one: {odd[:5]}")
    return train, test


def _data_fingerprint(*parts: ImageSet | ImageFolder) -> str:
    """Of labels and of images: their bytes in memory, or their files' names and sizes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part.class_names).encode())
        digest.update(np.ascontiguousarray(part.labels).tobytes())
        if isinstance(part, ImageSet):
            digest.update(np.ascontiguousarray(part.images).data)
        else:
            for file in part.files:
                digest.update(f"{file.parent.name}/{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()


def _read_stage(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        return {key: found[key] for key in ("fingerprint", "seconds", "files")}
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"stage: expected what a stage wrote in {path}: {error}; remove its folder") from error


def _save(path: Path, modules: dict[str, nn.Module]) -> None:
    tensors = nn.ModuleDict(modules).state_dict()
    with atomic_path(path) as part:
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, str(part))


def _save_npy(path: Path, vectors: Any) -> None:
    with atomic_path(path) as part, open(part, "wb") as file:
        np.save(file, vectors, allow_pickle=False)


def _load_npy(path: Path) -> Any:
    return np.load(path, mmap_mode="r", allow_pickle=False)
