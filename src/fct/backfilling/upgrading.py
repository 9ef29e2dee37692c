"""UpgradingGallery: new-model queries, answered exactly at any moment of a backfill."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import Unpack

from fct.backfilling.cascade import Cascade
from fct.backfilling.journal import rejected_rows
from fct.backfilling.resolve import resolve
from fct.backfilling.true_source import Id, Reembed, row_ids
from fct.checks import check_whole
from fct.errors import FctError
from fct.gallery import open_source
from fct.gallery.file_gallery import FileDestination
from fct.gallery.interfaces import Destination, Shard
from fct.gallery.vectors import vector_block
from fct.options.declare import takes
from fct.options.groups import JobOptions
from fct.options.keywords import JobKeywords
from fct.search import PreparedGallery, TopK, prepare_gallery, topk
from fct.spaces import EmbeddingSpace, check_space
from fct.types import GalleryLike, TransformationLike

__all__ = ["UpgradingGallery"]


@dataclass(frozen=True)
class _Held:
    """A shard as it is searched. stamp: of the finished file it was read from, None where its rows were mapped by h.

    rows: None where every row was rejected. numbers: (m,) of its rows in the old gallery.
    """

    stamp: tuple[int, ...] | None
    rows: PreparedGallery | None
    numbers: Any
    nbytes: int


class UpgradingGallery:
    """A gallery on its way to the new space: rows that are done are read, the others are mapped by h on the fly.

    Answers are the same before, during and after the backfill, since both ways give a row the same values (bit for
    bit on the compiled CPU kernels, whose results do not depend on how rows are batched). Old-model queries keep
    going to the old gallery until cut-over; rolling back is deleting the new folder.

    A shard is read, or mapped, and prepared (:func:`fct.prepare_gallery`) when it is first searched, and held from
    then on, as far as ``cache_bytes`` allow: one that finds no room is made anew for each search, finished ones sooner
    than mapped ones. Any number of threads may search at a time.

    Args:
        source, destination, transformation, options: as :func:`fct.backfill` has them. The destination is a folder of
            files, begun or not.
        cache_bytes: of all that is held: mapped rows, shadows, and the rows of finished shards, but for those of .npy
            files, which are memory-mapped.

    Example:
        >>> import fct, numpy as np, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> np.save(folder + "/old.npy", np.random.default_rng(0).standard_normal((100, 8), dtype=np.float32))
        >>> h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False)
        >>> gallery = fct.UpgradingGallery(folder, folder + "-new", h, old_model="random-old")
        >>> before = gallery.topk(np.ones((2, 4), np.float32), 3).indices
        >>> _ = fct.backfill(folder, folder + "-new", h, old_model="random-old", progress=False)
        >>> bool((before == gallery.topk(np.ones((2, 4), np.float32), 3).indices).all())
        True
    """

    @takes(JobOptions)
    def __init__(
        self,
        source: GalleryLike,
        destination: GalleryLike | Destination,
        transformation: TransformationLike,
        *,
        cache_bytes: int = 1 << 30,
        **options: Unpack[JobKeywords],
    ) -> None:
        check_whole(cache_bytes, "cache_bytes", 0)
        given = JobOptions.split(options)
        found = resolve(source, destination, transformation, given)
        if not isinstance(found.destination, FileDestination):
            raise ValueError(
                f"destination: expected a folder of {', '.join(('npy', 'bin', 'parquet', 'arrow'))} files, "
                f"got {found.job.format}"
            )
        stored = found.journal.job()
        if stored is not None and stored.differences(found.job):
            raise FctError(
                f"destination: {found.job.destination} holds another backfill: {stored.differences(found.job)[0]}"
            )
        self._found, self._job = found, stored or found.job
        self._mapper, self._reader = found.mapper(self._job, threads=given.execution.threads), found.reader(self._job)
        self._writer = found.destination
        self._held: dict[int, _Held] = {}
        self._cache_bytes = cache_bytes
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._cascade = Cascade(found.journal, self._job, self._ids)

    @property
    def space(self) -> EmbeddingSpace:
        """The new space, which queries must come from."""
        return self._job.new_space

    def __len__(self) -> int:
        return self._job.rows

    def done(self) -> float:
        """Share of the shards that are done."""
        return len(self._found.journal.marked()) / len(self._job.shards)

    def topk(self, queries: Any, k: int, *, query_space: EmbeddingSpace | None = None) -> TopK:
        """The exact k nearest rows; indices are row numbers in the old gallery, int64.

        Args:
            queries: (n, d_new) numpy array of the new model. k: how many. query_space: refused unless it is
                :attr:`space`.

        Raises:
            SpaceMismatchError: queries of another model. ValueError: a bad argument, or fewer than k rows.
        """
        check_whole(k, "k", 1)
        found = self._nearest(queries, k, query_space)
        if found.indices.shape[1] < k:
            raise ValueError(f"k: expected at most the gallery's rows, got {k}")
        return found

    def search(
        self,
        queries: Any,
        k: int,
        *,
        rerank: Reembed | None = None,
        depth: int = 200,
        query_space: EmbeddingSpace | None = None,
    ) -> TopK:
        """The k nearest rows, the nearest ``depth`` of which are ranked by the new model's own vectors.

        Args:
            queries, k, query_space: as :meth:`topk` has them.
            rerank: from a list of ids (row numbers where the gallery has none) to (n, d_new) vectors, None in the place
                of one that there is not, which keeps its mapped score. It is asked once for each row, 256 ids at a
                time. What it gives is kept in the gallery's ``_fct/true`` once the backfill is begun: for later
                searches, other processes, and a partial backfill (``reembed=``). So a gallery is re-embedded in the
                order of its use. None: :meth:`topk`.
            depth: at least k. :func:`fct.rerank_curve` tells what a depth is worth.

        Raises:
            BackfillError: the function raised, or gave other than n finite vectors of the new space; what it gave
            before is kept. Others as :meth:`topk`.
        """
        if rerank is None:
            return self.topk(queries, k, query_space=query_space)
        check_whole(k, "k", 1)
        check_whole(depth, "depth", k)
        near = self._nearest(queries, depth, query_space)
        if near.indices.shape[1] < k:
            raise ValueError(f"k: expected at most the gallery's rows, got {k}")
        return self._cascade.rank(queries, near, k, rerank)

    def _ids(self, shard: Shard) -> list[Id]:
        """The ids of a shard's rows."""
        found: list[Id] = []
        with self._making:
            for batch, _ in self._reader.batches(shard):
                found += row_ids(batch, self._job.id_column, shard.first + len(found))
        return found

    def _nearest(self, queries: Any, k: int, query_space: EmbeddingSpace | None) -> TopK:
        """The k nearest rows, or all where there are fewer."""
        check_space(query_space, "query_space")
        if query_space is not None:
            self.space.require_same(query_space, "queries")
        metric, best, where = self.space.metric, None, None
        done = set(self._found.journal.marked())
        for shard in self._job.shards:
            held = self._shard(shard, shard.number in done)
            if held.rows is None:
                continue
            part = topk(queries, held.rows, min(k, len(held.rows)), metric=metric, progress=False)
            found = held.numbers[np.asarray(part.indices)]
            if best is None or where is None:
                best, where = np.asarray(part.distances), found
            else:
                # Earlier shards stand first and the sort is stable: ties go to the lower row number.
                scores = np.concatenate([best, np.asarray(part.distances)], axis=1)
                both = np.concatenate([where, found], axis=1)
                order = np.argsort(scores if metric == "l2" else -scores, axis=1, kind="stable")[:, :k]
                best, where = np.take_along_axis(scores, order, 1), np.take_along_axis(both, order, 1)
        if best is None or where is None:
            return TopK(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
        return TopK(best, where)

    def _shard(self, shard: Shard, marked: bool) -> _Held:
        """The shard, prepared: held, or made now."""
        stamp = self._stamp(shard) if marked else None
        held = self._held.get(shard.number)
        if held is not None and held.stamp == stamp:
            return held
        with self._making:  # the reader and h serve one at a time, and nobody makes what another is making
            held = self._held.get(shard.number)
            if held is None or held.stamp != stamp:
                held = self._make(shard, stamp)
                self._hold(shard.number, held)
            return held

    def _hold(self, number: int, new: _Held) -> None:
        with self._lock:
            self._held.pop(number, None)
            room = self._cache_bytes - sum(held.nbytes for held in self._held.values())
            if new.stamp is None:  # what is finished is sooner made again than what h has to map
                for other, held in list(self._held.items()):
                    if new.nbytes > room and held.stamp is not None:
                        room += self._held.pop(other).nbytes
            if new.nbytes <= room:
                self._held[number] = new

    def _stamp(self, shard: Shard) -> tuple[int, ...] | None:
        """Changes when the finished file does; None where there is none to believe in."""
        try:
            state = os.stat(str(self._file(shard)))
            stamp: tuple[int, ...] = (state.st_ino, state.st_size, state.st_mtime_ns)
        except OSError:  # in an object store: as long as its marker stands
            stamp = ()
        held = self._held.get(shard.number)
        if held is not None and held.stamp == stamp:
            return stamp
        marker = self._found.journal.marker(shard.number)
        trouble = self._found.journal.trouble(marker, shard, self._job.fingerprints(shard), content=False)
        return stamp if trouble is None else None

    def _make(self, shard: Shard, stamp: tuple[int, ...] | None) -> _Held:
        if stamp is None:
            rows, gone = self._mapped(shard)
        else:
            marker = self._found.journal.marker(shard.number)
            gone = rejected_rows(self._found.journal, shard) if marker and marker.rejects else []
            rows = self._read(shard)
        numbers = _numbers(shard, gone)
        if len(rows) != len(numbers):
            raise FctError(
                f"destination: expected {len(numbers)} rows in shard {shard.number}, as its journal says, got "
                f"{len(rows)}"
            )
        if not len(rows):
            return _Held(stamp, None, numbers, numbers.nbytes)
        prepared = prepare_gallery(rows, metric=self.space.metric, space=self.space, progress=False)
        kept = 0 if isinstance(rows, np.memmap) else rows.nbytes
        return _Held(stamp, prepared, numbers, kept + prepared.nbytes + numbers.nbytes)

    def _mapped(self, shard: Shard) -> tuple[Any, list[int]]:
        """((m, d_new) rows by h, numbers of the rejected ones)."""
        blocks, gone, at = [], [], shard.first
        for batch, side in self._reader.batches(shard):
            mapped, rejects = self._mapper(batch, side, at)
            blocks.append(vector_block(mapped.column(self._job.vector), self.space.dim, self._job.dtype).values)
            gone += [r["row"] for r in rejects]
            at += batch.num_rows
        return np.concatenate(blocks) if blocks else np.empty((0, self.space.dim), self._job.dtype), gone

    def _file(self, shard: Shard) -> Any:
        return self._writer.where / f"{shard.name}{self._writer.suffix}"

    def _read(self, shard: Shard) -> Any:
        file = self._file(shard)
        if self._writer.suffix == ".npy" and os.path.isfile(str(file)):
            rows = np.load(str(file), mmap_mode="r", allow_pickle=False)
            if rows.ndim == 2 and rows.shape[1] == self.space.dim and rows.dtype.name == self._job.dtype:
                return rows
        gallery = open_source(file)
        column = self._job.vector if self._job.vector in gallery.schema.names else "vector"
        piece = gallery.pieces()[0]
        blocks = [
            vector_block(b.column(column), self.space.dim, self._job.dtype).values
            for b in gallery.read(piece, 0, piece.rows, max(1, piece.rows))
        ]
        return np.concatenate(blocks) if blocks else np.empty((0, self.space.dim), self._job.dtype)


def _numbers(shard: Shard, gone: list[int]) -> Any:
    numbers = np.arange(shard.first, shard.first + shard.rows, dtype=np.int64)
    return np.delete(numbers, np.asarray(gone, np.int64) - shard.first)
