"""What an experiment's YAML file says, checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from fct.checks import check_choice, check_positive, shown
from fct.fit.loop import TrainConfig
from fct.fit.recipes import FitConfig, paper_config, resolve_config
from fct.fit.side_info import METHODS
from fct.fit.supervised import LOSSES
from fct.types import JsonDict

__all__ = ["DataPlan", "Experiment", "ModelPlan", "SidePlan", "experiment_names", "load_experiment"]

_FOLDER = Path(__file__).parent / "experiments"
_SETS = ("fashion-mnist", "cifar-100", "folder")
_MOST_BYTES = 1 << 20
_RATE = "a positive number (1.0e-3, not 1e-3, in YAML)"


@dataclass(frozen=True, slots=True)
class DataPlan:
    """set: "fashion-mnist", "cifar-100" or "folder" (train/…/class/image).

    train, test: folders of the two splits, for "folder".
    held_out: images of each class that are taken from the training split for testing, by seed, where the publisher's
        test split has other classes (VGGFace2); None: the test split is used.
    """

    set: str
    train: str = "train"
    test: str = "val"
    held_out: int | None = None

    def __post_init__(self) -> None:
        check_choice(self.set, "data.set", _SETS)
        if self.held_out is not None:
            _positive("data.held_out", self.held_out)


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """An embedding model: what it is, what it reads, how it is trained (see fct.fit.loop.TrainConfig)."""

    backbone: str
    image_size: int
    epochs: int
    dim: int = 128
    loss: str = "softmax"
    batch_size: int = 128
    lr: float = 3e-3
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_choice(self.loss, "loss", LOSSES)
        for name in ("image_size", "epochs", "dim", "batch_size"):
            _positive(name, getattr(self, name))
        check_positive(self.lr, "lr", _RATE)

    def train_config(self, seed: int, device: str) -> TrainConfig:
        return TrainConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            seed=seed,
            device=device,
        )


@dataclass(frozen=True, slots=True)
class SidePlan:
    """The side-information model, as fct.train_side_info trains it on the old model's images."""

    backbone: str
    image_size: int
    epochs: int
    method: str = "simclr"
    dim: int = 128
    batch_size: int = 256
    lr: float = 3e-3

    def __post_init__(self) -> None:
        check_choice(self.method, "method", METHODS)
        for name in ("image_size", "epochs", "dim", "batch_size"):
            _positive(name, getattr(self, name))
        check_positive(self.lr, "lr", _RATE)


@dataclass(frozen=True, slots=True)
class Experiment:
    """One upgrade, from the first model to the table.

    old_classes: the old model knows the first so many.
    side_info: the model that makes it; None: the old model itself does (fct.side_info_from), as in the quickstart.
    bct: what differs from ``new`` in the model that is trained to fit the old gallery; its dim is the old one's.
    h: "paper", "auto", or a mapping of fct.fit.recipes.FitConfig's fields.
    normalise: whether embeddings are brought to unit length before they are stored and compared.
    """

    name: str
    title: str
    data: DataPlan
    old_classes: int
    old: ModelPlan
    side_info: SidePlan | None
    new: ModelPlan
    bct: Mapping[str, object] = field(default_factory=dict)
    h: str | Mapping[str, object] = "paper"
    normalise: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _positive("old_classes", self.old_classes)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed: expected an int of at least 0, got {shown(self.seed)}")
        _ = self.bct_plan, self.fit_config  # refused now rather than hours into the run

    @property
    def bct_plan(self) -> ModelPlan:
        if "dim" in self.bct:
            raise ValueError("bct.dim: expected none, BCT's dim is the old model's")
        return _build(ModelPlan, {**asdict(self.new), **self.bct, "dim": self.old.dim}, "bct")

    @property
    def side_plan(self) -> SidePlan:
        """``side_info``, where a model is to be trained for it. Raises ValueError where there is none."""
        if self.side_info is None:
            raise ValueError("side_info: expected the model that makes it, got none")
        return self.side_info

    @property
    def fit_config(self) -> str | FitConfig:
        """What fct.fit_transformation takes as ``config``."""
        if isinstance(self.h, str):
            resolve_config(self.h)
            return self.h
        return _build(FitConfig, self.h, "h")

    def with_epochs(self, epochs: int) -> Experiment:
        """The same with so many epochs everywhere: a rehearsal."""
        _positive("epochs", epochs)
        fit = paper_config() if isinstance(self.fit_config, str) else self.fit_config
        fit = replace(fit, epochs=epochs, warmup_epochs=min(fit.warmup_epochs, epochs / 2))
        return replace(
            self,
            old=replace(self.old, epochs=epochs),
            new=replace(self.new, epochs=epochs),
            side_info=None if self.side_info is None else replace(self.side_info, epochs=epochs),
            bct={**self.bct, "epochs": epochs},
            h=fit.to_dict(),
        )

    def to_dict(self) -> JsonDict:
        return asdict(self)


_T = TypeVar("_T")


def _build(kind: type[_T], values: object, context: str) -> _T:
    """A dataclass from a mapping; an unknown or a missing key is named."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{context}: expected a mapping, got {shown(values)}")
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(str(key) for key in values if key not in known):
        raise ValueError(f"{context}: expected some of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{context}: {str(error).partition('__init__() ')[2]}, got {', '.join(values)}") from error
    except ValueError as error:
        raise ValueError(f"{context}: {error}") from error


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive int, got {shown(value)}")


def experiment_names() -> list[str]:
    """The experiments that come with fct.

    Examples:
        >>> from fct.life import experiment_names
        >>> "fashion-mnist-5-to-10" in experiment_names()
        True
    """
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_experiment(file_or_name: str | os.PathLike[str]) -> Experiment:
    """The experiment in a YAML file, or one of those that come with fct by its name.

    Raises:
        FileNotFoundError: neither a file nor a name. ValueError: the file is no experiment, and why.
    """
    import yaml

    path = Path(file_or_name)
    if not path.is_file():
        path = _FOLDER / f"{file_or_name}.yaml"
        if str(file_or_name) not in experiment_names():
            raise FileNotFoundError(
                f"experiment: expected a YAML file or one of {', '.join(experiment_names())}, got {str(file_or_name)!r}"
            )
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"experiment: expected at most {_MOST_BYTES:,} bytes in {path}")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise ValueError(f"experiment: expected YAML in {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"experiment: expected a mapping in {path}, got {type(values).__name__}")
    parts: dict[str, type[Any]] = {"data": DataPlan, "old": ModelPlan, "side_info": SidePlan, "new": ModelPlan}
    try:
        built = {name: _build(kind, values[name], name) for name, kind in parts.items() if name in values}
        return _build(Experiment, {**values, **built}, "experiment")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"experiment: {path} is none: {error}") from error
