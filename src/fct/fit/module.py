"""h as a torch module: the paper's two branches and mixer, and how it becomes an artifact."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from fct.artifact.transformation import Layer, Transformation, fold_norm, fold_scaling
from fct.spaces import EmbeddingSpace

__all__ = ["Block", "Scaling", "TransformationModule", "to_transformation"]

# (mean, scale): what was done to an array before the loss, x -> (x - mean) / scale; (d,) each, or scalars.
Scaling = tuple[Any, Any]


class Block(nn.Module):
    """Linear without bias, batch norm, ReLU."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out, bias=False)
        self.norm = nn.BatchNorm1d(d_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu_(self.norm(self.linear(x)))


class TransformationModule(nn.Module):
    """(n, d_old), (n, d_side) -> (n, d_new).

    Branches d -> 2d -> 2 d_new, mixer 4 d_new -> inner -> inner -> d_new; batch norm and ReLU after all but the last
    layer, which has a bias. Source: Ramanujan et al., CVPR 2022, arXiv:2112.02805, section 3.3.
    """

    def __init__(self, d_old: int, d_side: int, d_new: int, inner: int) -> None:
        super().__init__()
        self.old = nn.Sequential(Block(d_old, 2 * d_old), Block(2 * d_old, 2 * d_new))
        self.side = nn.Sequential(Block(d_side, 2 * d_side), Block(2 * d_side, 2 * d_new))
        self.mixer = nn.Sequential(Block(4 * d_new, inner), Block(inner, inner), nn.Linear(inner, d_new))

    def forward(self, old: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mixer(torch.cat([self.old(old), self.side(side)], dim=1))
        return out

    def freeze_norm(self) -> None:
        """Batch norm on its stored statistics from here on; its gain and shift still learn."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()


def to_transformation(
    module: TransformationModule,
    *,
    old_scaling: Scaling,
    side_scaling: Scaling,
    new_scaling: Scaling,
    old_space: EmbeddingSpace,
    new_space: EmbeddingSpace,
    side_model: str | None,
    normalise: bool,
    info: dict[str, Any],
) -> Transformation:
    """Folds batch norm, input scaling and target scaling into float32 layers; the arithmetic is float64."""

    def numpy(tensor: torch.Tensor) -> Any:
        return tensor.detach().cpu().numpy()

    def fold_all(blocks: nn.Sequential) -> list[tuple[Any, Any, bool]]:
        folded: list[tuple[Any, Any, bool]] = []
        for block in blocks:
            if isinstance(block, Block):
                names = ("weight", "bias", "running_mean", "running_var")
                norm = {name: numpy(getattr(block.norm, name)) for name in names}
                folded.append((*fold_norm(numpy(block.linear.weight), norm, block.norm.eps), True))
            elif isinstance(block, nn.Linear):
                folded.append((numpy(block.weight).astype(np.float64), numpy(block.bias).astype(np.float64), False))
        return folded

    old, side, mixer = fold_all(module.old), fold_all(module.side), fold_all(module.mixer)
    old[0] = (*fold_scaling(old[0][0], old[0][1], *old_scaling), True)
    side[0] = (*fold_scaling(side[0][0], side[0][1], *side_scaling), True)
    mean, scale = (np.asarray(part, np.float64) for part in new_scaling)
    gain = np.broadcast_to(scale, mixer[-1][1].shape)
    mixer[-1] = (mixer[-1][0] * gain[:, None], mixer[-1][1] * gain + mean, False)
    return Transformation(
        old=tuple(Layer(*layer) for layer in old),
        side=tuple(Layer(*layer) for layer in side),
        mixer=tuple(Layer(*layer) for layer in mixer),
        old_space=old_space,
        new_space=new_space,
        side_model=side_model,
        normalise=normalise,
        info=info,
    )
