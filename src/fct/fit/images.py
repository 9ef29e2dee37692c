"""Training images from arrays or datasets, as shuffled batches; augmentation of a batch, each image on its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch.nn import functional

from fct.progress import step_bar
from fct.types import Array, Floats, LabelsLike

__all__ = ["Images", "as_images", "augment", "embed"]

_SAMPLE = 2048  # images that the channel statistics are taken from


class ImageDataset(Protocol):
    """torch's Dataset, or what is indexed like one: images, or (image, label)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> object: ...


ImagesLike: TypeAlias = "Images | ImageDataset | Array | torch.Tensor"


class Images:
    """Images with or without labels.

    Args:
        images: (n, h, w) or (n, c, h, w), uint8 or floats from 0 to 1, numpy or torch; or a map-style torch Dataset
            that yields image tensors, PIL images or (image, label), all of one size.
        labels: (n,) ints for arrays; a Dataset brings its own.
    """

    def __init__(self, images: ImagesLike, labels: LabelsLike | None = None, *, workers: int = 0) -> None:
        self.dataset: Any = None
        self.data: torch.Tensor | None = None
        self.labels: torch.Tensor | None = None
        self.workers = workers
        if isinstance(images, (np.ndarray, torch.Tensor)):
            if isinstance(images, np.ndarray) and images.dtype.kind not in "fiu":
                raise ValueError(f"images: expected uint8 or floats from 0 to 1, got {images.dtype}")
            if isinstance(images, np.ma.MaskedArray) and np.ma.is_masked(images):
                raise ValueError("images: expected values without a mask, got a masked array; use .filled(...)")
            if isinstance(images, torch.Tensor) and (images.layout != torch.strided or images.is_meta):
                raise ValueError(
                    f"images: expected a dense tensor that holds values, got {images.layout}, {images.device}"
                )
            data = _tensor(images) if isinstance(images, np.ndarray) else images.detach()
            if data.ndim == 3:
                data = data[:, None]
            if data.ndim != 4 or 0 in data.shape:
                raise ValueError(f"images: expected (n, h, w) or (n, c, h, w), got shape {tuple(images.shape)}")
            if data.dtype != torch.uint8 and not data.is_floating_point():
                raise ValueError(f"images: expected uint8 or floats from 0 to 1, got {data.dtype}")
            if data.is_floating_point() and not bool(torch.isfinite(data).all()):
                raise ValueError("images: expected finite values, got NaN or infinity")
            self.data = data
            if labels is not None:
                self.labels = torch.as_tensor(np.asarray(labels)).long()
                if self.labels.shape != (len(data),):
                    raise ValueError(f"labels: expected ({len(data)},), one per image, got {tuple(self.labels.shape)}")
        elif not isinstance(images, (str, bytes)) and hasattr(images, "__getitem__") and hasattr(images, "__len__"):
            if labels is not None:
                raise ValueError("labels: expected None with a Dataset, which brings its own")
            if len(images) == 0:
                raise ValueError("images: expected at least one image, got an empty Dataset")
            self.dataset = images
        else:
            raise TypeError(f"images: expected an array, a tensor or a Dataset, got {type(images).__name__}")

    def __len__(self) -> int:
        return len(self.data if self.data is not None else self.dataset)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w)"""
        image = self.data[0] if self.data is not None else _item(self.dataset[0])[0]
        c, h, w = image.shape
        return c, h, w

    def batches(
        self, size: int, *, seed: tuple[int, int] | None = None, drop_last: bool = False
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """(images, labels or None); in order, or shuffled by (seed, epoch)."""
        order = np.arange(len(self)) if seed is None else np.random.default_rng(seed).permutation(len(self))
        whole = len(self) // size * size if drop_last and len(self) >= size else len(self)
        parts = [order[i : i + size] for i in range(0, whole, size)]
        if self.data is not None:
            for part in parts:
                index = torch.from_numpy(part)
                yield self.data[index], None if self.labels is None else self.labels[index]
            return
        loader = torch.utils.data.DataLoader(
            self.dataset, batch_sampler=[p.tolist() for p in parts], collate_fn=_collate, num_workers=self.workers
        )
        yield from loader

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of each channel, (1, c, 1, 1), of images from 0 to 1."""
        chosen = np.random.default_rng(0).permutation(len(self))[:_SAMPLE]
        if self.data is not None:
            sample = _unit(self.data[torch.from_numpy(chosen)])
        else:
            sample = torch.stack([_unit(_item(self.dataset[int(i)])[0]) for i in chosen[:256]])
        mean = sample.mean(dim=(0, 2, 3), keepdim=True)
        return mean, sample.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-3)


