"""topk: the exact nearest rows of a gallery; prepare_gallery: what it searches fastest."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Generic, overload

import numpy as np
from typing_extensions import NamedTuple, TypeVar

from fct.checks import check_flag, check_path
from fct.errors import ArtifactError, BackendError
from fct.joined_rows import together
from fct.mixed_warning import warn_other_metric
from fct.ops.backend import GpuShadow, check_precision
from fct.ops.processors import threads_of
from fct.ops.search.cpu_search import Shadow, build_shadow, extend_shadow, topk_cpu, why_not_shadow
from fct.ops.search.gpu_search import extend_gpu, prepare_gpu, topk_gpu
from fct.ops.search.shadow_file import ShadowHeader, read_shadow, write_shadow
from fct.progress import LongCall, Report
from fct.rows import Rows, check_backed, rows_of
from fct.spaces import EmbeddingSpace, check_metric, check_space
from fct.types import Array, RowsLike, Values

if TYPE_CHECKING:
    import torch

__all__ = ["PreparedGallery", "TopK", "prepare_gallery", "topk"]

# Queries from which packing a shadow for one search costs less than it saves.
_WORTH_A_SHADOW = 16
_WORTH_LEVELS = 8192  # queries of one call from which fitting levels costs less than they save


A = TypeVar("A", default=Array)


class TopK(NamedTuple, Generic[A]):
    """The k nearest rows of each query, nearest first: ``TopK[Array]`` for numpy queries, ``TopK[Tensor]`` for torch.

    distances: (n, k) float32; squared l2 ascending, or inner product / cosine descending.
    indices: (n, k) int64, rows of the gallery. Among equal distances the lower index comes first.
    """

    distances: A
    indices: A


def check_pair(
    queries: RowsLike,
    gallery: RowsLike | PreparedGallery,
    metric: str,
    same_items: bool,
    query_space: EmbeddingSpace | None,
    gallery_space: EmbeddingSpace | None,
    report: Report | None = None,
) -> tuple[Rows, Rows]:
    """Both sides as checked rows of one length, one device and, where the spaces are given, one space; the gallery has
    rows, the queries may be none."""
    check_metric(metric)
    check_flag(same_items, "same_items")
    check_space(query_space, "query_space")
    check_space(gallery_space, "gallery_space")
    prepared = gallery if isinstance(gallery, PreparedGallery) else None
    if prepared is not None and prepared.space is not None:
        if gallery_space is not None:
            prepared.space.require_same(gallery_space, "gallery")
        gallery_space = prepared.space
    if query_space is not None and gallery_space is not None:
        gallery_space.require_same(query_space, "queries")
    if gallery_space is not None:
        warn_other_metric(gallery_space, metric, "gallery", stacklevel=4)
    if isinstance(gallery, PreparedGallery):
        g = gallery.rows
        gallery.check_backed("gallery")
    else:
        dim = gallery_space.dim if gallery_space else None
        g = rows_of(gallery, "gallery", d=dim, d_why="to match gallery_space", report=report)
    q = rows_of(queries, "queries", d=g.d, d_why="to match the gallery")
    if q.device != g.device:
        raise ValueError(f"queries: expected an array on {g.device} like the gallery, got one on {q.device}")
    if same_items and q.n != g.n:
        raise ValueError(
            f"queries: expected ({g.n}, {g.d}), the gallery's own rows, for same_items=True, got ({q.n}, {q.d})"
        )
    if g.n == 0:
        raise ValueError(f"gallery: expected at least one row, got (0, {g.d})")
    return q, g


class PreparedGallery:
    """A gallery with the 8-bit shadow that :func:`topk` scans; made by :func:`prepare_gallery`.

    The rows themselves are not copied: keep them unchanged as long as this is used (they are scored again, in
    float64, wherever the shadow cannot decide).

    gallery: the (n, d) array that was given. metric, space: as given. nbytes: of the shadow. memory_ratio: rows and
    shadow together over the rows alone, 1 + (d + 20.25) / (4 d) for float32: 1.29 at 128 dimensions, under 1.3 from
    102 on; 1.58 for 16-bit and 2.16 for 8-bit rows of 128 dimensions. On a GPU the shadow lies beside the rows: 2 d
    bytes ("bf16") or d ("int8"), rounded up to 128, and 16 a row.
    """

    def __init__(
        self,
        gallery: RowsLike,
        rows: Rows,
        shadow: Shadow | GpuShadow | None,
        metric: str,
        space: EmbeddingSpace | None,
    ):
        self.gallery = gallery
        self.rows = rows
        self.shadow = shadow
        self.metric = metric
        self.space = space

    def __len__(self) -> int:
        return self.rows.n

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.n, self.rows.d

    @property
    def nbytes(self) -> int:
        return 0 if self.shadow is None else self.shadow.nbytes

    @property
    def memory_ratio(self) -> float:
        raw = self.rows.n * self.rows.d * self.rows.itemsize
        return (raw + self.nbytes) / raw if raw else 1.0

    def check_backed(self, name: str) -> None:
        """Raises ValueError where the file under the rows or the shadow has been truncated since it was mapped."""
        arrays = [self.rows.values]
        if isinstance(self.shadow, Shadow):
            shadow = self.shadow
            arrays += [shadow.tiles, shadow.meta, shadow.shift, shadow.tails, shadow.low, shadow.high_error]
        for array in arrays:
            if isinstance(array, np.ndarray):
                check_backed(array, name)

    def __repr__(self) -> str:
        return (
            f"PreparedGallery({self.rows.n} x {self.rows.d} {self.rows.dtype}, metric={self.metric!r}, shadow of "
            f"{self.nbytes / 1e6:.1f} MB, {self.memory_ratio:.2f} x the rows)"
        )

    def append(self, rows: RowsLike, *, gallery: RowsLike | None = None, progress: bool = True) -> PreparedGallery:
        """A prepared gallery with ``rows`` behind these; only they (and the last 64 before) are packed.

        Args:
            rows: (m, d) of the same kind and dtype. Scaled int8: with any scale per row where the gallery has one per
                row (or one for all, which is spread over its rows), else with the gallery's own scale.
            gallery: (n + m, d) holding both already (a memory map that has grown); by default they are copied
                into one new array.
            progress: show a bar on stderr, where that is a terminal and packing lasts more than two seconds.

        Raises ValueError for rows of another kind, dtype or width, or a scale per dimension that is not the gallery's.
        """
        new = rows_of(rows, "rows", d=self.rows.d, d_why="to match the gallery")
        if new.dtype != self.rows.dtype or new.kind != self.rows.kind:
            raise ValueError(
                f"rows: expected {self.rows.kind} rows of {self.rows.dtype}, like the gallery, got {new.kind} rows of "
                f"{new.dtype}"
            )
        if gallery is None:
            gallery = together(self.gallery, rows, self.rows, new)
        total = self.rows.n + new.n
        grown = rows_of(
            gallery, "gallery", d=self.rows.d, n=total, n_why="to hold the old rows and the new", finite=False
        )
        for part, same in ((grown[: self.rows.n], self.rows), (grown[self.rows.n :], new)):
            if part.kind_is_numpy and (part.dtype != same.dtype or _fingerprint(part) != _fingerprint(same)):
                raise ValueError("gallery: expected the old rows and then the new, got others")
        shadow: Shadow | GpuShadow | None = None
        if isinstance(self.shadow, GpuShadow):
            shadow = extend_gpu(self.shadow, grown)
        elif self.shadow is not None:
            with LongCall(progress) as call:
                shadow = extend_shadow(self.shadow, grown, threads=threads_of(None), report=call.stage("packing"))
        return PreparedGallery(gallery, grown, shadow, self.metric, self.space)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the shadow (not the rows) as one file, beside and then in place of what is there.

        A shadow on a GPU is not written: packing reads each row once, from the device's own memory.
        """
        check_path(path, "path")
        if isinstance(self.shadow, GpuShadow):
            raise ValueError(
                f"path: expected a gallery prepared on the cpu, got one on {self.rows.device}; prepare_gallery packs "
                "it there again"
            )
        if self.shadow is None:
            raise ValueError("path: expected a gallery with a shadow to save; this one is searched row by row")
        space = None if self.space is None else self.space.to_dict()
        header = ShadowHeader(self.rows.n, self.rows.d, self.metric, self.rows.dtype, _fingerprint(self.rows), space)
        write_shadow(Path(path), header, self.shadow)

    @classmethod
    def load(cls, path: str | os.PathLike[str], gallery: RowsLike) -> PreparedGallery:
        """The shadow in ``path``, memory-mapped, for the very ``gallery`` it was made from.

        Every byte is compared with a checksum: here up to 1 GiB, in larger files before the first search. Shadows of
        version 0.1 have none.

        Raises ArtifactError, naming the file, for a truncated, damaged or foreign one (a search of a large one too);
        ValueError for another gallery (sizes, dtype, or any of the 1,024 sampled rows).
        """
        header, shadow = read_shadow(check_path(path, "path"))
        try:
            space = None if header.space is None else EmbeddingSpace.from_dict(header.space)
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: expected the embedding space of a shadow, got {error}") from error
        rows = rows_of(
            gallery, "gallery", n=header.n, d=header.d, d_why=f"to match {path}", n_why=f"to match {path}",
            finite=False,
        )  # fmt: skip
        if rows.dtype != header.dtype or _fingerprint(rows) != header.fingerprint:
            raise ValueError(f"gallery: expected the rows that {path} was made from, got others")
        return cls(gallery, rows, shadow, header.metric, space)


