"""True vectors that somebody's function gave for rows of a gallery: kept in the journal as they come, asked for once.

A file ``_fct/true/<key>-<first>-<last>-<xxh64>.true`` holds rows of one file of the old gallery: their numbers in it,
int64 and ascending, and behind them their vectors, float32. Its name says all that a reader has to know: the key is of
that file and of the new space, so that vectors of another model or of another file are not found, and a file that does
not match its checksum is as good as none. Nothing in it is parsed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fct.atomic_files import checksum_bytes
from fct.backfilling.confined import open_confined
from fct.backfilling.journal import Journal, system_errors
from fct.errors import BackfillError
from fct.gallery.interfaces import Piece
from fct.spaces import EmbeddingSpace
from fct.types import Array

__all__ = ["TrueFile", "TrueVectors"]

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
_FOLDER = "true"
_NAME = re.compile(r"([0-9a-f]{16})-([0-9]{12,18})-([0-9]{12,18})-([0-9a-f]{16})\.true")
_MOST_BYTES = 4 << 30
_TRIES = 8


@dataclass(frozen=True, slots=True)
class TrueFile:
    """What a file's name says. first, last: of its rows' numbers in the piece that ``key`` is of."""

    name: str
    key: str
    first: int
    last: int
    checksum: str
    bytes: int


class TrueVectors:
    """The true vectors that a journal keeps. Any number of threads and processes may add to it at a time."""

    def __init__(self, journal: Journal, space: EmbeddingSpace) -> None:
        self._journal, self._space = journal, space

    def save(self, piece: Piece, rows: Rows, vectors: Floats) -> str:
        """Keeps the vectors of these rows of ``piece``, on the disk when it returns the file's name ("" for none).

        Args:
            rows: (n,) numbers in the piece, each once. vectors: (n, d) float32, finite.
        """
        if not len(rows):
            return ""
        order = np.argsort(rows)
        rows, vectors = rows[order], vectors[order]
        data = np.ascontiguousarray(rows, "<i8").tobytes() + np.ascontiguousarray(vectors, "<f4").tobytes()
        name = f"{self.key(piece)}-{rows[0]:012d}-{rows[-1]:012d}-{checksum_bytes(data)}.true"
        place = self._journal.inside(f"{_FOLDER}/{name}")
        with system_errors("true vectors could not be kept", place):
            place.write_bytes(data)
        return name

    def load(self, piece: Piece, start: int, rows: int) -> tuple[Rows, Floats]:
        """((m,) ascending numbers in the piece, (m, d) vectors) of those rows of ``[start, start + rows)`` that are
        kept; of a row that is kept twice, one."""
        for _ in range(_TRIES):
            files = self._files(piece, start, start + rows)
            found = [self._read(file) for file in files]
            if not {f.name for f in files} - self.version():
                break  # else somebody joined files meanwhile: what they held is in another one
        d = self._space.dim
        numbers = np.concatenate([np.empty(0, np.int64), *(part[0] for part in found)])
        vectors = np.concatenate([np.empty((0, d), np.float32), *(part[1] for part in found)])
        numbers, first = np.unique(numbers, return_index=True)
        inside = (numbers >= start) & (numbers < start + rows)
        return numbers[inside], vectors[first[inside]]

    def merge(self, piece: Piece, start: int, rows: int) -> None:
        """Makes one file of those that lie wholly in ``[start, start + rows)`` of the piece."""
        files = [f for f in self._files(piece, start, start + rows) if f.first >= start and f.last < start + rows]
        if len(files) < 2:
            return
        parts = [part for file in files if len((part := self._read(file))[0])]
        if not parts:
            return
        numbers, first = np.unique(np.concatenate([part[0] for part in parts]), return_index=True)
        whole = self.save(piece, numbers, np.concatenate([part[1] for part in parts])[first])
        for file in files:
            if file.name != whole:
                self._journal.inside(f"{_FOLDER}/{file.name}").remove()

    def count(self, pieces: Sequence[Piece]) -> int:
        """Rows of these pieces that are kept, by the sizes of their files."""
        keys = {self.key(piece) for piece in pieces}
        return sum(file.bytes // self._row_bytes for file in self.files() if file.key in keys)

    def version(self) -> frozenset[str]:
        """Changes when vectors are added."""
        return frozenset(file.name for file in self.files())

    def key(self, piece: Piece) -> str:
        """By which the files of a piece's rows are found."""
        known = [piece.name, piece.rows, piece.bytes, self._space.plain.to_dict()]
        return checksum_bytes(json.dumps(known, sort_keys=True).encode())

    def files(self) -> list[TrueFile]:
        """All that there are, of whatever pieces, by name."""
        found = []
        for name, size in sorted(self._journal.sizes(_FOLDER).items()):
            if match := _NAME.fullmatch(name):
                found.append(TrueFile(name, match[1], int(match[2]), int(match[3]), match[4], size))
        return found

    def open(self, file: TrueFile, scratch: Callable[[], Path]) -> tuple[Rows, Floats]:
        """A file's rows, and their vectors memory-mapped; none where it is gone or damaged.

        scratch: a folder of this machine, for the files of a journal that lies elsewhere.
        """
        numbers, vectors = self._read(file)
        if not len(numbers):
            return numbers, vectors
        root, offset = self._journal.root, 8 * len(numbers)
        try:
            if root.is_local:
                descriptor = open_confined(root.local.parent, f"{root.name}/{_FOLDER}/{file.name}")
            else:
                copy, offset = scratch() / file.name, 0
                np.asarray(vectors, "<f4").tofile(copy)
                descriptor = os.open(copy, os.O_RDONLY)
        except FileNotFoundError:  # into a larger one meanwhile, which is listed next time
            return numbers[:0], vectors[:0]
        with os.fdopen(descriptor, "rb") as opened:
            mapped: Array = np.memmap(opened, "<f4", "r", offset, vectors.shape)
        return np.array(numbers), mapped

    @property
    def _row_bytes(self) -> int:
        return 8 + 4 * self._space.dim

    def _files(self, piece: Piece, start: int, end: int) -> list[TrueFile]:
        key = self.key(piece)
        return [file for file in self.files() if file.key == key and file.first < end and file.last >= start]

    def _read(self, file: TrueFile) -> tuple[Rows, Floats]:
        """The file's rows and vectors; none where it is gone (into a larger one, or away) or damaged."""
        d = self._space.dim
        none = np.empty(0, np.int64), np.empty((0, d), np.float32)
        try:
            data = self._journal.read(f"{_FOLDER}/{file.name}", min(file.bytes, _MOST_BYTES), file.bytes)
        except (FileNotFoundError, BackfillError):
            return none
        n, rest = divmod(len(data), self._row_bytes)
        if rest or not n or checksum_bytes(data) != file.checksum:
            return none
        numbers: Array = np.frombuffer(data, "<i8", n)
        vectors: Array = np.frombuffer(data, "<f4", n * d, offset=8 * n).reshape(n, d)
        sound = (np.diff(numbers) > 0).all() and numbers[0] == file.first and numbers[-1] == file.last
        return (numbers, vectors) if sound and np.isfinite(vectors).all() else none
