"""Backward-compatible training: the paper's baseline, a new model that is made to fit the old gallery.

Source: Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020, arXiv:2003.11942.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fct.fit.backbones import EmbeddingModel, embedding_model
from fct.fit.images import Images, ImagesLike, as_images, embed
from fct.fit.loop import TrainConfig
from fct.fit.supervised import ArcFaceHead, SoftmaxHead, fit_classifier, make_head
from fct.types import LabelsLike

__all__ = ["old_classifier_for", "train_bct"]


def old_classifier_for(
    old_model: EmbeddingModel, old_head: SoftmaxHead | ArcFaceHead, source: Images, classes: int
) -> nn.Module:
    """The old classifier for all new classes: those it never saw get the mean old embedding as their prototype.

    Section 3.4 of the source ("synthesized classifier"); the means are brought to the old prototypes' mean length.
    """
    old = old_head.prototypes.detach().cpu()
    head = type(old_head)(old.shape[1], classes)
    sums, counts = torch.zeros(classes, old.shape[1]), torch.zeros(classes)
    for x, y in source.batches(1024):
        if y is None:
            raise ValueError("labels: expected labels with the images, got none")
        sums.index_add_(0, y, torch.from_numpy(embed(old_model, x)))
        counts.index_add_(0, y, torch.ones(len(y)))
    prototypes = sums / counts.clamp_min(1)[:, None]
    length = old.norm(dim=1).mean() / prototypes.norm(dim=1, keepdim=True).clamp_min(1e-12)
    prototypes = prototypes * length
    prototypes[: len(old)] = old
    with torch.no_grad():
        if isinstance(head, SoftmaxHead):
            assert isinstance(old_head, SoftmaxHead)
            bias = old_head.offsets.detach().cpu()
            head.linear.weight.copy_(prototypes)
            head.linear.bias.fill_(float(bias.mean()))
            head.linear.bias[: len(bias)] = bias
        else:
            head.loss.W.copy_(prototypes.T)
    return head


def train_bct(
    images: ImagesLike,
    labels: LabelsLike | None = None,
    *,
    classes: int,
    old_model: EmbeddingModel,
    old_head: SoftmaxHead | ArcFaceHead,
    old_images: ImagesLike | None = None,
    backbone: str | nn.Module = "small_resnet",
    loss: str = "softmax",
    config: TrainConfig | None = None,
    crop: float = 0.85,
    flip: bool = True,
    progress: bool = True,
    describe: str = "training the BCT model",
    **more: Any,
) -> tuple[EmbeddingModel, SoftmaxHead | ArcFaceHead]:
    """A new embedding model whose vectors can be compared with the old model's, and its classifier.

    Its loss is the new classifier's plus the *influence loss*, the old classifier's on the new embeddings; so its
    embeddings have the old ones' length. The old classes are the first of the new ones.

    Args:
        old_model, old_head: as :func:`fct.fit.supervised.train_supervised` gave them.
        old_images: the same images with the same labels as the old model reads them, where its size is another.
        The others: as there.
    """
    source, settings = as_images(images, labels), config or TrainConfig()
    known = int(old_head.prototypes.shape[0])
    if classes < known:
        raise ValueError(f"classes: expected at least the {known} that the old model knows, got {classes}")
    model = embedding_model(backbone, dim=old_model.dim, image_shape=source.shape, seed=settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + 1)
        head = make_head(loss, old_model.dim, classes)
        known_images = source if old_images is None else as_images(old_images)
        influence = old_classifier_for(old_model, old_head, known_images, classes)
    fit_classifier(model, head, influence, source, classes, settings, crop, flip, progress, describe, **more)
    return model, head
