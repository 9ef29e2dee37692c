"""Side-information: a small vector beside each old embedding, learnt for a future that nobody knows yet.

It cannot be made retroactively. Every method here knows the old images only, and no label but "supervised".
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from fct.checks import check_choice, check_flag, check_path
from fct.fit.backbones import EmbeddingModel, embedding_model
from fct.fit.images import Images, ImagesLike, as_images, augment
from fct.fit.loop import TrainConfig, train
from fct.types import LabelsLike

__all__ = ["METHODS", "barlow_twins_loss", "train_side_info"]

METHODS = ("simclr", "autoencoder", "barlow_twins", "supervised")
_TEMPERATURE = 0.2
_CROP, _COLOUR = 0.55, 0.4


def train_side_info(
    images: ImagesLike,
    *,
    method: str = "simclr",
    dim: int = 128,
    backbone: str | nn.Module = "small_resnet",
    labels: LabelsLike | None = None,
    epochs: int = 60,
    batch_size: int = 256,
    lr: float = 3e-3,
    weight_decay: float = 1e-4,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Learns ψ, which maps images to side-information.

    Args:
        images: the OLD model's training images: (n, h, w) or (n, c, h, w), uint8 or floats from 0 to 1; or a Dataset.
        method: "simclr" (NT-Xent between two views; Chen et al., ICML 2020, arXiv:2002.05709), "barlow_twins"
            (Zbontar et al., ICML 2021, arXiv:2103.03230), "autoencoder" (reconstruction), or "supervised" (an
            intermediate layer of a classifier; needs labels).
        dim: length of the side-information; 128 as in the paper's experiments.
        backbone: as :func:`fct.fit.backbones.backbone`.
        labels: (n,) ints, for "supervised" with arrays.
        epochs, batch_size, lr, weight_decay, seed, device: training, see :class:`fct.fit.loop.TrainConfig`.
        checkpoint: a file to go on from after an interruption.

    Returns:
        A module from images (n, c, h, w) to (n, dim); ``fct.fit.images.embed`` runs it over many.

    Raises:
        TypeError, ValueError: bad images or settings.

    Source: Ramanujan et al., CVPR 2022, arXiv:2112.02805, section 3.2.

    Examples:
        >>> import numpy as np, fct
        >>> images = np.random.default_rng(0).integers(0, 255, (16, 28, 28), dtype=np.uint8)
        >>> side_model = fct.train_side_info(images, dim=8, epochs=1, batch_size=8, progress=False)
        >>> side_model.dim
        8
    """
    check_choice(method, "method", METHODS)
    check_flag(progress, "progress")
    if checkpoint is not None:
        check_path(checkpoint, "checkpoint", "a path or None")
    config = TrainConfig(
        epochs=epochs, batch_size=batch_size, lr=lr, warmup=0.1, weight_decay=weight_decay, seed=seed, device=device
    )
    if method != "supervised" and labels is not None:
        raise ValueError(f"labels: expected None for {method!r}, which learns without labels, got an array")
    source = as_images(images, labels)
    model = embedding_model(backbone, dim=dim, image_shape=source.shape, seed=seed)
    mean, deviation = source.statistics()
    model.mean.copy_(mean)
    model.deviation.copy_(deviation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        extra, loss = _objective(method, model, source)
    modules = nn.ModuleDict({"model": model, "extra": extra})
    train(
        modules,
        loss,
        source,
        config,
        describe=f"side-information ({method})",
        progress=progress,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
    )
    return model


_Loss = Callable[[torch.Tensor, "torch.Tensor | None"], torch.Tensor]


def _objective(method: str, model: EmbeddingModel, source: Images) -> tuple[nn.Module, _Loss]:
    """(what is trained beside the model and then dropped, the loss)."""

    def views(x: torch.Tensor, count: int) -> torch.Tensor:
        parts = [augment(x, crop=_CROP, colour=_COLOUR) for _ in range(count)]
        return torch.cat(parts).contiguous(memory_format=torch.channels_last)

    if method == "supervised":
        return _supervised(model, source, views)
    if method == "autoencoder":
        decoder = _Decoder(model.dim, source.shape)

        def reconstruct(x: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
            target = augment(x, crop=0.85, colour=0.0)
            seen = target + 0.1 * torch.randn_like(target)  # noise in, clean out: copying pixels is not enough
            out = decoder(model(seen.contiguous(memory_format=torch.channels_last)))
            return functional.mse_loss(out.float(), (target - model.mean) / model.deviation)

        return decoder, reconstruct

    head = _projection(model.dim, 64 if method == "simclr" else 512)
    if method == "simclr":
        from pytorch_metric_learning.losses import SelfSupervisedLoss, SupConLoss

        # With one positive per anchor SupCon is NT-Xent; the library's NTXentLoss is cubic in the batch.
        contrast = SelfSupervisedLoss(SupConLoss(temperature=_TEMPERATURE))

        def simclr(x: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
            first, second = head(model(views(x, 2))).float().chunk(2)
            out: torch.Tensor = contrast(first, second)
            return out

        return head, simclr

    def barlow(x: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        first, second = head(model(views(x, 2))).float().chunk(2)
        return barlow_twins_loss(first, second)

    return head, barlow


def _supervised(
    model: EmbeddingModel, source: Images, views: Callable[[torch.Tensor, int], torch.Tensor]
) -> tuple[nn.Module, _Loss]:
    """The embedding is two layers away from the classes, so that it keeps more than what tells them apart."""
    if source.data is not None and source.labels is None:
        raise ValueError("labels: expected (n,) labels for method 'supervised', got None")
    if source.labels is not None:
        classes = int(source.labels.max()) + 1
    else:
        classes = 1 + max(int(y.max()) for _, y in source.batches(1024) if y is not None)
    head = nn.Sequential(nn.ReLU(), nn.Linear(model.dim, model.dim), nn.ReLU(), nn.Linear(model.dim, classes))

    def loss(x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        if y is None:
            raise ValueError("labels: expected labels with the images, got none")
        return functional.cross_entropy(head(model(views(x, 1))).float(), y, label_smoothing=0.1)

    return head, loss


def _projection(dim: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.ReLU(), nn.Linear(dim, 2 * dim), nn.BatchNorm1d(2 * dim), nn.ReLU(), nn.Linear(2 * dim, width)
    )


def barlow_twins_loss(first: torch.Tensor, second: torch.Tensor, weight: float = 5e-3) -> torch.Tensor:
    """Redundancy reduction: the views' cross-correlation matrix is drawn to the identity.

    first, second: (n, d). Source: Zbontar et al., ICML 2021, arXiv:2103.03230, equation 1; no library we use has it.
    """
    a = (first - first.mean(0)) / first.std(0).clamp_min(1e-6)
    b = (second - second.mean(0)) / second.std(0).clamp_min(1e-6)
    correlation = a.T @ b / len(a)
    diagonal = correlation.diagonal()
    off = correlation.square().sum() - diagonal.square().sum()
    return ((1 - diagonal).square().sum() + weight * off) / len(correlation)


class _Decoder(nn.Module):
    """(n, dim) back to (n, c, h, w) normalised images: a linear layer to 4 x 4, doubled until the size is reached."""

    def __init__(self, dim: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        blocks: list[nn.Module] = [nn.Linear(dim, 64 * 16), nn.ReLU(), nn.Unflatten(1, (64, 4, 4))]
        size = 4
        while size < min(max(self.height, self.width), 64):  # a thumbnail says enough about a large image
            blocks += [nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU()]
            size *= 2
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(64, channels, 3, 1, 1))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        size = [self.height, self.width]
        return functional.interpolate(self.blocks(z), size=size, mode="bilinear", align_corners=False)