def as_images(images: ImagesLike, labels: LabelsLike | None = None) -> Images:
    """:class:`Images` as it is; anything else is made one."""
    if not isinstance(images, Images):
        return Images(images, labels)
    if labels is not None:
        raise ValueError("labels: expected None with Images, which bring their own")
    return images


def _tensor(array: Array) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to it
        return torch.as_tensor(np.ascontiguousarray(array))


def _unit(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _item(item: object) -> tuple[torch.Tensor, int | None]:
    image, label = item if isinstance(item, (tuple, list)) else (item, None)
    if not isinstance(image, torch.Tensor):
        from torchvision.transforms.v2 import functional as v2

        image = v2.pil_to_tensor(image)
    return image, None if label is None else int(label)


def _collate(items: list[object]) -> tuple[torch.Tensor, torch.Tensor | None]:
    pairs = [_item(item) for item in items]
    labels = None if pairs[0][1] is None else torch.tensor([label for _, label in pairs])
    return torch.stack([image for image, _ in pairs]), labels


def augment(images: torch.Tensor, *, crop: float, colour: float, flip: bool = True) -> torch.Tensor:
    """Random resized crop, horizontal flip, brightness and contrast: drawn for each image on its own.

    torchvision's transforms draw once for a whole batch, and one call per 28 x 28 image costs more than the network;
    so a batch is resampled by one ``grid_sample``. Randomness is torch's global generator.

    Args:
        images: (n, c, h, w), uint8 or floats from 0 to 1.
        crop: smallest side of the crop, as a share of the image; 1.0 for none.
        colour: spread of brightness and contrast; 0.0 for none.
    """
    x = _unit(images)
    n = len(x)
    scale = torch.empty(n).uniform_(crop, 1.0)
    ratio = torch.empty(n).uniform_(-0.2, 0.2).exp() if crop < 1 else torch.ones(n)
    mirror = torch.where(torch.rand(n) < 0.5, -1.0, 1.0) if flip else torch.ones(n)
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0] = (scale * ratio).clamp_max(1) * mirror
    affine[:, 1, 1] = (scale / ratio).clamp_max(1)
    affine[:, :, 2] = (torch.rand(n, 2) * 2 - 1) * (1 - scale)[:, None]
    grid = functional.affine_grid(affine.to(x.device), list(x.shape), align_corners=False)
    x = functional.grid_sample(x, grid, align_corners=False, padding_mode="border")
    if colour:
        gain = torch.empty(n, 1, 1, 1).uniform_(1 - colour, 1 + colour).to(x.device)
        shift = torch.empty(n, 1, 1, 1).uniform_(-colour / 4, colour / 4).to(x.device)
        x = (x * gain + shift).clamp_(0, 1)
    return x


@torch.inference_mode()
def embed(model: torch.nn.Module, images: ImagesLike, *, batch_size: int = 512, progress: bool = False) -> Floats:
    """(n, dim) float32 numpy embeddings of images (as :class:`Images`), in order, on the model's own device.

    Examples:
        >>> import numpy as np
        >>> from fct.fit.backbones import embedding_model
        >>> from fct.fit.images import embed
        >>> embed(embedding_model(dim=8, image_shape=(1, 28, 28)), np.zeros((3, 28, 28), np.uint8)).shape
        (3, 8)
    """
    source = as_images(images)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    steps = -(-len(source) // batch_size)
    with step_bar(progress) as bar:
        batches = bar.track(source.batches(batch_size), steps, description="embedding")
        out = [model(_unit(x).to(device, memory_format=torch.channels_last)).float().cpu() for x, _ in batches]
    model.train(training)
    return torch.cat(out).numpy()
