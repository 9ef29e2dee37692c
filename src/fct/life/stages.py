"""The stages of one upgrade: old model, side-information, new model, BCT, pairs, h.

The quickstart and every experiment run these and no others. What differs is the order, what is kept on the disk, and
which images ask and which are asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from fct.artifact.transformation import Transformation
from fct.data import first_classes
from fct.fit.backbones import EmbeddingModel
from fct.fit.bct import train_bct
from fct.fit.images import embed
from fct.fit.side_info import train_side_info
from fct.fit.supervised import ArcFaceHead, SoftmaxHead, train_supervised
from fct.fit.transformation_fit import fit_transformation
from fct.life.experiment import Experiment, ModelPlan
from fct.life.experiment_data import ImageSplit, crop_of, plain_images, training_images
from fct.spaces import EmbeddingSpace
from fct.types import Floats, RowsLike

__all__ = ["Classifier", "SpaceNames", "Stages", "Stopwatch", "vectors_of"]


@dataclass(frozen=True, slots=True)
class Classifier:
    """A model that makes embeddings, and the head that it was trained with."""

    model: EmbeddingModel
    head: SoftmaxHead | ArcFaceHead


@dataclass(frozen=True, slots=True)
class SpaceNames:
    """What the models are called in galleries and in h."""

    old: str
    side_model: str
    new: str


class Stopwatch:
    """Seconds of each stage, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begun


def vectors_of(
    experiment: Experiment,
    model: nn.Module,
    images: ImageSplit,
    size: int,
    *,
    workers: int = 0,
    progress: bool = False,
) -> Floats:
    """(n, dim) float32 of images at (size, size), of unit length where the experiment says so."""
    vectors: Floats = embed(model, plain_images(images, size, workers), progress=progress)
    if experiment.normalise:
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
    return vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The stages that a model or h comes from, each with a seed of its own.

    experiment: what is trained, and how.
    images: the training split; the old model and the side-information see its first classes only.
    names: of the spaces that h leads from and to.
    device, workers, progress: where networks are trained, processes that read image files, whether bars are shown.
    """

    experiment: Experiment
    images: ImageSplit
    names: SpaceNames
    device: str = "cpu"
    workers: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.experiment.old_classes > self.classes:
            raise ValueError(
                f"old_classes: expected at most the {self.classes} that the data has, got {self.experiment.old_classes}"
            )

    @property
    def classes(self) -> int:
        return len(self.images.class_names)

    @property
    def old_images(self) -> ImageSplit:
        """What the past had."""
        return self.images.of_classes(first_classes(self.classes, self.experiment.old_classes))

    @property
    def old_space(self) -> EmbeddingSpace:
        return self._space(self.names.old, self.experiment.old)

    @property
    def new_space(self) -> EmbeddingSpace:
        return self._space(self.names.new, self.experiment.new)

    def _space(self, name: str, plan: ModelPlan) -> EmbeddingSpace:
        return EmbeddingSpace(name, plan.dim, normalised=self.experiment.normalise)

    # ---- the past ----
    def old_model(self, seed: int, *, describe: str = "  old model", checkpoint: Path | None = None) -> Classifier:
        """Trained on the first classes."""
        plan, classes = self.experiment.old, self.experiment.old_classes
        return self._supervised(plan, self.old_images, classes, seed, describe, checkpoint)

    def side_model(self, seed: int, *, checkpoint: Path | None = None) -> nn.Module:
        """Trained on the old model's images."""
        plan = self.experiment.side_plan
        return train_side_info(
            training_images(self.old_images, plan.image_size, self.workers),
            method=plan.method,
            dim=plan.dim,
            backbone=plan.backbone,
            epochs=plan.epochs,
            batch_size=plan.batch_size,
            lr=plan.lr,
            seed=seed,
            device=self.device,
            progress=self.progress,
            checkpoint=checkpoint,
        )

    # ---- the future ----
    def new_model(self, seed: int, *, describe: str = "  new model", checkpoint: Path | None = None) -> Classifier:
        """Trained on every class, under no constraint."""
        return self._supervised(self.experiment.new, self.images, self.classes, seed, describe, checkpoint)

    def bct_model(
        self, old: Classifier, seed: int, *, describe: str = "  BCT model", checkpoint: Path | None = None
    ) -> Classifier:
        """The baseline: a new model that is trained to fit the old gallery."""
        plan = self.experiment.bct_plan
        model, head = train_bct(
            training_images(self.images, plan.image_size, self.workers),
            classes=self.classes,
            old_model=old.model,
            old_head=old.head,
            old_images=plain_images(self.images, self.experiment.old.image_size, self.workers),
            backbone=plan.backbone,
            loss=plan.loss,
            config=plan.train_config(seed, self.device),
            crop=crop_of(self.images),
            progress=self.progress,
            describe=describe,
            checkpoint=checkpoint,
        )
        return Classifier(model, head)

    def _supervised(
        self,
        plan: ModelPlan,
        images: ImageSplit,
        classes: int,
        seed: int,
        describe: str,
        checkpoint: Path | None,
    ) -> Classifier:
        model, head = train_supervised(
            training_images(images, plan.image_size, self.workers),
            classes=classes,
            backbone=plan.backbone,
            dim=plan.dim,
            loss=plan.loss,
            config=plan.train_config(seed, self.device),
            crop=crop_of(self.images),
            progress=self.progress,
            describe=describe,
            checkpoint=checkpoint,
        )
        return Classifier(model, head)

    # ---- vectors ----
    def embed(self, model: nn.Module, images: ImageSplit, size: int, *, progress: bool = False) -> Floats:
        """(n, dim) float32 of images at (size, size), of unit length where the experiment says so."""
        return vectors_of(self.experiment, model, images, size, workers=self.workers, progress=progress)

    def fit(
        self, old: Floats, side_info: RowsLike | None, new: Floats, seed: int, *, checkpoint: Path | None = None
    ) -> Transformation:
        """h, from embeddings of the training images; without side-information where there is none."""
        return fit_transformation(
            old,
            side_info,
            new,
            config=self.experiment.fit_config,
            seed=seed,
            device=self.device,
            progress=self.progress,
            checkpoint=checkpoint,
            old_space=self.old_space,
            new_space=self.new_space,
            side_model=self.names.side_model,
        )