def _fingerprint(rows: Rows) -> str:
    """Of up to 1,024 rows spread over the gallery: enough to tell another gallery, cheap on a memory map."""
    digest = hashlib.sha256()
    for i in sorted({round(x) for x in np.linspace(0, rows.n - 1, min(rows.n, 1024))}):
        digest.update(np.ascontiguousarray(rows[i : i + 1].float32()).tobytes())
    return digest.hexdigest()


def prepare_gallery(
    gallery: RowsLike,
    *,
    metric: str = "l2",
    precision: str = "auto",
    space: EmbeddingSpace | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> PreparedGallery:
    """Builds, once, the low-precision shadow of a gallery that :func:`topk` scans.

    Args:
        gallery: (n, d) float32, float16, bfloat16 or :class:`fct.ScaledInt8` in CPU memory, memory-mapped, or on a
            GPU, where the shadow then lies too.
        metric: what it will be searched by.
        precision: of the shadow, never of the answer: "int8" on the CPU; on a GPU "bf16", which "auto" is there, or
            "int8", half as large and certain of fewer rows.
        space: of its vectors; searches that name the queries' space are then checked against it.
        threads: by default FCT_NUM_THREADS or all.
        progress: show a bar on stderr, where that is a terminal and the call lasts more than two seconds.

    Returns:
        PreparedGallery: pass it as ``gallery``. The shadow takes d + 20.25 bytes a row on the CPU. Where a GPU cannot
        run the kernels there is none, and :func:`topk` scores every row.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came. BackendError: a precision that cannot be
            had there, or a device out of memory.

    Examples:
        >>> import numpy as np, fct
        >>> prepared = fct.prepare_gallery(np.eye(4, dtype=np.float32), metric="ip")
        >>> fct.topk(np.eye(4, dtype=np.float32)[2:3], prepared, 1, metric="ip").indices.tolist()
        [[2]]
    """
    check_metric(metric)
    check_precision(precision)
    check_space(space, "space")
    workers = threads_of(threads)
    why = "to match space" if space else ""
    with LongCall(progress) as call:
        rows = rows_of(
            gallery, "gallery", d=space.dim if space else None, d_why=why, allow_empty=False,
            report=call.stage("reading the gallery"),
        )  # fmt: skip
        shadow = _prepared_shadow(rows, metric, precision, workers, call.stage("packing the gallery"))
    return PreparedGallery(gallery, rows, shadow, metric, space)


def _prepared_shadow(
    rows: Rows, metric: str, precision: str, threads: int, report: Report | None
) -> Shadow | GpuShadow | None:
    if rows.device != "cpu":
        if precision == "fp32":
            raise BackendError("precision: expected auto, bf16 or int8 for a shadow, got 'fp32'")
        return prepare_gpu(rows, metric, precision)
    if precision not in ("auto", "int8"):
        raise BackendError(f"precision: expected auto or int8 for a shadow on the cpu, got {precision!r}")
    if why_not_shadow(rows):
        return None
    return build_shadow(rows, metric, threads=threads, levels=True, report=report)


@overload
def topk(
    queries: Array, gallery: RowsLike | PreparedGallery, k: int, *, metric: str = ..., precision: str = ...,
    same_items: bool = ..., query_space: EmbeddingSpace | None = ..., gallery_space: EmbeddingSpace | None = ...,
    threads: int | None = ..., progress: bool = ...,
) -> TopK[Array]: ...  # fmt: skip


@overload
def topk(
    queries: torch.Tensor, gallery: RowsLike | PreparedGallery, k: int, *, metric: str = ..., precision: str = ...,
    same_items: bool = ..., query_space: EmbeddingSpace | None = ..., gallery_space: EmbeddingSpace | None = ...,
    threads: int | None = ..., progress: bool = ...,
) -> TopK[torch.Tensor]: ...  # fmt: skip


@overload
def topk(
    queries: RowsLike, gallery: RowsLike | PreparedGallery, k: int, *, metric: str = ..., precision: str = ...,
    same_items: bool = ..., query_space: EmbeddingSpace | None = ..., gallery_space: EmbeddingSpace | None = ...,
    threads: int | None = ..., progress: bool = ...,
) -> TopK[Values]: ...  # fmt: skip


def topk(
    queries: RowsLike,
    gallery: RowsLike | PreparedGallery,
    k: int,
    *,
    metric: str = "l2",
    precision: str = "auto",
    same_items: bool = False,
    query_space: EmbeddingSpace | None = None,
    gallery_space: EmbeddingSpace | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> TopK[Values]:
    """The exact k nearest gallery rows of each query.

    Args:
        queries: (n, d) float32, float16, bfloat16 or :class:`fct.ScaledInt8`; numpy, torch or DLPack.
        gallery: (m, d), likewise, on the same device; or what :func:`prepare_gallery` made of it for this metric.
        k: how many, 1 <= k <= m (m - 1 with ``same_items``).
        metric: "l2" (squared, ascending), "ip" or "cosine" (descending).
        precision: of the scan, never of the answer: "int8" (on a GPU also "bf16") goes over the gallery's shadow,
            packed for this call where the gallery is not prepared; "fp32" scores every row. "auto" takes the shadow of
            a prepared gallery, and packs one from 16 queries on: "int8" on the CPU, "bf16" on a GPU, where torch
            scores every row if no kernel can run.
        same_items: the queries are the gallery's own rows, in order: row i is left out of query i's answer.
        query_space, gallery_space: where both are given, they must be one space; a prepared gallery knows its own.
        threads: CPU threads; by default FCT_NUM_THREADS or all.
        progress: show a bar on stderr, where that is a terminal and a call on the CPU lasts more than two seconds.

    Returns:
        TopK(distances, indices) of the queries' kind. The order is exact: by score (summed in float64, rounded to
        float32 once), ties by lower index. Distances beyond float32 are infinite, and tie.

        Why a scan in 8 bits is exact: with x' and q' the 8-bit rows and queries, ``<q, x> - <q', x'>`` is
        ``<q, x - x'> + <q - q', x'>``, at most ``|q| |x - x'| + |q - q'| |x'|`` in size, and all four lengths are
        known when the row is packed. A row is left out only where even the upper end of its interval is below k
        others' lower ends; all that remain are scored in float64. Where too many remain, every row is.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came. SpaceMismatchError: two models' vectors.
        BackendError: a forced precision that this search cannot use, or a GPU out of memory. DeviceLostError: the
            GPU failed; nothing that it computed can be trusted.

    Examples:
        >>> import numpy as np, fct
        >>> fct.topk(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), 2).indices.tolist()
        [[0, 1], [1, 0], [2, 0]]
    """
    check_precision(precision)
    prepared = gallery if isinstance(gallery, PreparedGallery) else None
    if prepared is not None and prepared.metric != metric:
        raise ValueError(f"metric: expected {prepared.metric!r}, which the gallery was prepared for, got {metric!r}")
    workers = threads_of(threads)
    with LongCall(progress) as call:
        reading = call.stage("reading the gallery")
        q, g = check_pair(queries, gallery, metric, same_items, query_space, gallery_space, reading)
        check_k(k, g.n, same_items)
        k = int(k)
        if q.n == 0:
            return _as_kind(np.empty((0, k), np.float32), np.empty((0, k), np.int64), q)
        if q.device != "cpu":
            on_gpu = prepared.shadow if prepared is not None and isinstance(prepared.shadow, GpuShadow) else None
            return _as_kind(*topk_gpu(q, g, k, metric, precision, same_items, on_gpu), q)
        shadow = _shadow_for(q, g, prepared, metric, precision, workers, call.stage("packing the gallery"))
        distances, indices, _ = topk_cpu(
            q, g, shadow, k, metric, same_items, threads=workers, report=call.stage("searching")
        )
    return _as_kind(distances, indices, q)


def _shadow_for(
    q: Rows,
    g: Rows,
    prepared: PreparedGallery | None,
    metric: str,
    precision: str,
    threads: int,
    report: Report | None,
) -> Shadow | None:
    """The shadow to scan, or None to score every row."""
    if precision not in ("auto", "int8", "fp32"):
        raise BackendError(f"precision: expected auto, int8 or fp32 for a search on the cpu, got {precision!r}")
    if precision == "fp32" or (precision == "auto" and prepared is None and q.n < _WORTH_A_SHADOW):
        return None
    why = why_not_shadow(g)
    shadow = None
    if not why:
        if prepared is not None:
            ready = prepared.shadow
        else:  # for this call alone
            ready = build_shadow(g, metric, threads=threads, levels=q.n >= _WORTH_LEVELS, halves=False, report=report)
        shadow = ready if isinstance(ready, Shadow) else None
        if shadow is None or not shadow.usable:
            why, shadow = "some norms are beyond 1e12, too far for float32 products", None
    if shadow is None and precision == "int8":
        raise BackendError(f"precision: int8 cannot be scanned here: {why}")
    return shadow


def check_k(k: int, n: int, same_items: bool) -> None:
    most = n - 1 if same_items else n
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= most:
        without = ", without the query's own" if same_items else ""
        raise ValueError(f"k: expected 1 to {most}, the rows of the gallery{without}, got {k!r}")


def _as_kind(distances: Values, indices: Values, like: Rows) -> TopK[Values]:
    if like.kind == "numpy":
        return TopK(distances, indices)
    import torch

    from fct.rows import _as_kind as hand_over

    tensors = (
        x if isinstance(x, torch.Tensor) else torch.as_tensor(x, device=like.device) for x in (distances, indices)
    )
    return TopK(*(hand_over(t, like.kind) for t in tensors))
