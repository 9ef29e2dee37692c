"""h as a torch module: the paper's two branches and mixer, and how it becomes an artifact."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fct.artifact.transformation import Layer, Transformation, fold_norm, fold_scaling
from fct.fit.recipes import FitConfig
from fct.spaces import EmbeddingSpace
from fct.types import Floats, JsonDict

__all__ = ["Block", "Scaling", "TransformationModule", "to_transformation"]

# (mean, scale): what was done to an array before the loss, x -> (x - mean) / scale; (d,) each, or scalars.
Scaling = tuple[Floats, Floats]


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

    The paper's: branches d -> 2d -> 2 d_new, mixer 4 d_new -> inner -> inner -> d_new; batch norm and ReLU after all
    but the last layer, which has a bias. ``config`` may ask for one block a branch, other mixers, and a linear path
    from [old, side] (old alone where it takes the side-information's place) beside all of it.
    Source: Ramanujan et al., CVPR 2022, arXiv:2112.02805, section 3.3.

    two_inputs: False where the old embedding takes the side-information's place.
    """

    def __init__(self, d_old: int, d_side: int, d_new: int, config: FitConfig, *, two_inputs: bool = True) -> None:
        super().__init__()
        self.two_inputs = two_inputs
        self.d_inputs = (d_old, d_side)
        wide = config.branch or 2 * d_new
        self.old, self.side = (
            nn.Sequential(Block(d, config.branch))
            if config.branch
            else nn.Sequential(Block(d, 2 * d), Block(2 * d, 2 * d_new))
            for d in (d_old, d_side)
        )
        widths = [2 * wide] + [config.inner] * config.mixer_blocks
        self.mixer = nn.Sequential(*map(Block, widths, widths[1:]), nn.Linear(config.inner, d_new))
        self.skip: nn.Linear | None = None
        if config.skip != "none":
            self.skip = nn.Linear(d_old + (d_side if two_inputs else 0), d_new, bias=False)
            self.skip.weight.requires_grad_(config.skip == "learned")

    def forward(self, old: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mixer(torch.cat([self.old(old), self.side(side)], dim=1))
        if self.skip is not None:
            out = out + self.skip(torch.cat([old, side], dim=1) if self.two_inputs else old)
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
    length: float = 1.0,
    info: JsonDict,
) -> Transformation:
    """Folds batch norm, input scaling and target scaling into float32 layers; the arithmetic is float64."""
    old, side, mixer = _folded(module.old), _folded(module.side), _folded(module.mixer)
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
        length=length,
        skip=_folded_skip(module, (old_scaling, side_scaling), gain),
        info=info,
    )


def _numpy(tensor: torch.Tensor) -> Floats:
    return tensor.detach().cpu().numpy()


def _folded(blocks: nn.Sequential) -> list[tuple[Floats, Floats, bool]]:
    """(weight, bias, whether a ReLU follows) of each layer, batch norm folded in; float64."""
    folded: list[tuple[Floats, Floats, bool]] = []
    for block in blocks:
        if isinstance(block, Block):
            names = ("weight", "bias", "running_mean", "running_var")
            norm = {name: _numpy(getattr(block.norm, name)) for name in names}
            folded.append((*fold_norm(_numpy(block.linear.weight), norm, block.norm.eps), True))
        elif isinstance(block, nn.Linear):
            folded.append((_numpy(block.weight).astype(np.float64), _numpy(block.bias).astype(np.float64), False))
    return folded


def _folded_skip(module: TransformationModule, scalings: tuple[Scaling, Scaling], gain: Floats) -> Layer | None:
    """The skip of unscaled inputs; gain: of each output."""
    if module.skip is None:
        return None
    ends = [
        [np.broadcast_to(np.asarray(x, np.float64), width) for x in scaling]
        for scaling, width in zip(scalings, module.d_inputs[: 1 + module.two_inputs], strict=False)
    ]
    centre, spread = (np.concatenate(parts) for parts in zip(*ends, strict=True))
    weight = _numpy(module.skip.weight).astype(np.float64) * gain[:, None] / spread
    return Layer(weight, -weight @ centre, relu=False)
