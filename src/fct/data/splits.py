"""Splits by class: the old model knows the first classes only, as in the paper's experiments."""

from __future__ import annotations

__all__ = ["first_classes"]


def first_classes(total: int, share: float | int = 0.5) -> range:
    """The classes that the old model knows: the first ``share`` of ``total``, or the first so many.

    Args:
        total: how many classes there are.
        share: a float below 1 for a share (rounded down, at least 1), an int for a number.

    Examples:
        >>> from fct.data import first_classes
        >>> first_classes(10), first_classes(365, 182)
        (range(0, 5), range(0, 182))
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise TypeError(f"share: expected a number, got {type(share).__name__}")
    count = share if isinstance(share, int) else max(1, int(total * share))
    if not 1 <= count <= total or (isinstance(share, float) and not 0 < share < 1):
        raise ValueError(f"share: expected a share between 0 and 1 or 1 to {total} classes, got {share!r}")
    return range(count)
