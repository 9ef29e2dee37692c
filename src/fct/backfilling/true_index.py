"""The true vectors of a gallery's rows as they lie in a journal: row numbers in memory, vectors memory-mapped."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fct.backfilling.job import Job
from fct.backfilling.true_vectors import TrueFile, TrueVectors
from fct.gallery.interfaces import Shard
from fct.scratch import ScratchFolder

__all__ = ["TrueIndex"]

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Shard:
    """rows: ascending numbers in the gallery that have a vector; of row i it is ``parts[part[i]][place[i]]``."""

    rows: Rows
    part: npt.NDArray[np.int32]
    positions: Rows
    parts: tuple[Floats, ...]


class TrueIndex:
    """Which rows have a true vector, and these vectors; 20 bytes of memory a row. Any number of threads may ask.

    stores: where they are kept; one that is added later (:meth:`add`) counts like the first.
    """

    def __init__(self, job: Job, *stores: TrueVectors) -> None:
        self._job = job
        self._stores: list[TrueVectors | None] = list(stores)
        self._firsts = np.array([shard.first for shard in job.shards], np.int64)
        self._names: frozenset[tuple[int, str]] = frozenset()
        self._opened: dict[tuple[int, str], tuple[Rows, Floats]] = {}
        self._files: dict[int, list[tuple[int, TrueFile]]] = {}  # of a piece: (its store, the file)
        self._shards: dict[int, _Shard] = {}
        self._pieces: dict[str, int] = {}
        self._folder: ScratchFolder | None = None
        self._lock = threading.RLock()

    def add(self, store: TrueVectors) -> None:
        with self._lock:
            self._stores.append(store)
            self.refresh()

    def drop(self, store: TrueVectors) -> None:
        with self._lock:
            self._stores[self._stores.index(store)] = None
            self.refresh()

    def refresh(self) -> None:
        """Takes up what was kept since, by whatever process, and forgets what went into larger files."""
        with self._lock:
            stores = [(number, store) for number, store in enumerate(self._stores) if store is not None]
            found = {(number, file.name): file for number, store in stores for file in store.files()}
            names = frozenset(found)
            if names == self._names:
                return
            if not self._pieces:
                self._pieces = {stores[0][1].key(piece): at for at, piece in enumerate(self._job.pieces)}
            self._files = {}
            for (number, _), file in found.items():
                if file.key in self._pieces:
                    self._files.setdefault(self._pieces[file.key], []).append((number, file))
            self._opened = {name: held for name, held in self._opened.items() if name in names}
            self._names, self._shards = names, {}

    def any(self) -> bool:
        """Whether there is a vector at all."""
        return bool(self._files)

    def shard_of(self, rows: Rows) -> Rows:
        """(n,) numbers of the shards that these rows of the gallery are in."""
        return np.searchsorted(self._firsts, rows, "right") - 1

    def rows(self, shard: Shard) -> Rows:
        """(m,) ascending numbers, in the gallery, of the shard's rows that have a vector."""
        return self._shard(shard).rows

    def take(self, rows: Rows) -> tuple[Floats, Mask]:
        """((n, d) vectors of ascending rows of the gallery, which of them there are)."""
        vectors = np.zeros((len(rows), self._job.new_space.dim), np.float32)
        there = np.zeros(len(rows), bool)
        shards = self.shard_of(rows)
        for number in np.unique(shards).tolist():
            mine = np.flatnonzero(shards == number)
            held = self._shard(self._job.shards[number])
            at = np.searchsorted(held.rows, rows[mine])
            known = at < len(held.rows)
            known[known] = held.rows[at[known]] == rows[mine][known]
            there[mine] = known
            for part in np.unique(held.part[at[known]]).tolist():
                here = known.copy()
                here[known] = held.part[at[known]] == part
                vectors[mine[here]] = held.parts[part][held.positions[at[here]]]
        return vectors, there

    def _shard(self, shard: Shard) -> _Shard:
        with self._lock:
            held = self._shards.get(shard.number)
            while held is None:
                held = self._made(shard)
                if held is None:
                    self.refresh()  # it lists the larger file before the smaller ones go
            self._shards[shard.number] = held
            return held

    def _made(self, shard: Shard) -> _Shard | None:
        """None where a file went into a larger one since the files were listed."""
        rows, part, place = [], [], []
        parts: list[Floats] = []
        start, end = shard.start, shard.start + shard.rows
        for number, file in self._files.get(shard.piece, ()):
            if file.first >= end or file.last < start:
                continue
            opened = self._open(number, file)
            if opened is None:
                return None
            numbers, vectors = opened
            low, high = np.searchsorted(numbers, (start, end))
            rows.append(numbers[low:high] - start + shard.first)
            part.append(np.full(high - low, len(parts), np.int32))
            place.append(np.arange(low, high, dtype=np.int64))
            parts.append(vectors)
        if not rows:
            return _Shard(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int64), ())
        every, first = np.unique(np.concatenate(rows), return_index=True)
        return _Shard(every, np.concatenate(part)[first], np.concatenate(place)[first], tuple(parts))

    def _open(self, number: int, file: TrueFile) -> tuple[Rows, Floats] | None:
        name, store = (number, file.name), self._stores[number]
        if name not in self._opened and store is not None:
            opened = store.open(file, self._scratch)
            if not len(opened[0]) and all(other.name != file.name for other in store.files()):
                return None
            self._opened[name] = opened
        return self._opened[name]

    def _scratch(self) -> Path:
        self._folder = self._folder or ScratchFolder("fct-true-")
        return self._folder.path
