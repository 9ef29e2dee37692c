"""Networks: built-in small ones, torchvision's and timm's by name, and the embedding model on top of any of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fct.checks import check_whole
from fct.extras import need

__all__ = ["BUILT_IN", "EmbeddingModel", "backbone", "embedding_model"]


def _conv(d_in: int, d_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False), nn.BatchNorm2d(d_out), nn.ReLU(inplace=True))


def _small_cnn(in_channels: int) -> tuple[nn.Module, int]:
    """Three convolutions and two poolings: an old, modest model."""
    layers = (_conv(in_channels, 32), nn.MaxPool2d(2), _conv(32, 64), nn.MaxPool2d(2), _conv(64, 128))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 128


class _Residual(nn.Module):
    def __init__(self, d_in: int, d_out: int, stride: int) -> None:
        super().__init__()
        self.first = _conv(d_in, d_out, stride)
        self.second = nn.Sequential(nn.Conv2d(d_out, d_out, 3, 1, 1, bias=False), nn.BatchNorm2d(d_out))
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or d_in != d_out:
            self.skip = nn.Sequential(nn.Conv2d(d_in, d_out, 1, stride, bias=False), nn.BatchNorm2d(d_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.second(self.first(x)) + self.skip(x))


def _small_resnet(in_channels: int) -> tuple[nn.Module, int]:
    """Seven convolutions with residual connections, a quarter of the resolution from the start."""
    layers = (_conv(in_channels, 32, 2), _Residual(32, 32, 1), _Residual(32, 64, 2), _Residual(64, 128, 2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 128


BUILT_IN = {"small_cnn": _small_cnn, "small_resnet": _small_resnet}


def backbone(name: str | nn.Module, *, in_channels: int = 3) -> tuple[nn.Module, int | None]:
    """(network that maps (n, c, h, w) to features, how many features; None where only a run can tell).

    Args:
        name: "small_cnn" or "small_resnet"; a torchvision classification model ("resnet18", "resnet50",
            "mobilenet_v2", ...); "timm:NAME"; or a module of your own. Never pretrained: the weights are yours.
        in_channels: channels of the images.

    Raises:
        ValueError: unknown name. ImportError: "timm:..." without timm.

    Examples:
        >>> from fct.fit.backbones import backbone
        >>> backbone("small_cnn", in_channels=1)[1]
        128
    """
    if isinstance(name, nn.Module):
        return name, None
    if name in BUILT_IN:
        return BUILT_IN[name](in_channels)
    if name.startswith("timm:"):
        timm = need("timm", "backbone")
        known = name.removeprefix("timm:")
        if not timm.is_model(known):
            raise ValueError(f"backbone: expected a model that timm has, got {known!r}")
        network = timm.create_model(known, pretrained=False, num_classes=0, in_chans=in_channels)
        features: Any = network.num_features
        return network, int(features)
    return _torchvision(name, in_channels)


def _torchvision(name: str, in_channels: int) -> tuple[nn.Module, int]:
    from torchvision import models

    if name not in models.list_models(models):
        raise ValueError(
            f"backbone: expected {', '.join(BUILT_IN)}, a torchvision classification model, 'timm:NAME' or a module, "
            f"got {name!r}"
        )
    network = models.get_model(name, weights=None)
    # Every torchvision classifier ends in one linear layer; what it reads is the features.
    last = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    linear = network.get_submodule(last)
    assert isinstance(linear, nn.Linear)
    width = linear.in_features
    _replace(network, last, nn.Identity())
    if in_channels != 3:
        first = next(path for path, module in network.named_modules() if isinstance(module, nn.Conv2d))
        conv = network.get_submodule(first)
        assert isinstance(conv, nn.Conv2d)
        plain: nn.Conv2d = nn.Conv2d(
            in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            bias=conv.bias is not None,
        )
        _replace(network, first, plain)
    return network, width


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


class EmbeddingModel(nn.Module):
    """Images to embeddings: normalisation, backbone, one linear layer.

    Reads (n, c, h, w), uint8 or floats from 0 to 1; gives (n, dim) float32. The channel means and deviations of the
    training images are part of the model, so that nobody can forget them.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, network: nn.Module, features: int | None, dim: int, channels: int) -> None:
        super().__init__()
        self.backbone = network
        self.embedding = nn.LazyLinear(dim) if features is None else nn.Linear(features, dim)
        self.dim = dim
        self.register_buffer("mean", torch.full((1, channels, 1, 1), 0.5))
        self.register_buffer("deviation", torch.full((1, channels, 1, 1), 0.25))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        out: torch.Tensor = self.embedding(self.backbone((x - self.mean) / self.deviation))
        return out


def embedding_model(
    network: str | nn.Module = "small_cnn",
    *,
    dim: int = 128,
    image_shape: tuple[int, int, int] = (3, 224, 224),
    seed: int = 0,
) -> EmbeddingModel:
    """An untrained :class:`EmbeddingModel`, initialised by seed.

    Args:
        network: as :func:`backbone`.
        dim: length of an embedding.
        image_shape: (c, h, w) of what it will read.

    Examples:
        >>> import torch
        >>> from fct.fit.backbones import embedding_model
        >>> embedding_model("small_resnet", dim=16, image_shape=(1, 28, 28))(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 16])
    """
    check_whole(dim, "dim", 1, 1 << 24)
    if not isinstance(network, (str, nn.Module)):
        raise ValueError(f"backbone: expected a name or a torch module, got {type(network).__name__}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, features = backbone(network, in_channels=image_shape[0])
        model = EmbeddingModel(module, features, dim, image_shape[0])
        with torch.no_grad():
            model.eval()(torch.zeros(1, *image_shape))  # settles lazy sizes, and refuses images it cannot read
    return model
