"""Where a gallery keeps its space: in the Arrow schema's metadata, or in a JSON side file where there is no schema."""

from __future__ import annotations

import json
import os
from typing import Any

import pyarrow as pa

from fct.errors import FctError
from fct.gallery.location import Location, location_of
from fct.spaces import EmbeddingSpace

__all__ = ["SIDE_FILE", "SPACE_KEY", "side_file_space", "space_of_schema", "tag_space", "with_space"]

SPACE_KEY = b"fct.space"
SIDE_FILE = "space.json"


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
    """The space in ``<file>.space.json`` or in ``space.json`` in its folder (in the folder itself for a folder)."""
    for place in (file.at(f"{file.path}.{SIDE_FILE}"), file / SIDE_FILE, file.parent / SIDE_FILE):
        try:
            text = place.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            continue
        return _parse(text, str(place))
    return None


def _parse(text: bytes, what: str) -> EmbeddingSpace:
    try:
        return EmbeddingSpace.from_dict(json.loads(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise FctError(f"{what}: expected a space (model_id, dim, metric, normalised) as JSON, got {error}") from error


def tag_space(gallery: str | os.PathLike[str], space: EmbeddingSpace, **location: Any) -> None:
    """Writes down which model made a gallery's vectors, in a side file: nothing else is touched.

    Args:
        gallery: a folder (``space.json`` is written in it) or one file (``<file>.space.json`` beside it).
        space: the model, dimension, metric and whether vectors have unit length.
        location: ``filesystem`` or ``storage_options`` for a gallery that is not on this machine.

    Example:
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
    file = place / SIDE_FILE if place.is_folder() else place.at(f"{place.path}.{SIDE_FILE}")
    file.write_bytes(json.dumps(space.to_dict(), sort_keys=True).encode())
