"""What Hugging Face ``datasets`` saved, as its ``load_from_disk`` reads it: state.json says which files are the rows.

``map``, ``filter`` and ``shuffle`` leave ``cache-*.arrow`` beside them, which are no rows of the dataset.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from fct.errors import FctError
from fct.gallery.arrow_files import ArrowSource
from fct.gallery.discovery import find_files
from fct.gallery.interfaces import Batches, Piece
from fct.gallery.location import Location
from fct.types import JsonDict

__all__ = ["IndexedDatasetSource", "SavedDatasetSource", "open_saved_dataset", "read_state"]


def open_saved_dataset(root: Location, location: Location, name: str) -> ArrowSource:
    """The dataset saved in ``root``. location: ``root`` itself, or a pattern over its files.

    Raises:
        FctError: a DatasetDict, whose splits are galleries of their own; a pattern that means other files as well.
    """
    if "dataset_dict.json" in root.files():
        splits = read_state(root / "dataset_dict.json").get("splits")
        known = [s for s in splits if isinstance(s, str)] if isinstance(splits, list) else root.folders()
        if not known:
            raise FctError(f"{name}: {root} holds a DatasetDict without splits")
        which = ", ".join(known)
        raise FctError(
            f"{name}: {root} holds a DatasetDict; name one of its splits ({which}), such as {root / known[0]}"
        )
    state = read_state(root / "state.json")
    files = _names(state, "_data_files", root)
    if location.is_pattern:
        others = sorted({f.name for f in find_files(location, name)} - set(files))
        if others:
            raise FctError(
                f"{name}: {location} means {', '.join(others[:5])}, which the saved dataset does not hold; name its "
                f"folder: {root}"
            )
        return ArrowSource(location, find_files(location, name))
    indices = _names(state, "_indices_data_files", root)
    made = IndexedDatasetSource if indices else SavedDatasetSource
    source = made(root, [root / file for file in files])
    if isinstance(source, IndexedDatasetSource):
        source.indices = [root / file for file in indices]
    return source


def _names(state: JsonDict, key: str, root: Location) -> list[str]:
    entries = state.get(key) or []
    names = [e.get("filename") if isinstance(e, dict) else None for e in entries] if isinstance(entries, list) else []
    if (not names and key == "_data_files") or not all(isinstance(n, str) for n in names):
        raise FctError(f"source: expected names of Arrow files in {root / 'state.json'} ({key}), got {entries!r:.80}")
    for file in names:
        if "/" in str(file) or "\\" in str(file) or str(file) in ("", ".", ".."):
            raise FctError(f"source: expected names of files in {root} in its state.json, got {file!r}")
    return [str(n) for n in names]


class SavedDatasetSource(ArrowSource):
    """The files that state.json names, in its order."""

    of_log = True

    def find(self) -> list[Location]:
        return [
            self.location / file
            for file in _names(read_state(self.location / "state.json"), "_data_files", self.location)
        ]


class IndexedDatasetSource(SavedDatasetSource):
    """Rows in the order of an indices mapping, as older releases of ``datasets`` saved a shuffled or selected dataset.

    One piece; the files are mapped, so that they have to lie on this machine.
    """

    indices: Sequence[Location] = ()

    def pieces(self) -> list[Piece]:
        if not self.location.is_local:
            raise FctError(f"source: expected a saved dataset with an indices mapping on this machine, got {self.url}")
        whole = super().pieces()
        mapping = self._mapping()
        rows = sum(p.rows for p in whole)
        if len(mapping) and int(pc.max(mapping).as_py()) >= rows:
            raise FctError(f"source: the indices of {self.url} name rows beyond its {rows}")
        stamp = "/".join([*(p.stamp for p in whole), *(f.version().stamp for f in self.indices)])
        return [Piece("indices", len(mapping), sum(p.bytes for p in whole), stamp)]

    def _mapping(self) -> pa.ChunkedArray:
        parts = [b.column(0) for f in self.indices for b in self.batches_of(f)]
        return pa.chunked_array(parts, pa.uint64())

    def read(self, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches:
        table = pa.Table.from_batches(
            [self._whole(b, f) for f in self.files for b in self.batches_of(f)], schema=self.schema
        )
        wanted = self._mapping().slice(start, rows)
        for at in range(0, rows, batch_rows):
            part = table.take(wanted.slice(at, batch_rows)).combine_chunks()
            yield from part.to_batches()


def read_state(file: Location) -> JsonDict:
    """A small JSON object. Raises FctError that names the file."""
    if file.version().bytes > 64 << 20:
        raise FctError(f"source: expected at most 64 MB of JSON in {file}, it has {file.version().bytes} bytes")
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FctError(f"source: {file} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise FctError(f"source: expected a JSON object in {file}, got {type(found).__name__}")
    return found
