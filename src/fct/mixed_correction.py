"""What is done to mapped rows that stand among true ones: how long they are, or one coordinate more.

How much depends on how many rows there are. In a larger gallery a query's nearest true rows are nearer, while a mapped
row stays about as far as h errs, so that less is to be mended: what a few hundred held-out rows ask for is too strong
among ten thousand. So a correction knows the rows that chose it, and how it fades beyond them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fct.artifact.transformation import Layer, Transformation
from fct.checks import check_choice, check_flag, check_kind, check_number, check_positive, check_whole
from fct.rows import rows_of
from fct.types import Bools, Floats, RowsLike

__all__ = ["MixedCorrection", "add_coordinate", "correction_of", "last_coordinate", "mixed_transformation"]

_MANY_ROWS = 1_000_000  # taken for the size of a gallery whose size nobody said


@dataclass(frozen=True, slots=True)
class MixedCorrection:
    """What is done to mapped rows, and to them alone.

    kind: "length": they are stored ``value`` times as long. "coordinate": for a store that brings rows to unit length
        itself: they are stored as [value * row, sqrt(1 - value^2)], true rows and queries with a 0 at the end.
    value: 1.0 changes nothing.
    rows: in a gallery of how many rows it was chosen; 0: it is for galleries of every size.
    fade: by how much |log(value)| falls while the gallery's rows grow e times.
    """

    kind: str
    value: float
    rows: int = 0
    fade: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self.kind, "correction.kind", ("length", "coordinate"))
        object.__setattr__(self, "value", check_positive(self.value, "correction.value"))  # numpy's become plain ones
        if self.kind == "coordinate" and self.value > 1:
            raise ValueError(f"correction.value: expected a coordinate of at most 1, got {self.value}")
        object.__setattr__(self, "rows", check_whole(self.rows, "correction.rows", 0))
        object.__setattr__(self, "fade", check_number(self.fade, "correction.fade", 0))

    def at(self, rows: int) -> MixedCorrection:
        """The correction for a gallery of so many rows: never stronger than it was chosen, at last none.

        Examples:
            >>> from fct.mixed_gallery import MixedCorrection
            >>> round(MixedCorrection("length", 0.8, rows=500, fade=0.04).at(5_000).value, 3)
            0.877
        """
        rows = check_whole(rows, "rows", 0)
        strength = abs(np.log(self.value))
        if not self.rows or not strength:
            return MixedCorrection(self.kind, self.value)
        left = strength - self.fade * np.log(max(1.0, rows / self.rows))
        return MixedCorrection(self.kind, float(self.value ** max(0.0, left / strength)))

    def apply(self, mapped: Floats) -> Floats:
        """(n, d) float32 mapped rows as they count beside true ones; the added coordinate is left out, since it meets
        zeros in every query."""
        out: Floats = mapped * np.float32(self.value)
        return out


def last_coordinate(mapped: Floats, true: Bools, value: float) -> Floats:
    """(n, 1): what brings value * row back to the row's own length; 0 for true rows."""
    norms = np.linalg.norm(mapped, axis=1)
    return np.where(true, 0, norms * np.sqrt(max(0.0, 1 - value**2))).astype(np.float32)[:, None]


def add_coordinate(rows: RowsLike, correction: MixedCorrection, *, mapped: bool) -> Floats:
    """Rows with the one coordinate more that a store needs which brings rows to unit length itself.

    Args:
        rows: (n, d) float32 numpy: mapped rows, or true rows or queries.
        correction: of kind "coordinate".
        mapped: whether h made them.

    Returns:
        (n, d + 1) float32. The cosine of a query and a mapped row is ``value`` times what it was.

    Examples:
        >>> import numpy as np
        >>> from fct.mixed_gallery import MixedCorrection, add_coordinate
        >>> add_coordinate(np.array([[0.0, 1.0]], np.float32), MixedCorrection("coordinate", 0.6), mapped=True)
        array([[0. , 0.6, 0.8]], dtype=float32)
    """
    check_kind(correction, "correction", MixedCorrection, "fct.mixed_gallery.MixedCorrection")
    check_flag(mapped, "mapped")
    if correction.kind != "coordinate":
        raise ValueError(f"correction: expected one of kind 'coordinate', got {correction}")
    values = np.asarray(rows_of(rows, "rows").float32())
    last = last_coordinate(values, np.full(len(values), not mapped), correction.value)
    return np.concatenate([correction.apply(values) if mapped else values, last], axis=1)


def correction_of(transformation: Transformation) -> MixedCorrection:
    """The correction that the fit measured and stored in the artifact; its ``at(rows)`` is the one for a gallery.

    Raises:
        ValueError: the artifact holds none: it was fitted before there was one, or by "paper" or numbers of its own.
    """
    check_kind(transformation, "transformation", Transformation, "an fct.Transformation")
    stored: Any = transformation.info.get("mixed")
    try:
        found = stored["correction"]
        rows, fade = int(found.get("rows", 0)), float(found.get("fade", 0.0))  # older artifacts have neither
        return MixedCorrection(str(found["kind"]), float(found["value"]), rows, fade)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(
            "transformation: expected one with a measured correction for mixed galleries (config='auto' or 'best' "
            "measures it), got none; fct.mixed_gallery.choose_correction finds one on held-out pairs"
        ) from error


def mixed_transformation(
    transformation: Transformation, correction: MixedCorrection | None = None, *, rows: int = _MANY_ROWS
) -> Transformation:
    """h that writes mapped rows as they may stand among true ones.

    Args:
        transformation: h. correction: None: the one stored in it. rows: of the gallery; a million unless said, since
            one that is too mild costs less than one that is too strong.

    Raises:
        ValueError: none is stored, or it is a coordinate more, which h cannot write: the message says what to do.

    Examples:
        >>> import fct
        >>> from fct.mixed_gallery import MixedCorrection, mixed_transformation
        >>> h = fct.Transformation.random(8, 4, 16, inner=32, normalise=True)
        >>> mixed_transformation(h, MixedCorrection("length", 0.9)).length
        0.9
    """
    h = check_kind(transformation, "transformation", Transformation, "an fct.Transformation")
    if correction is not None:
        check_kind(correction, "correction", MixedCorrection, "fct.mixed_gallery.MixedCorrection")
    how = (correction or correction_of(h)).at(check_whole(rows, "rows", 1))
    value = check_positive(how.value, "correction")
    if how.kind != "length":
        raise ValueError(
            f"mixed: {h.new_space} is compared by cosine, which ignores the length of a row, and a store that brings "
            "rows to unit length undoes it. Tag the new space with metric='ip' and search by inner product (the same "
            "ranking for unit-length queries), or store rows and queries with one coordinate more "
            "(fct.mixed_gallery.add_coordinate)"
        )
    h = h.with_(new_space=replace(h.new_space, mapped_length=h.new_space.mapped_length * value))
    if h.normalise:
        return h.with_(length=h.length * value)
    last = h.mixer[-1]
    skip = None if h.skip is None else Layer(h.skip.weight * value, h.skip.bias * value, relu=False)
    return h.with_(mixer=(*h.mixer[:-1], Layer(last.weight * value, last.bias * value, last.relu)), skip=skip)
