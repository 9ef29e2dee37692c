"""Could whole tiles of 64 rows be skipped by their centre and radius? ``python -m benchmarks.tile_bounds ROWS.npy ...``

Prints the share of tiles that must be read for one query even when its 10th best distance is known beforehand (triangle
inequality: a tile may be skipped where |q - centre| - radius is above it), with the rows in their own order and in the
order of a k-means tree whose leaves are about a tile. docs/performance-retrieval.md has what it said.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import faiss
import numpy as np

TILE = 64
K = 10


def tree_order(rows: Any) -> Any:
    """An order in which tiles are as small as two rounds of k-means make them."""
    coarse = faiss.Kmeans(rows.shape[1], 256, niter=8, max_points_per_centroid=200, seed=1)
    coarse.train(rows)
    cluster = coarse.index.search(rows, 1)[1][:, 0]
    order = []
    for c in range(256):
        ids = np.flatnonzero(cluster == c)
        if len(ids) > 2 * TILE:
            fine = faiss.Kmeans(rows.shape[1], len(ids) // TILE, niter=5, seed=1, min_points_per_centroid=1)
            fine.train(rows[ids])
            ids = ids[np.argsort(fine.index.search(rows[ids], 1)[1][:, 0], kind="stable")]
        order.append(ids)
    return np.concatenate(order)


def share_read(queries: Any, rows: Any, limits: Any) -> float:
    count = len(rows) // TILE
    tiles = rows[: count * TILE].reshape(count, TILE, -1)
    centres = tiles.mean(axis=1)
    radii = np.sqrt(((tiles - centres[:, None]) ** 2).sum(axis=2).max(axis=1))
    squares = (queries**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1) - 2 * queries @ centres.T
    return float((np.sqrt(np.maximum(squares, 0)) - radii <= limits[:, None]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="(n, d) .npy; 100 rows are taken out as queries.")
    for file in parser.parse_args().files:
        all_rows = np.load(file).astype(np.float32)
        all_rows = all_rows.reshape(len(all_rows), -1)
        order = np.random.default_rng(0).permutation(len(all_rows))
        queries, rows = all_rows[order[:100]], np.ascontiguousarray(all_rows[order[1000:]])
        squares = (queries**2).sum(axis=1)[:, None] + (rows**2).sum(axis=1) - 2 * queries @ rows.T
        limits = np.sqrt(np.maximum(0, np.partition(squares, K - 1, axis=1)[:, K - 1]))
        own, ordered = share_read(queries, rows, limits), share_read(queries, rows[tree_order(rows)], limits)
        print(f"{file.name}: {own:.1%} of the tiles in the rows' own order, {ordered:.1%} in a k-means tree's")


if __name__ == "__main__":
    main()
