"""Whether a gallery's mapped rows meet the new model's own uncorrected: told wherever one is searched or exported."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from fct.artifact.transformation import Transformation
from fct.errors import FctError
from fct.gallery.beside_rows import BesideRows
from fct.gallery.interfaces import TRUE_KEY, Source
from fct.gallery.location import Location, location_of
from fct.gallery.stores import journal_location
from fct.mixed_warning import warn_other_metric, warn_uncorrected

__all__ = ["warn_of_mixed"]

_BATCH = 16384


def warn_of_mixed(source: Source, what: str, *, metric: str | None = None, stacklevel: int = 3) -> bool:
    """Warns where true and mapped rows of a gallery stand side by side and nothing corrects their lengths.

    Args:
        source: the gallery. what: is done with it, for the message. metric: by which its rows are compared; None where
            nobody knows.

    Returns:
        Whether it warned.

    Warns:
        FctWarning: with the loss that was measured when h was fitted, where the gallery keeps h.
    """
    space = source.space
    if space is not None and space.mapped_length != 1.0:
        if metric is None or metric == space.metric:
            return False
        return warn_other_metric(space, metric, what, transformation=_kept_h(source), stacklevel=stacklevel + 1)
    if not _both_kinds(source):
        return False
    return warn_uncorrected(_kept_h(source), what, stacklevel=stacklevel + 1)


def _both_kinds(source: Source) -> bool:
    """Whether a column says that some rows are true and others are not."""
    pieces = source.pieces()
    beside = BesideRows(source, pieces)
    inside = _true_column(source.schema)
    name = inside or _true_column(beside.schema)
    seen: set[bool] = set()
    for piece in pieces if name else ():
        more = None if inside else beside.table(piece)
        parts = (
            more[name].chunks
            if more is not None
            else (batch.column(name) for batch in source.read(piece, 0, piece.rows, _BATCH))
            if inside
            else ()
        )
        for part in parts:
            seen.update(np.unique(np.asarray(part.drop_null().to_numpy(zero_copy_only=False), bool)).tolist())
            if len(seen) == 2:
                return True
    return False


def _true_column(schema: pa.Schema) -> str:
    """The column that a partial backfill wrote; "" where there is none."""
    marked = [f.name for f in schema if pa.types.is_boolean(f.type) and (f.metadata or {}).get(TRUE_KEY)]
    return marked[0] if marked else ""


def _kept_h(source: Source) -> Transformation | None:
    """h as the backfill left it with the gallery; None where it did not, or where it cannot be read."""
    location = getattr(source, "location", None)
    if source.kind == "lance" and "://" not in source.url:
        location = location_of(source.url)
    if not isinstance(location, Location) or not location.is_local:
        return None
    for folder in (location, location.parent):  # a folder, or a file or a pattern in it
        root = journal_location(folder, "lance" if source.kind == "lance" else "")
        try:
            return Transformation.load((root / "transformation.safetensors").local)
        except (FctError, OSError, ValueError):
            continue
    return None
