"""Pairs of old and new vectors, as fit, plan and backfill take them: an .npz, or a gallery with a column for each."""

from __future__ import annotations

import os
from typing import IO

import numpy as np
from typing_extensions import Unpack

from fct.checks import check_path
from fct.gallery.array_argument import load_labels, load_vectors
from fct.gallery.columns import SIDE_NAMES, pick_column
from fct.gallery.stores import open_source
from fct.types import Access, JsonDict

__all__ = ["load_pairs"]

_LABELS = ("labels", "label")


def load_pairs(location: str | os.PathLike[str], *, name: str = "pairs", **access: Unpack[Access]) -> JsonDict:
    """The arrays of a set of pairs: row i of each is the same item.

    Args:
        location: an ``.npz`` with arrays ``old``, ``new`` and perhaps ``side`` and ``labels``, or whatever
            :func:`fct.gallery.open_source` takes with columns of these names (``label`` and ``side_info`` too).
        name: the argument or option that this is, for messages.
        access: ``filesystem``, ``storage_options``, ``retry_policy`` of :func:`fct.gallery.open_source`.

    Returns:
        By name, those that are there: old (n, d_old), new (n, d_new), side (n, d_side), labels (n,).

    Raises:
        FileNotFoundError: nothing there. ValueError: a damaged archive, no old or new, a row that is no vector.

    Examples:
        >>> import numpy as np, tempfile
        >>> from fct.gallery import load_pairs
        >>> file = tempfile.mkdtemp() + "/pairs.npz"
        >>> np.savez(file, old=np.zeros((3, 8), np.float32), new=np.zeros((3, 4), np.float32))
        >>> {name: rows.shape for name, rows in load_pairs(file).items()}
        {'old': (3, 8), 'new': (3, 4)}
    """
    if os.fspath(location).endswith(".npz") and "://" not in os.fspath(location):
        return _archive(location, name)
    source = open_source(location, name=name, **access)
    names = source.schema.names
    missing = [n for n in ("old", "new") if n not in names]
    if missing:
        raise ValueError(
            f"{name}: expected columns old and new, and perhaps side and labels, {source.url} has {', '.join(names)}"
        )
    found = {n: load_vectors(source, name=name, column=n) for n in ("old", "new")}
    if side := pick_column(source.schema, "auto", SIDE_NAMES, name):
        found["side"] = load_vectors(source, name=name, column=side)
    if labels := next((n for n in _LABELS if n in names), ""):
        found["labels"] = load_labels(source, name=name, column=labels)
    return found


def _archive(location: str | os.PathLike[str], name: str) -> JsonDict:
    path = check_path(location, name, "the path of an .npz")
    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected an .npz file, found none at {path}")
    try:
        with open(path, "rb") as opened:
            return _members(opened)
    except _Damaged as error:
        raise ValueError(f"{name}: expected a whole .npz of arrays, {path} is not: {error}") from error


class _Damaged(Exception):
    """What the archive's parser said."""


def _members(opened: IO[bytes]) -> JsonDict:
    try:
        with np.load(opened, allow_pickle=False) as file:
            return {n: file[n] for n in file.files}
    except Exception as error:  # zip's and numpy's parsers of a damaged archive raise what they like
        raise _Damaged(str(error) or type(error).__name__) from error
