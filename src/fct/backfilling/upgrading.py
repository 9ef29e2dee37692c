"""UpgradingGallery: new-model queries, answered exactly at any moment of a backfill."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import Unpack

from fct.backfilling.cascade import Cascade
from fct.backfilling.journal import rejected_rows
from fct.backfilling.resolve import resolve
from fct.backfilling.true_source import Reembed
from fct.checks import check_whole
from fct.errors import FctError
from fct.gallery import open_source
from fct.gallery.file_gallery import FileDestination
from fct.gallery.interfaces import Destination, Shard
from fct.gallery.location import Location
from fct.gallery.vectors import vector_block
from fct.mixed_warning import warn_uncorrected
from fct.options.declare import takes
from fct.options.groups import JobOptions
from fct.options.keywords import JobKeywords
from fct.search import PreparedGallery, TopK, prepare_gallery, topk
from fct.spaces import EmbeddingSpace, check_space
from fct.types import Floats, GalleryLike, Int64s, TransformationLike

__all__ = ["UpgradingGallery"]

Rows = npt.NDArray[np.int64]
_MORE = 64  # rows that a shard is asked for beyond k, for those that count by their true vectors


@dataclass(frozen=True)
class _Held:
    """A shard as it is searched. stamp: of the finished file it was read from, None where its rows were mapped by h.

    rows: None where every row was rejected. numbers: (m,) of its rows in the old gallery, ascending.
    """

    stamp: tuple[int, ...] | None
    rows: PreparedGallery | None
    numbers: Rows
    nbytes: int


class UpgradingGallery:
    """A gallery on its way to the new space: rows that are done are read, the others are mapped by h on the fly.

    Answers are the same before, during and after the backfill, since both ways give a row the same values (bit for
    bit on the compiled CPU kernels, whose results do not depend on how rows are batched). Rows that :meth:`search` has
    got true vectors for answer by these from then on. Old-model queries keep
    going to the old gallery until cut-over; rolling back is deleting the new folder.

    A shard is read, or mapped, and prepared (:func:`fct.prepare_gallery`) when it is first searched, and held from
    then on, as far as ``cache_bytes`` allow: one that finds no room is made anew for each search, finished ones sooner
    than mapped ones. Any number of threads may search at a time.

    Args:
        source, destination, transformation, options: as :func:`fct.backfill` has them. The destination is a folder of
            files, begun or not.
        cache_bytes: of all that is held: mapped rows, shadows, and the rows of finished shards, but for those of .npy
            files, which are memory-mapped.

    Examples:
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
        self._cascade = Cascade(found.journal, self._job, self._ids if self._job.id_column else None)
        self._warned = False

    @property
    def space(self) -> EmbeddingSpace:
        """The new space, which queries must come from."""
        return self._job.new_space

    def __len__(self) -> int:
        return self._job.rows

    def done(self) -> float:
        """Share of the shards that are done."""
        return len(self._found.journal.marked()) / len(self._job.shards)

    def topk(self, queries: Floats, k: int, *, query_space: EmbeddingSpace | None = None) -> TopK:
        """The exact k nearest rows; indices are row numbers in the old gallery, int64.

        A row counts by its true vector where the gallery's ``_fct/true`` keeps one (of :meth:`search`, of a partial
        backfill, of whatever process), in the gallery's dtype; else by what h makes of it.

        Args:
            queries: (n, d_new) numpy array of the new model. k: how many. query_space: refused unless it is
                :attr:`space`.

        Raises:
            SpaceMismatchError: queries of another model. ValueError: a bad argument, or fewer than k rows.

        Warns:
            FctWarning: true rows stand among mapped ones whose length is not corrected (``mixed=True`` does), and what
                that was measured to cost; once.
        """
        check_whole(k, "k", 1)
        self._cascade.index.refresh()
        if self._cascade.index.any():
            self._warn_once()
        found = self._nearest(queries, k, query_space, true=True)
        if found.indices.shape[1] < k:
            raise ValueError(f"k: expected at most the gallery's rows, got {k}")
        return found

    def search(
        self,
        queries: Floats,
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

        Warns:
            FctWarning: as :meth:`topk`, where the function gave None, so that a mapped row is ranked among true ones.
        """
        if rerank is None:
            return self.topk(queries, k, query_space=query_space)
        check_whole(k, "k", 1)
        check_whole(depth, "depth", k)
        near = self._nearest(queries, depth, query_space, true=False)  # as rerank_curve measures a depth
        if near.indices.shape[1] < k:
            raise ValueError(f"k: expected at most the gallery's rows, got {k}")
        found, all_true = self._cascade.rank(queries, near, k, rerank)
        if not all_true:
            self._warn_once()
        return found

    def _warn_once(self) -> None:
        """Where true rows are ranked among mapped ones that h made as if they stood alone."""
        if self.space.mapped_length == 1.0 and not self._warned:
            self._warned = True
            warn_uncorrected(self._found.h, "UpgradingGallery", stacklevel=4)

    def _ids(self, shard: Shard) -> pa.ChunkedArray:
        """The ids of a shard's rows."""
        with self._making:
            return pa.chunked_array([batch.column(self._job.id_column) for batch, _ in self._reader.batches(shard)])

    def _nearest(self, queries: Floats, k: int, query_space: EmbeddingSpace | None, *, true: bool) -> TopK:
        """The k nearest rows, or all where there are fewer. true: by their true vectors, where they have some."""
        check_space(query_space, "query_space")
        if query_space is not None:
            self.space.require_same(query_space, "queries")
        best: TopK | None = None
        done = set(self._found.journal.marked())
        for shard in self._job.shards:
            held = self._shard(shard, shard.number in done)
            if held.rows is None:
                continue
            beside = self._true_rows(shard, held) if true else None
            part = self._of_shard(queries, held, beside, min(k, len(held.rows)))
            best = part if best is None else self._nearer(best, part, k)
        if best is None:
            return TopK(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
        return best

    def _of_shard(self, queries: Floats, held: _Held, true: _Held | None, k: int) -> TopK:
        """The k nearest rows of a shard. true: those of its rows that count by their true vectors."""
        assert held.rows is not None
        metric = self.space.metric
        if true is None or true.rows is None:
            near = topk(queries, held.rows, k, metric=metric, progress=False)
            return TopK(np.asarray(near.distances), held.numbers[np.asarray(near.indices)])
        more, enough = min(k + _MORE, len(held.rows)), False
        while not enough:  # so many that k are left beside those that count otherwise
            near = topk(queries, held.rows, more, metric=metric, progress=False)
            found = held.numbers[np.asarray(near.indices)]
            stale = np.isin(found, true.numbers)
            enough = more == len(held.rows) or bool(((~stale).sum(axis=1) >= k).all())
            more = min(4 * more, len(held.rows))
        worst = np.float32(np.inf if metric == "l2" else -np.inf)
        kept = TopK(np.where(stale, worst, near.distances), np.where(stale, np.iinfo(np.int64).max, found))
        own = topk(queries, true.rows, min(k, len(true.rows)), metric=metric, progress=False)
        return self._nearer(kept, TopK(np.asarray(own.distances), true.numbers[np.asarray(own.indices)]), k)

    def _nearer(self, a: TopK, b: TopK, k: int) -> TopK:
        """The k nearest of both; ties go to the lower row number."""
        scores, rows = (np.concatenate(pair, axis=1) for pair in zip(a, b, strict=True))
        order = np.lexsort((rows, scores if self.space.metric == "l2" else -scores), axis=1)[:, :k]
        return TopK(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1))

    def _shard(self, shard: Shard, marked: bool) -> _Held:
        """The shard, prepared: held, or made now."""
        stamp = self._stamp(shard) if marked else None
        return self._held_or_made(shard.number, stamp, lambda: self._make(shard, stamp))

    def _true_rows(self, shard: Shard, held: _Held) -> _Held | None:
        """Those of the shard's rows that have true vectors, prepared likewise; None where none has."""
        rows = self._cascade.index.rows(shard)
        if not len(rows):
            return None

        def make() -> _Held:
            mine = rows[np.isin(rows, held.numbers)]  # a rejected row is not in the gallery
            vectors = self._cascade.index.take(mine)[0].astype(self._job.dtype)
            return self._prepared((len(rows),), vectors, mine)

        return self._held_or_made(~shard.number, (len(rows),), make)

    def _held_or_made(self, key: int, stamp: tuple[int, ...] | None, make: Callable[[], _Held]) -> _Held:
        held = self._held.get(key)
        if held is not None and held.stamp == stamp:
            return held
        with self._making:  # the reader and h serve one at a time, and nobody makes what another is making
            held = self._held.get(key)
            if held is None or held.stamp != stamp:
                held = make()
                self._hold(key, held)
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
        return self._prepared(stamp, rows, numbers)

    def _prepared(self, stamp: tuple[int, ...] | None, rows: Floats, numbers: Rows) -> _Held:
        if not len(rows):
            return _Held(stamp, None, numbers, numbers.nbytes)
        prepared = prepare_gallery(rows, metric=self.space.metric, space=self.space, progress=False)
        kept = 0 if isinstance(rows, np.memmap) else rows.nbytes
        return _Held(stamp, prepared, numbers, kept + prepared.nbytes + numbers.nbytes)

    def _mapped(self, shard: Shard) -> tuple[Floats, list[int]]:
        """((m, d_new) rows by h, numbers of the rejected ones)."""
        blocks, gone, at = [], [], shard.first
        for batch, side in self._reader.batches(shard):
            mapped, rejects = self._mapper(batch, side, at)
            blocks.append(vector_block(mapped.column(self._job.vector), self.space.dim, self._job.dtype).values)
            gone += [r["row"] for r in rejects]
            at += batch.num_rows
        return np.concatenate(blocks) if blocks else np.empty((0, self.space.dim), self._job.dtype), gone

    def _file(self, shard: Shard) -> Location:
        return self._writer.location / f"{shard.name}{self._writer.suffix}"

    def _read(self, shard: Shard) -> Floats:
        file = self._file(shard)
        if self._writer.suffix == ".npy" and os.path.isfile(str(file)):
            rows = np.load(str(file), mmap_mode="r", allow_pickle=False)
            if rows.ndim == 2 and rows.shape[1] == self.space.dim and rows.dtype.name == self._job.dtype:
                stored: Floats = rows
                return stored
        gallery = open_source(file)
        column = self._job.vector if self._job.vector in gallery.schema.names else "vector"
        piece = gallery.pieces()[0]
        blocks = [
            vector_block(b.column(column), self.space.dim, self._job.dtype).values
            for b in gallery.read(piece, 0, piece.rows, max(1, piece.rows))
        ]
        return np.concatenate(blocks) if blocks else np.empty((0, self.space.dim), self._job.dtype)


def _numbers(shard: Shard, gone: list[int]) -> Int64s:
    numbers = np.arange(shard.first, shard.first + shard.rows, dtype=np.int64)
    return np.delete(numbers, np.asarray(gone, np.int64) - shard.first)
