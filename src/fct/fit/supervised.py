"""Supervised embedding models: cross-entropy with label smoothing, or ArcFace."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fct.checks import check_choice
from fct.fit.backbones import EmbeddingModel, embedding_model
from fct.fit.images import Images, ImagesLike, as_images, augment
from fct.fit.loop import TrainConfig, train
from fct.types import LabelsLike

__all__ = ["LOSSES", "ArcFaceHead", "SoftmaxHead", "make_head", "train_supervised"]

LOSSES = ("softmax", "arcface")


class SoftmaxHead(nn.Module):
    """A linear classifier with cross-entropy and label smoothing."""

    def __init__(self, dim: int, classes: int, smoothing: float = 0.1) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, classes)
        self.smoothing = smoothing

    @property
    def prototypes(self) -> torch.Tensor:
        """(classes, dim): what an embedding of each class points to."""
        return self.linear.weight

    @property
    def offsets(self) -> torch.Tensor:
        """(classes,)"""
        return self.linear.bias

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.linear(embeddings).float(), labels, label_smoothing=self.smoothing)


class ArcFaceHead(nn.Module):
    """Additive angular margin on cosine logits (Deng et al., CVPR 2019, arXiv:1801.07698)."""

    def __init__(self, dim: int, classes: int, margin_degrees: float = 28.6, scale: float = 32.0) -> None:
        super().__init__()
        from pytorch_metric_learning.losses import ArcFaceLoss

        self.loss = ArcFaceLoss(classes, dim, margin=margin_degrees, scale=scale)

    @property
    def prototypes(self) -> torch.Tensor:
        weight: torch.Tensor = self.loss.W
        return weight.T

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.loss(embeddings.float(), labels)
        return out


def make_head(loss: str, dim: int, classes: int) -> SoftmaxHead | ArcFaceHead:
    check_choice(loss, "loss", LOSSES)
    return SoftmaxHead(dim, classes) if loss == "softmax" else ArcFaceHead(dim, classes)


def train_supervised(
    images: ImagesLike,
    labels: LabelsLike | None = None,
    *,
    classes: int,
    backbone: str | nn.Module = "small_cnn",
    dim: int = 128,
    loss: str = "softmax",
    config: TrainConfig | None = None,
    crop: float = 0.85,
    flip: bool = True,
    progress: bool = True,
    describe: str = "training the model",
    **more: Any,
) -> tuple[EmbeddingModel, SoftmaxHead | ArcFaceHead]:
    """An embedding model and its classifier.

    Args:
        images, labels: as :class:`fct.fit.images.Images`; labels from 0 to classes - 1.
        classes: how many there are.
        backbone, dim: as :func:`fct.fit.backbones.embedding_model`.
        loss: "softmax" (cross-entropy, label smoothing 0.1) or "arcface".
        config: epochs, batch size, learning rate, seed, device.
        crop, flip: augmentation; smallest crop side as a share of the image, and mirrored images.
        more: checkpoint, checkpoint_seconds, on_epoch of :func:`fct.fit.loop.train`.

    Examples:
        >>> import numpy as np
        >>> from fct.fit.loop import TrainConfig
        >>> from fct.fit.supervised import train_supervised
        >>> x, y = np.zeros((8, 28, 28), np.uint8), np.arange(8) % 2
        >>> model, head = train_supervised(x, y, classes=2, dim=8, config=TrainConfig(epochs=1), progress=False)
        >>> model.dim
        8
    """
    source, settings = as_images(images, labels), config or TrainConfig()
    model = embedding_model(backbone, dim=dim, image_shape=source.shape, seed=settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + 1)
        head = make_head(loss, dim, classes)
    fit_classifier(model, head, None, source, classes, settings, crop, flip, progress, describe, **more)
    return model, head


def fit_classifier(
    model: EmbeddingModel,
    head: nn.Module,
    influence: nn.Module | None,
    source: Images,
    classes: int,
    config: TrainConfig,
    crop: float,
    flip: bool,
    progress: bool,
    describe: str,
    **more: Any,
) -> list[float]:
    """Trains model and head in place; ``influence``, a frozen head, adds its loss on the same embeddings."""
    if source.labels is not None:
        low, high = int(source.labels.min()), int(source.labels.max())
        if low < 0 or high >= classes:
            raise ValueError(f"labels: expected values from 0 to {classes - 1}, got {low} to {high}")
    mean, deviation = source.statistics()
    model.mean.copy_(mean)
    model.deviation.copy_(deviation)
    if influence is not None:
        influence.requires_grad_(False)
        influence.to(config.torch_device())

    def loss(x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        if y is None:
            raise ValueError("labels: expected labels with the images, got none")
        z = model(augment(x, crop=crop, colour=0.0, flip=flip).contiguous(memory_format=torch.channels_last))
        value: torch.Tensor = head(z, y)
        return value if influence is None else value + influence(z, y)

    modules = nn.ModuleDict({"model": model, "head": head})
    return train(modules, loss, source, config, describe=describe, progress=progress, **more)
