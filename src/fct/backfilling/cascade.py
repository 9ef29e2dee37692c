"""Cascade: what is nearest by mapped vectors is embedded by the new model, ranked by its true vectors, and kept."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fct.backfilling.job import Job
from fct.backfilling.journal import Journal
from fct.backfilling.true_source import Id, Reembed, ask_for_vectors
from fct.backfilling.true_vectors import TrueVectors
from fct.errors import BackfillError
from fct.gallery.interfaces import Shard
from fct.search import TopK

__all__ = ["Cascade"]

_IDS_A_CALL = 256
_FILES = 32  # of one shard, after which they are joined
Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


class Cascade:
    """True vectors of a gallery's rows: asked for once, kept in the journal of its backfill once that is begun.

    read_ids: the ids of a shard's rows, in order.
    """

    def __init__(self, journal: Journal, job: Job, read_ids: Callable[[Shard], list[Id]]) -> None:
        self._journal, self._job, self._read_ids = journal, job, read_ids
        self._kept = TrueVectors(journal, job.new_space)
        self._known: dict[int, Floats] = {}
        self._ids: dict[int, list[Id]] = {}
        self._files: Counter[int] = Counter()
        self._firsts = np.array([shard.first for shard in job.shards], np.int64)
        self._lock = threading.Lock()

    def rank(self, queries: Any, near: TopK, k: int, ask: Reembed) -> TopK:
        """The k best of ``near`` by their true vectors, which ``ask`` gives where they are not known yet."""
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
        return TopK(distances, indices)

    def _vectors(self, rows: Rows, ask: Reembed) -> tuple[Floats, Mask]:
        """((n, d) vectors of these ascending rows, which of them there are)."""
        shards = np.searchsorted(self._firsts, rows, "right") - 1
        if any(int(row) not in self._known for row in rows):
            with self._lock:  # nobody pays for what another is asking for
                for number in np.unique(shards).tolist():
                    self._recall(self._job.shards[number])
                left = [i for i, row in enumerate(rows.tolist()) if row not in self._known]
                for start in range(0, len(left), _IDS_A_CALL):
                    some = left[start : start + _IDS_A_CALL]
                    self._ask(rows[some], shards[some], ask)
        there = np.array([row in self._known for row in rows.tolist()])
        vectors = np.zeros((len(rows), self._job.new_space.dim), np.float32)
        for i in np.flatnonzero(there):
            vectors[i] = self._known[int(rows[i])]
        return vectors, there

    def _recall(self, shard: Shard) -> None:
        """Brings to mind what the journal keeps of a shard, and its ids: once."""
        if shard.number in self._ids:
            return
        numbers, vectors = self._kept.load(self._job.pieces[shard.piece], shard.start, shard.rows)
        self._known.update(zip((numbers - shard.start + shard.first).tolist(), vectors, strict=True))
        self._ids[shard.number] = self._read_ids(shard)

    def _ask(self, rows: Rows, shards: Rows, ask: Reembed) -> None:
        ids = [self._ids[s][row - self._firsts[s]] for row, s in zip(rows.tolist(), shards.tolist(), strict=True)]
        vectors, good, why = ask_for_vectors(ask, ids, None, self._job.new_space, name="rerank")
        self._keep(rows[good], shards[good], vectors[good])
        if why:
            raise BackfillError(f"{why}; {int(good.sum())} other vectors of this call are kept")

    def _keep(self, rows: Rows, shards: Rows, vectors: Floats) -> None:
        begun = self._journal.job() is not None  # a folder without a job would be refused by the backfill to come
        for number in np.unique(shards).tolist() if begun else ():
            shard, mine = self._job.shards[number], shards == number
            piece = self._job.pieces[shard.piece]
            self._kept.save(piece, rows[mine] - shard.first + shard.start, vectors[mine])
            self._files[number] += 1
            if self._files[number] % _FILES == 0:
                self._kept.merge(piece, shard.start, shard.rows)
        self._known.update(zip(rows.tolist(), vectors, strict=True))


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
