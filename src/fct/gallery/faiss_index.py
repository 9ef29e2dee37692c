"""A FAISS index of a gallery, built from the stream: trained on a sample, then filled in the gallery's order."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fct.atomic_files import atomic_path
from fct.checks import check_flag, check_path, check_seed, check_text, check_whole
from fct.extras import need
from fct.gallery.interfaces import VECTOR_KEY, Piece, Source
from fct.gallery.location import location_of
from fct.gallery.stores import journal_location, open_source
from fct.gallery.vectors import vector_block
from fct.spaces import EmbeddingSpace
from fct.types import Array, GalleryLike

if TYPE_CHECKING:
    import os


__all__ = ["build_faiss", "check_faiss"]

_BATCH = 65536


def build_faiss(
    gallery: GalleryLike,
    factory: str = "Flat",
    out: str | os.PathLike[str] | None = None,
    *,
    train_rows: int = 262144,
    seed: int = 0,
    gpu: bool = False,
) -> Path:
    """Builds an index over a whole gallery; the ids are row numbers in its order.

    An index is built anew, never updated in place: vectors overwritten inside a built IVF or HNSW index keep their
    old lists and links, and it is silently worse.

    Args:
        gallery: a gallery that says which space it is in: a backfill's destination. factory: FAISS's own description,
            "Flat", "IVF4096,PQ32", ... The metric is the space's; for cosine rows are brought to unit length.
        out: the index file; by default ``_fct/index.faiss`` in the gallery. It appears whole or not at all.
        train_rows: rows to train on, spread evenly. gpu: train and fill on the first GPU (faiss-gpu).

    Returns:
        The index file. Memory: the index itself ("Flat" holds every vector) and one batch.

    Raises:
        ImportError: no faiss. ValueError: a gallery without a space or rows, a factory that FAISS does not know, a
        gallery on a store and no ``out``.
    """
    check_text(factory, "factory", "FAISS's description of an index")
    check_whole(train_rows, "train_rows", 1)
    check_seed(seed)
    check_flag(gpu, "gpu")
    source = open_source(gallery, name="gallery")
    space, pieces = source.space, source.pieces()
    if space is None or not sum(p.rows for p in pieces):
        raise ValueError(f"gallery: expected rows and a space, {source.url} has none; see fct.gallery.tag_space")
    target = check_path(out, "out", "a path or None") if out is not None else _beside(source.url)
    faiss, index = _empty(space, factory)
    if gpu:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)

    def block(piece: Piece, start: int, rows: int) -> Array:
        batch = pa.concat_batches(list(source.read(piece, start, rows, rows)))
        values = vector_block(batch.column(_column(source)), space.dim).values.astype(np.float32)
        if space.metric == "cosine":
            values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-30)
        return np.ascontiguousarray(values)

    if not index.is_trained:
        total = sum(p.rows for p in pieces)
        sample = []
        for piece in pieces:
            take = min(piece.rows, -(-train_rows * piece.rows // total))
            start = int(np.random.default_rng(seed).integers(0, piece.rows - take + 1)) if piece.rows else 0
            if take:
                sample.append(block(piece, start, take))
        index.train(np.concatenate(sample))
    for piece in pieces:
        for start in range(0, piece.rows, _BATCH):
            index.add(block(piece, start, min(_BATCH, piece.rows - start)))
    with atomic_path(target) as part:
        faiss.write_index(faiss.index_gpu_to_cpu(index) if gpu else index, str(part))
    return target


def check_faiss(gallery: str, factory: str, space: EmbeddingSpace) -> None:
    """Raises now what :func:`build_faiss` would raise once the gallery is there, hours later."""
    _beside(gallery)
    _empty(space, factory)


def _beside(gallery: str) -> Path:
    place = location_of(gallery, name="gallery")
    if not place.is_local:
        raise ValueError(f"out: expected a file of this machine for the index of {place}, which is not on it, got None")
    return journal_location(place, "lance" if place.name.endswith(".lance") else "").local / "index.faiss"


def _empty(space: EmbeddingSpace, factory: str) -> tuple[Any, Any]:
    """(faiss, an index without rows)"""
    faiss = need("faiss", "faiss")
    metric = faiss.METRIC_L2 if space.metric == "l2" else faiss.METRIC_INNER_PRODUCT
    try:
        return faiss, faiss.index_factory(space.dim, factory, metric)
    except RuntimeError as error:
        raise ValueError(
            f"faiss: expected a description FAISS knows for {space.dim} dimensions (IVF4096,PQ32), got {factory!r}"
        ) from error


def _column(source: Source) -> str:
    return str((source.schema.metadata or {}).get(VECTOR_KEY, b"vector").decode())
