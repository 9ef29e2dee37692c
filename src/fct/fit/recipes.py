"""How a transformation is fitted: the paper's recipe, ours for any number of pairs, or the user's own numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from fct.checks import check_choice, check_flag, check_positive, check_whole
from fct.types import JsonDict

__all__ = ["RECIPES", "SKIPS", "FitConfig", "paper_config", "resolve_config"]

RECIPES = ("auto", "best", "paper")
SKIPS = ("none", "learned", "ridge")


@dataclass(frozen=True, slots=True)
class FitConfig:
    """Every number of one training of h. The defaults are the paper's (Ramanujan et al., CVPR 2022, arXiv:2112.02805).

    inner: width of the mixer's hidden layers.
    mixer_blocks: how many hidden layers the mixer has.
    branch: width of each branch's one block; 0: the paper's two blocks, 2 d and 2 d_new wide.
    skip: a linear path beside the network. "learned": trained with it; "ridge": the closed-form map, fixed, and the
        network learns what it leaves over; "none".
    epochs, batch_size: passes over the pairs; rows per step.
    lr, warmup_epochs: peak learning rate; it rises linearly over the warm-up and falls as a cosine to zero.
    weight_decay: Adam's L2 term; decoupled (AdamW) with ``decoupled_decay``.
    freeze_norm_at: share of the epochs after which batch norm runs on its stored statistics (1.0: never).
    standardise: scale inputs (each dimension) and targets (one scale for all) before the loss; folded into h after.
    mixed_precision: bfloat16 products where the processor has them, fp32 elsewhere.
    average: decay per step of an exponential average of the weights that is validated and kept; 0.0 for none.
    warm_average: the average begins short, (step + 1) / (step + 10), until it reaches ``average``.
    mixup: pairs are blended with one another, weights from Beta(mixup, mixup); 0.0 for none (Zhang et al., ICLR 2018,
        arXiv:1710.09412).
    validate_every: epochs between validations; the best checkpoint is the one kept.
    """

    inner: int = 2048
    mixer_blocks: int = 2
    branch: int = 0
    skip: str = "none"
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
    warm_average: bool = False
    mixup: float = 0.0
    validate_every: int = 1

    def __post_init__(self) -> None:
        for name in ("inner", "mixer_blocks", "epochs", "batch_size", "validate_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value!r}")
        check_whole(self.branch, "branch", 0)
        check_choice(self.skip, "skip", SKIPS)
        if self.batch_size < 2:
            raise ValueError(f"batch_size: expected at least 2 rows, which batch norm needs, got {self.batch_size}")
        check_positive(self.lr, "lr")
        for name in ("warmup_epochs", "weight_decay", "mixup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)!r}")
        if not 0 <= self.freeze_norm_at <= 1:
            raise ValueError(f"freeze_norm_at: expected a share from 0 to 1, got {self.freeze_norm_at!r}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average: expected a decay from 0 to below 1, got {self.average!r}")
        for name in ("decoupled_decay", "standardise", "mixed_precision", "warm_average"):
            check_flag(getattr(self, name), name)

    def to_dict(self) -> JsonDict:
        return asdict(self)


def paper_config() -> FitConfig:
    """The paper's recipe to the letter."""
    return FitConfig()


def resolve_config(config: str | FitConfig) -> FitConfig | None:
    """The numbers of "paper" or of a FitConfig; None for "auto" and "best", whose numbers follow from the pairs.

    Raises:
        ValueError: neither a name of :data:`RECIPES` nor a FitConfig.
    """
    if isinstance(config, FitConfig):
        return config
    if isinstance(config, str) and config == "paper":
        return paper_config()
    if isinstance(config, str) and config in ("auto", "best"):
        return None
    raise ValueError(f"config: expected 'auto', 'best', 'paper' or a fct.fit.recipes.FitConfig, got {config!r}")
