"""Vectors and labels as the commands take them: what a backfill takes and writes, under the name of the option."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from typing_extensions import Unpack

from fct.errors import FctError
from fct.types import Access, Array

__all__ = ["named_as_options", "named_labels", "named_vectors"]


def named_vectors(location: str, option: str, usual: tuple[str, ...] = (), **access: Unpack[Access]) -> Array:
    """(n, d) of FILE_OR_FOLDER[:COLUMN], a glob or a URL; usual: names that the column may have besides fct's own."""
    from fct.gallery import load_vectors
    from fct.gallery.columns import VECTOR_NAMES

    with named_as_options({"source": option}):
        return load_vectors(location, name=option, usual=(*VECTOR_NAMES, *usual), **access)


def named_labels(location: str, option: str, **access: Unpack[Access]) -> Array:
    """(n,) of FILE_OR_FOLDER:COLUMN, a glob or a URL, or of a flat .npy."""
    from fct.gallery import load_labels

    with named_as_options({"source": option}):
        return load_labels(location, name=option, **access)


@contextlib.contextmanager
def named_as_options(options: Mapping[str, str]) -> Iterator[None]:
    """Errors about an argument of Python name the option that was given for it instead."""
    try:
        yield
    except (ValueError, TypeError, FctError) as error:
        argument, colon, rest = str(error).partition(":")
        if colon and argument in options and type(error) in (ValueError, TypeError, FctError):
            raise type(error)(f"{options[argument]}:{rest}") from error
        raise
