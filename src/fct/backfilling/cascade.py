"""Cascade: what is nearest by mapped vectors is embedded by the new model, ranked by its true vectors, and kept."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fct.backfilling.job import Job
from fct.backfilling.journal import Journal
from fct.backfilling.true_index import TrueIndex
from fct.backfilling.true_source import Id, Reembed, ask_for_vectors
from fct.backfilling.true_vectors import TrueVectors
from fct.errors import BackfillError
from fct.gallery.interfaces import Shard
from fct.gallery.location import location_of
from fct.scratch import ScratchFolder
from fct.search import TopK

__all__ = ["Cascade"]

_IDS_A_CALL = 256
_FILES = 32  # of one shard, after which they are joined
Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


class Cascade:
    """True vectors of a gallery's rows: asked for once, kept in the journal of its backfill once that is begun.

    Before that they are in a temporary folder (TMPDIR), and go into the journal at the first search after it. They are
    read through memory maps (:class:`TrueIndex`), however many there are.

    read_ids: the ids of a shard's rows, in order; None where rows go by their number.
    """

    def __init__(self, journal: Journal, job: Job, read_ids: Callable[[Shard], pa.ChunkedArray] | None) -> None:
        self._journal, self._job, self._read_ids = journal, job, read_ids
        self._kept = TrueVectors(journal, job.new_space)
        self._early: TrueVectors | None = None
        self._early_folder: ScratchFolder | None = None
        self.index = TrueIndex(job, self._kept)
        self._ids: dict[int, pa.ChunkedArray] = {}
        self._files: Counter[int] = Counter()
        self._lock = threading.Lock()

    def rank(self, queries: Floats, near: TopK, k: int, ask: Reembed) -> tuple[TopK, bool]:
        """(the k best of ``near`` by their true vectors, which ``ask`` gives where they are not known yet; whether all
        of ``near`` have some, else the others were ranked by their mapped ones)."""
        rows = np.unique(near.indices)
        vectors, there = self._vectors(rows, ask)
        distances, indices = np.empty((len(near.indices), k), np.float32), np.empty((len(near.indices), k), np.int64)
        metric = self._job.new_space.metric
        for i, query in enumerate(np.asarray(queries, np.float64)):
            found = near.indices[i]
            at = np.searchsorted(rows, found)
            scores = np.where(there[at], _scores(query, vectors[at], metric), near.distances[i]).astype(np.float32)
            order = np.lexsort((found, scores if metric == "l2" else -scores))[:k]
            distances[i], indices[i] = scores[order], found[order]
        return TopK(distances, indices), bool(there.all())

    def _vectors(self, rows: Rows, ask: Reembed) -> tuple[Floats, Mask]:
        """((n, d) vectors of these ascending rows, which of them there are)."""
        if self._early is not None:
            with self._lock:
                self._store()
        self.index.refresh()
        vectors, there = self.index.take(rows)
        if there.all():
            return vectors, there
        with self._lock:  # nobody pays for what another is asking for
            _, there = self.index.take(rows)
            left = rows[~there]
            for start in range(0, len(left), _IDS_A_CALL):
                self._ask(left[start : start + _IDS_A_CALL], ask)
        return self.index.take(rows)

    def _ask(self, rows: Rows, ask: Reembed) -> None:
        shards = self.index.shard_of(rows)
        ids = [self._id(number, row) for number, row in zip(shards.tolist(), rows.tolist(), strict=True)]
        vectors, good, why = ask_for_vectors(ask, ids, None, self._job.new_space, name="rerank")
        self._keep(rows[good], shards[good], vectors[good])
        if why:
            raise BackfillError(f"{why}; {int(good.sum())} other vectors of this call are kept")

    def _id(self, number: int, row: int) -> Id:
        if self._read_ids is None:
            return row
        shard = self._job.shards[number]
        if number not in self._ids:
            self._ids[number] = self._read_ids(shard)
        stored: Id = self._ids[number][row - shard.first].as_py()
        return stored

    def _keep(self, rows: Rows, shards: Rows, vectors: Floats) -> None:
        store = self._store()
        for number in np.unique(shards).tolist():
            shard, mine = self._job.shards[number], shards == number
            piece = self._job.pieces[shard.piece]
            store.save(piece, rows[mine] - shard.first + shard.start, vectors[mine])
            self._files[number] += 1
            if self._files[number] % _FILES == 0:
                store.merge(piece, shard.start, shard.rows)
        self.index.refresh()

    def _store(self) -> TrueVectors:
        """Where vectors go now: a folder without a job would be refused by the backfill to come."""
        if self._journal.job() is not None:
            self._carry_over()
            return self._kept
        if self._early is None:
            self._early_folder = ScratchFolder("fct-true-")
            place = location_of(self._early_folder.path)
            self._early = TrueVectors(Journal(place, place), self._job.new_space)
            self.index.add(self._early)
        return self._early

    def _carry_over(self) -> None:
        """What was paid for before the backfill was begun, into its journal."""
        if self._early is None or self._early_folder is None:
            return
        for shard in self._job.shards:
            rows = self.index.rows(shard)
            if len(rows):
                self._kept.save(
                    self._job.pieces[shard.piece], rows - shard.first + shard.start, self.index.take(rows)[0]
                )
        self.index.drop(self._early)
        self._early_folder.remove()
        self._early = self._early_folder = None


def _scores(query: npt.NDArray[np.float64], rows: Floats, metric: str) -> npt.NDArray[np.float64]:
    """As :func:`fct.topk` has them, summed in float64."""
    x = rows.astype(np.float64)
    if metric == "l2":
        squares: npt.NDArray[np.float64] = ((x - query) ** 2).sum(axis=1)
        return squares
    products: npt.NDArray[np.float64] = x @ query
    if metric == "cosine":
        lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(query)
        products = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    return products
