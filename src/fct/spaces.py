"""EmbeddingSpace: which model's vectors these are. Two models' vectors are never mixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fct.checks import check_choice, check_flag, check_mapping, check_positive, check_whole
from fct.errors import SpaceMismatchError
from fct.types import JsonDict

__all__ = ["METRICS", "EmbeddingSpace", "check_metric", "check_space"]

METRICS = ("l2", "ip", "cosine")


def check_metric(metric: str, name: str = "metric") -> str:
    """``metric`` itself; raises ValueError unless it is one of "l2", "ip", "cosine"."""
    return check_choice(metric, name, METRICS)


@dataclass(frozen=True, slots=True)
class EmbeddingSpace:
    """A model's embedding space.

    Args:
        model_id: any string that tells one trained model from every other ("resnet50-2024-03", a hash, ...).
        dim: length of a vector.
        metric: how vectors are compared: "l2" (squared), "ip" or "cosine".
        normalised: whether every vector has unit length.
        mapped_length: in a gallery where mapped rows stand among true ones: how many times as long mapped rows are as
            the model's own, which keeps them from crowding those out (docs/fitting.md). It is no other space: queries
            are the model's.

    Examples:
        >>> from fct import EmbeddingSpace
        >>> EmbeddingSpace("clip-b32", 512, metric="cosine", normalised=True).dim
        512
    """

    model_id: str
    dim: int
    metric: str = "l2"
    normalised: bool = False
    mapped_length: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.model_id, str) or not self.model_id:
            raise ValueError(f"model_id: expected a non-empty string, got {self.model_id!r}")
        check_metric(self.metric)
        for name, value in (  # plain ones, where numpy's came: they are written as JSON
            ("dim", check_whole(self.dim, "dim", 1, 2**31 - 1)),
            ("normalised", check_flag(self.normalised, "normalised")),
            ("mapped_length", check_positive(self.mapped_length, "mapped_length")),
        ):
            object.__setattr__(self, name, value)

    def to_dict(self) -> JsonDict:
        """Plain values; mapped_length only where it says something, so that older versions read every plain space."""
        values = asdict(self)
        if self.mapped_length == 1.0:
            del values["mapped_length"]
        return values

    @property
    def plain(self) -> EmbeddingSpace:
        """The model's own space, whatever the length of mapped rows."""
        return replace(self, mapped_length=1.0)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EmbeddingSpace:
        check_mapping(values, "space", "a mapping of model_id, dim, metric and normalised")
        unknown = set(values) - {"model_id", "dim", "metric", "normalised", "mapped_length"}
        if unknown or not {"model_id", "dim"} <= set(values):
            raise ValueError(f"space: expected model_id, dim, metric, normalised; got {sorted(values)}")
        return cls(**values)

    def require_same(self, other: EmbeddingSpace, what: str) -> None:
        """Raises SpaceMismatchError, naming both models, unless ``other`` is this very space.

        A mixed gallery's space is the model's own: only the length of mapped rows tells them apart.
        """
        if self.plain != other.plain:
            raise SpaceMismatchError(f"{what}: expected vectors of {self}, got vectors of {other}")

    def __str__(self) -> str:
        unit = ", normalised" if self.normalised else ""
        mixed = f", mapped rows {self.mapped_length:g} times as long" if self.mapped_length != 1.0 else ""
        return f"{self.model_id!r} ({self.dim}-d, {self.metric}{unit}{mixed})"


def check_space(space: object, name: str) -> EmbeddingSpace | None:
    """``space`` itself; raises TypeError unless it is an EmbeddingSpace or None."""
    if space is not None and not isinstance(space, EmbeddingSpace):
        raise TypeError(f"{name}: expected an fct.EmbeddingSpace or None, got {type(space).__name__}")
    return space
