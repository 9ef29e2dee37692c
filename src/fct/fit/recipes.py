"""How a transformation is fitted: the paper's recipe, our default, or the user's own numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fct.checks import check_positive

__all__ = ["FitConfig", "auto_config", "paper_config", "resolve_config"]


@dataclass(frozen=True, slots=True)
class FitConfig:
    """Every number of the fit. The defaults are the paper's (Ramanujan et al., CVPR 2022, arXiv:2112.02805).

    inner: width of the mixer's two hidden layers.
    epochs, batch_size: passes over the pairs; rows per step.
    lr, warmup_epochs: peak learning rate; it rises linearly over the warm-up and falls as a cosine to zero.
    weight_decay: Adam's L2 term; decoupled (AdamW) with ``decoupled_decay``.
    freeze_norm_at: share of the epochs after which batch norm runs on its stored statistics (1.0: never).
    standardise: scale inputs (each dimension) and targets (one scale for all) before the loss; folded into h after.
    mixed_precision: bfloat16 products where the processor has them, fp32 elsewhere.
    average: decay per step of an exponential average of the weights that is validated and kept; 0.0 for none.
    validate_every: epochs between validations; the best checkpoint is the one kept.
    """

    inner: int = 2048
    epochs: int = 80
    batch_size: int = 1024
    lr: float = 5e-4
    warmup_epochs: float = 5.0
    weight_decay: float = 3e-5
    decoupled_decay: bool = False
    freeze_norm_at: float = 0.5
    standardise: bool = False
    mixed_precision: bool = False
    average: float = 0.0
    validate_every: int = 1

    def __post_init__(self) -> None:
        for name in ("inner", "epochs", "batch_size", "validate_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value!r}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size: expected at least 2 rows, which batch norm needs, got {self.batch_size}")
        check_positive(self.lr, "lr")
        for name in ("warmup_epochs", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)!r}")
        if not 0 <= self.freeze_norm_at <= 1:
            raise ValueError(f"freeze_norm_at: expected a share from 0 to 1, got {self.freeze_norm_at!r}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average: expected a decay from 0 to below 1, got {self.average!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def paper_config() -> FitConfig:
    """The paper's recipe to the letter."""
    return FitConfig()


def auto_config() -> FitConfig:
    """Our default: scaled data, larger steps, fewer epochs, averaged weights. Measured in docs/fitting.md."""
    return FitConfig(
        epochs=16,
        batch_size=256,
        lr=8e-3,
        warmup_epochs=1.0,
        weight_decay=0.3,
        decoupled_decay=True,
        freeze_norm_at=1.0,
        standardise=True,
        mixed_precision=True,
        average=0.99,
    )


def resolve_config(config: str | FitConfig) -> FitConfig:
    """ "paper", "auto" or a FitConfig; ValueError otherwise."""
    if isinstance(config, FitConfig):
        return config
    if isinstance(config, str) and config == "paper":
        return paper_config()
    if isinstance(config, str) and config == "auto":
        return auto_config()
    raise ValueError(f"config: expected 'auto', 'paper' or a fct.fit.recipes.FitConfig, got {config!r}")
