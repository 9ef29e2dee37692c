"""The folder that clip-retrieval's inference writes: ``img_emb/img_emb_0.npy``, ``text_emb/text_emb_0.npy`` and
``metadata/metadata_0.parquet``, whose rows belong together by number of shard and by position."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pyarrow as pa

from fct.errors import FctError
from fct.gallery.file_gallery import FileSource
from fct.gallery.interfaces import Batches, Piece, Source
from fct.gallery.location import Location
from fct.gallery.matrix_files import NpySource
from fct.gallery.parquet_files import ParquetSource
from fct.gallery.space_tags import side_file_space
from fct.gallery.vectors import rebatch
from fct.spaces import EmbeddingSpace

__all__ = ["ClipSource", "is_clip_folder"]

_VECTORS = ("img_emb", "text_emb")
_FOLDERS = (*_VECTORS, "metadata")


def is_clip_folder(location: Location) -> bool:
    """Whether a folder is what clip-retrieval writes: matrices under its names, and beside them more than these."""
    if location.is_pattern or len(set(location.folders()) & set(_FOLDERS)) < 2:
        return False
    return any(re.fullmatch(rf"{name}_\d+\.npy", file) for name in _VECTORS for file in (location / name).files())


class ClipSource(Source):
    """One gallery of the columns ``img_emb`` and ``text_emb`` (those that there are) and the metadata's.

    A piece is a shard: its files have one number and as many rows.
    """

    kind = "clip"

    def __init__(self, location: Location) -> None:
        self.location = location
        self._parts = {name: self._part(name) for name in _FOLDERS if name in location.folders()}

    def _part(self, name: str) -> FileSource:
        folder, ending = self.location / name, ".parquet" if name == "metadata" else ".npy"
        files = [folder / file for file in folder.files() if not file.startswith(("_", "."))]
        odd = [f.name for f in files if re.fullmatch(rf"{name}_\d+\{ending}", f.name) is None]
        if odd or not files:
            raise FctError(
                f"source: expected {name}_0{ending}, {name}_1{ending}, ... in {folder}, as clip-retrieval writes them, "
                f"got {', '.join(odd[:5]) or 'nothing'}"
            )
        return (ParquetSource if name == "metadata" else NpySource)(folder, files)

    @property
    def url(self) -> str:
        return str(self.location)

    @property
    def schema(self) -> pa.Schema:
        fields = []
        for name, part in self._parts.items():
            fields += [f.with_name(name) for f in part.schema] if name in _VECTORS else list(part.schema)
        names = [f.name for f in fields]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise FctError(
                f"source: the metadata of {self.location} has a column {twice[0]!r}, as the vectors are called"
            )
        metadata = self._parts["metadata"].schema.metadata if "metadata" in self._parts else None
        return pa.schema(fields, metadata=metadata)

    @property
    def space(self) -> EmbeddingSpace | None:
        return side_file_space(self.location)

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"source: a clip-retrieval folder, {', '.join(self._parts)} joined by shard and position",)

    def refresh(self) -> None:
        self._parts = {name: self._part(name) for name in self._parts}

    def _shards(self) -> dict[int, dict[str, Piece]]:
        """The pieces of each shard by number. Raises FctError for one that lacks a file, or has other rows there."""
        shards: dict[int, dict[str, Piece]] = {}
        for name, part in self._parts.items():
            for piece in part.pieces():
                number = int(piece.name.rpartition("_")[2].partition(".")[0])
                if name in shards.setdefault(number, {}):
                    raise FctError(f"source: {self.location / name} has shard {number} twice: {piece.name}")
                shards[number][name] = piece
        for number, found in sorted(shards.items()):
            lacks = [name for name in self._parts if name not in found]
            if lacks:
                raise FctError(
                    f"source: {self.location} has no {lacks[0]} of shard {number}, which {_files(found)} is of"
                )
            if len({piece.rows for piece in found.values()}) > 1:
                counts = ", ".join(f"{piece.name}: {piece.rows}" for piece in found.values())
                raise FctError(
                    f"source: expected as many rows in all files of shard {number} of {self.location}, got {counts}"
                )
        return dict(sorted(shards.items()))

    def pieces(self) -> Sequence[Piece]:
        return [
            Piece(
                f"shard-{number}",
                next(iter(found.values())).rows,
                sum(piece.bytes for piece in found.values()),
                "/".join(piece.stamp for piece in found.values()),
            )
            for number, found in self._shards().items()
        ]

    def read(self, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches:
        found = self._shards()[int(piece.name.rpartition("-")[2])]
        streams = [
            rebatch(part.read(found[name], start, rows, batch_rows), batch_rows) for name, part in self._parts.items()
        ]
        schema = self.schema
        for batches in zip(*streams, strict=True):
            yield pa.RecordBatch.from_arrays([c for batch in batches for c in batch.columns], schema=schema)


def _files(found: dict[str, Piece]) -> str:
    return ", ".join(piece.name for piece in found.values())
