"""Where a gallery keeps its space: in the Arrow schema's metadata, or in a JSON side file where there is no schema.

Side files lie in ``_fct/``, beside the journal: readers of a whole folder (pandas, pyarrow, Spark) pass over names that
begin with an underscore, and stumble over any other file that is no data.
"""

from __future__ import annotations

import json
import os

import pyarrow as pa
from typing_extensions import Unpack

from fct.errors import FctError
from fct.gallery.location import Location, location_of
from fct.gallery.urls import without_query
from fct.spaces import EmbeddingSpace
from fct.types import Access

__all__ = [
    "OURS",
    "SIDE_FILE",
    "SPACE_KEY",
    "side_file_space",
    "space_of_schema",
    "tag_space",
    "with_space",
    "write_side_file",
]

SPACE_KEY = b"fct.space"
SIDE_FILE = "space.json"
OURS = "_fct"  # the folder of everything beside the data


def with_space(schema: pa.Schema, space: EmbeddingSpace) -> pa.Schema:
    """The schema, its metadata naming ``space``."""
    metadata = dict(schema.metadata or {})
    metadata[SPACE_KEY] = json.dumps(space.to_dict(), sort_keys=True).encode()
    return schema.with_metadata(metadata)


def space_of_schema(schema: pa.Schema, what: str) -> EmbeddingSpace | None:
    """The space in the schema's metadata, or None. Raises FctError when it is there but cannot be read."""
    text = (schema.metadata or {}).get(SPACE_KEY)
    return None if text is None else _parse(text, what)


def side_file_space(file: Location) -> EmbeddingSpace | None:
    """The space that a side file gives a file, a folder or a pattern: its own, else that of the folder around it.

    Version 0.1 wrote ``<file>.space.json`` and ``<folder>/space.json`` among the data; those are read too.
    """
    if without_query(file.path) != file.path:
        return None  # a signed URL is of one file
    around = file.parent
    while any(c in around.path for c in "*?[") and not around.exists():
        around = around.parent
    own = f"{file.name}.{SIDE_FILE}"
    new = (file.parent / OURS / own, file / OURS / SIDE_FILE, around / OURS / SIDE_FILE)
    old = (file.parent / own, file / SIDE_FILE, around / SIDE_FILE)
    for place in (place for pair in zip(new, old, strict=True) for place in pair):
        try:
            text = place.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            continue
        return _parse(text, str(place))
    return None


def _parse(text: bytes, what: str) -> EmbeddingSpace:
    try:
        return EmbeddingSpace.from_dict(json.loads(text))
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise FctError(f"{what}: expected a space (model_id, dim, metric, normalised) as JSON, got {error}") from error


def tag_space(gallery: str | os.PathLike[str], space: EmbeddingSpace, **location: Unpack[Access]) -> None:
    """Writes down which model made a gallery's vectors, in a side file: nothing else is touched.

    Args:
        gallery: a folder (``_fct/space.json`` is written in it), or one file (``_fct/<file>.space.json`` beside it).
        space: the model, dimension, metric and whether vectors have unit length.
        location: ``filesystem`` or ``storage_options`` for a gallery that is not on this machine.

    Examples:
        >>> import fct, numpy as np, tempfile
        >>> from fct.gallery import tag_space
        >>> folder = tempfile.mkdtemp()
        >>> np.save(folder + "/a.npy", np.zeros((3, 8), np.float32))
        >>> tag_space(folder, fct.EmbeddingSpace("resnet18", 8))
    """
    if not isinstance(space, EmbeddingSpace):
        raise TypeError(f"space: expected an fct.EmbeddingSpace, got {type(space).__name__}")
    place = location_of(gallery, name="gallery", **location)
    if not place.exists():
        raise FileNotFoundError(f"gallery: expected a folder or a file, found none at {place}")
    if place.is_folder():
        write_side_file(place, space)
    else:
        write_side_file(place.parent, space, place.name)


def write_side_file(folder: Location, space: EmbeddingSpace, file: str = "") -> None:
    """Tags a folder, or one file in it."""
    place = folder / OURS / (f"{file}.{SIDE_FILE}" if file else SIDE_FILE)
    if folder.is_local and os.path.islink(place.parent.path):
        raise FctError(f"gallery: {place.parent} is a link, and a gallery's own files are not followed elsewhere")
    place.write_bytes(json.dumps(space.to_dict(), sort_keys=True).encode())
