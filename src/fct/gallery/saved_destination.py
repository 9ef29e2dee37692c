"""A backfill of what ``datasets`` saved is a saved dataset again: ``load_from_disk`` opens it, its features kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from fct.gallery.arrow_files import ArrowDestination
from fct.gallery.interfaces import JOB_KEY, VECTOR_KEY, Batches, Shard
from fct.gallery.location import Location
from fct.gallery.saved_dataset import read_state
from fct.spaces import EmbeddingSpace
from fct.types import JsonDict

__all__ = ["SavedDatasetDestination", "saved_info"]

_DESCRIPTIVE = ("citation", "description", "homepage", "license")  # all else in dataset_info.json is of the old files


def saved_info(location: Location) -> JsonDict:
    """dataset_info.json of a saved dataset."""
    return read_state(location / "dataset_info.json")


class SavedDatasetDestination(ArrowDestination):
    """Arrow streams, as ``datasets`` writes them, and at the end state.json and dataset_info.json.

    info: dataset_info.json of the source.
    """

    def __init__(self, location: Location, info: JsonDict) -> None:
        super().__init__(location)
        self._info = dict(info)

    def write_file(self, path: Path, shard: Shard, batches: Batches, files: dict[str, Path]) -> None:
        writer = None
        try:
            for batch in batches:
                writer = writer or pa.ipc.new_stream(str(path), batch.schema)
                writer.write_batch(batch)
        finally:
            if writer is not None:
                writer.close()

    def finish(self, extras: Sequence[object], schema: pa.Schema, space: EmbeddingSpace) -> None:
        files = [name for name in self.location.files() if name.startswith("part-") and name.endswith(self.suffix)]
        metadata = schema.metadata or {}
        state = {
            "_data_files": [{"filename": name} for name in files],
            "_fingerprint": metadata[JOB_KEY].decode()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        info = {name: self._info.get(name) or "" for name in _DESCRIPTIVE}
        features = _features(schema, self._info.get("features"), metadata[VECTOR_KEY].decode())
        if features is not None:
            info["features"] = features
        (self.location / "dataset_info.json").write_bytes(json.dumps(info, indent=2).encode())
        (self.location / "state.json").write_bytes(json.dumps(state, indent=2).encode())


def _features(schema: pa.Schema, old: JsonDict | None, vector: str) -> JsonDict | None:
    """The source's features, the vectors' anew; None, so that ``datasets`` finds them itself, where it had none."""
    if not isinstance(old, dict) or not all(name in old for name in schema.names if name not in (vector, "row")):
        return None
    found = {name: old[name] for name in schema.names if name in old}
    kind = schema.field(vector).type
    if pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return None
    length = kind.list_size if pa.types.is_fixed_size_list(kind) else -1
    spelled = old.get(vector)
    type_ = spelled.get("_type") if isinstance(spelled, dict) else None
    value = {"dtype": "float16" if kind.value_type == pa.float16() else "float32", "_type": "Value"}
    found[vector] = {
        "feature": value,
        "length": length,
        "_type": type_ if type_ in ("List", "Sequence") else "Sequence",
    }
    if "row" in schema.names and "row" not in found:
        found["row"] = {"dtype": "int64", "_type": "Value"}
    return {name: found[name] for name in schema.names}
