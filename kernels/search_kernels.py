"""Exact search on a GPU without a distance matrix: ``scan`` proposes candidates, ``rescore`` gives their exact scores.

The scan's operands are bfloat16 or int8 shadows of the rows, and its score is an upper bound of the true one: with
q = q' + dq and g = g' + dg, ``q.g <= q'.g' + |q| |dg| + |dq| |g'|`` (Cauchy and Schwarz), and the rounding of the sums
is covered besides (:mod:`fct.ops.search.triton_search`). So whatever a list dropped scores no better than the worst it
kept.

One program has a tile of queries and walks every ``splits``-th tile of gallery rows; neighbouring rows, which are often
alike, spread over all lists. A candidate is one int64: its cost, as an integer that sorts like the float, above its
row; so one comparison orders by cost and breaks ties by the lower row. A tile in which nothing beats the worst kept
candidate costs its product and one reduction; else every query's best of the tile takes the place of the worst that it
kept, until nothing in the tile beats any. Late in a long list that is once or twice for a tile, where sorting the tile
takes dozens of passes over it.
"""

from typing import Any

import triton
import triton.language as tl

from fct.kernels.kernel_arguments import Gallery, Shadow
from fct.kernels.tile_choices import Tile, family
from fct.kernels.transform_kernels import SCALE_DIM, SCALE_NONE, SCALE_ONE, SCALE_ROW, _gallery_tile, _product  # noqa: F401

WORST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
L2, IP, COSINE = (tl.constexpr(i) for i in range(3))
KEEPS = (32, 64)  # candidates of each list: for a small k, for a large one
FEW = 32  # queries for which a smaller tile is taken
# What is compiled and inspected (tools/machine_code.py): candidates of a list, width, queries. Shadows of one line
# and of two are held, wider ones streamed, by one loop for all widths.
CASES = {
    "bf16": [(32, 128, 4096), (64, 128, 4096), (32, 256, 4096), (64, 256, 4096),
             (32, 128, FEW), (64, 128, FEW), (32, 256, FEW), (64, 256, FEW)],
    "int8": [(32, 128, 4096), (64, 128, 4096), (64, 256, 4096), (32, 384, 4096), (64, 384, 4096),
             (32, 128, FEW), (64, 128, FEW), (64, 256, FEW), (32, 384, FEW), (64, 384, FEW)],
}  # fmt: skip
RESCORE = Tile(1, 32, 64, 4, 1)  # candidates of one program (n), dimensions at a time (k)


def tile(kind: str, keep: int, target: str, *, width: int = 128, queries: int = 4096) -> Tile:
    """m queries by n gallery rows, k elements of the shadow's ``width`` at a time; keep: candidates of each list.

    Where k is the whole width a program holds its queries, else it reads them with every tile. For up to FEW queries
    a tile that is not mostly empty.
    """
    place = family(target)
    line = 128 if kind == "int8" else 64  # elements of 128 bytes
    held = width in (line, 2 * line)
    deep = width if held else line
    if queries <= FEW:
        # ptxas spills a word to fit one block more; not with these stages
        return Tile(16, 64, deep, 4, 3 if kind == "bf16" and not held and (keep, place) != (64, "sm_90") else 2)
    # 128 queries would spill: beside tensor memory's copy of 128 bfloat16 columns; streamed int8 with 64 candidates
    spills = (kind == "bf16" and held) if place == "sm_100" else kind == "int8" and keep > 32 and not held
    return Tile(64 if spills and place != "sm_90" else 128, 64, deep, 8, 3)


def signature(kind: str, shape: Tile, keep: int, width: int = 128) -> tuple[dict, dict]:
    """Argument types and constants for compiling ``scan`` at ``width`` dimensions, without launching it."""
    shadow: Any = Shadow(f"*{kind}", "i64", "*fp32")  # type: ignore[arg-type]
    types: dict = {"queries": shadow, "gallery": shadow, "out": "*i64"} | dict.fromkeys(("n_q", "n_g", "splits"), "i32")
    constants = {"HELD": shape.k == width, "KEEP": keep, "TILE": shape, "UPCAST": False}
    return types | {"width": "i32"}, constants


def rescore_signature(element: str, scale: int) -> tuple[dict, dict]:
    """The same for ``rescore`` of l2."""
    rows: Any = Gallery(f"*{element}", "*fp32" if scale else "constexpr", "i64")  # type: ignore[arg-type]
    types = {"queries": rows, "gallery": rows, "keys": "*i64", "cost": "*fp32", "count": "i32"}
    return types, {"D": 128, "METRIC": 0, "Q_SCALE": scale, "G_SCALE": scale, "TILE": RESCORE}


@triton.jit
def scan(
    queries, gallery, out, n_q, n_g, splits, width,
    HELD: tl.constexpr, KEEP: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The best KEEP rows of each query among the tiles s, s + splits, ... for each split s.

        out[q, s] = the lowest of (cost(q, g), g), ascending;  cost(q, g) = -(q'.g' + bias + |q| |dg| + |dq| |g'|)

    out: (n_q, splits, KEEP) int64. queries, gallery: Shadow of ``width`` columns, which TILE.k divides; meta of a
    query: scale, |q|, |dq|, -; of a row: scale, bias, |dg| and slack, |g'|. Places without a candidate hold WORST.
    Grid (query tiles, splits). KEEP and TILE.n are powers of two; n_g is at most 2^30. HELD: TILE.k is the width, and
    the queries are read once. (A width known to the compiler would unroll the other loop, and spill.)
    """
    ids = tl.program_id(0) * TILE.m + tl.arange(0, TILE.m)
    live = ids < n_q
    split = tl.program_id(1)
    depth = tl.arange(0, TILE.k)
    # each free place a value of its own, above every key (a NaN's cost with a row below 2^30, too)
    best = WORST - tl.arange(0, KEEP).to(tl.int64)[None, :] + tl.zeros((TILE.m, KEEP), tl.int64)
    worst = tl.max(best, axis=1)
    at_q = queries.meta + ids * 4
    q_scale = tl.load(at_q, mask=live, other=0.0)
    q_norm = tl.load(at_q + 1, mask=live, other=0.0)
    q_lost = tl.load(at_q + 2, mask=live, other=0.0)
    q_rows = queries.data + ids.to(tl.int64)[:, None] * queries.stride
    if HELD:
        held = tl.load(q_rows + depth[None, :], mask=live[:, None], other=0)
    for t in range(split, tl.cdiv(n_g, TILE.n), splits):
        rows = (t * TILE.n + tl.arange(0, TILE.n)).to(tl.int64)
        inside = rows < n_g
        g_rows = gallery.data + rows[:, None] * gallery.stride
        if queries.data.dtype.element_ty == tl.int8:
            acc = tl.zeros((TILE.m, TILE.n), dtype=tl.int32)
        else:
            acc = tl.zeros((TILE.m, TILE.n), dtype=tl.float32)
        if HELD:
            g = tl.load(g_rows + depth[None, :], mask=inside[:, None], other=0)
            acc = _product(held, g, acc, "ieee", UPCAST)
        else:
            for k0 in range(0, width, TILE.k):
                q = tl.load(q_rows + (k0 + depth)[None, :], mask=live[:, None], other=0)
                g = tl.load(g_rows + (k0 + depth)[None, :], mask=inside[:, None], other=0)
                acc = _product(q, g, acc, "ieee", UPCAST)
        at_g = gallery.meta + rows * 4
        bias = tl.load(at_g + 1, mask=inside, other=0.0)
        g_lost = tl.load(at_g + 2, mask=inside, other=0.0)
        g_norm = tl.load(at_g + 3, mask=inside, other=0.0)
        bound = acc.to(tl.float32)
        if queries.data.dtype.element_ty == tl.int8:
            bound = bound * (q_scale[:, None] * tl.load(at_g, mask=inside, other=0.0)[None, :])
        bound = bound + bias[None, :] + q_norm[:, None] * g_lost[None, :] + q_lost[:, None] * g_norm[None, :]
        bits = (0.0 - bound).to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers now sort as the floats do
        key = (bits.to(tl.int64) << 32) | rows[None, :]
        key = tl.where(live[:, None] & inside[None, :], key, WORST)
        lowest = tl.min(key, axis=1)
        beaten = tl.max((lowest < worst).to(tl.int32), axis=0)
        if beaten > 0:
            while beaten > 0:
                best = tl.where(best == worst[:, None], tl.minimum(lowest, worst)[:, None], best)
                worst = tl.max(best, axis=1)
                key = tl.where(key == lowest[:, None], WORST, key)
                lowest = tl.min(key, axis=1)
                beaten = tl.max((lowest < worst).to(tl.int32), axis=0)
    best = tl.sort(tl.where(best > WORST - KEEP, WORST, best), dim=1)
    places = (ids.to(tl.int64) * splits + split)[:, None] * KEEP + tl.arange(0, KEEP)[None, :]
    tl.store(out + places, best, mask=live[:, None])


@triton.jit
def rescore(
    queries, gallery, keys, cost, count,
    D: tl.constexpr, METRIC: tl.constexpr, Q_SCALE: tl.constexpr, G_SCALE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Exact costs of the candidates, from the rows themselves, summed in float64, rounded once.

        cost[q, j] = |q - g|^2, or -q.g, or -q.g / (|q| |g|),    g the row that keys[q, j] names

    queries, gallery: Gallery of D columns, with the SCALE that brings them back. keys: (n_q, count) int64, the scan's;
    cost: (n_q, count) float32, infinity where a key is WORST. Grid (n_q, candidate blocks); TILE: n candidates, k
    dimensions at a time.
    """
    query = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * TILE.n + tl.arange(0, TILE.n)
    there = places < count
    key = tl.load(keys + query * count + places, mask=there, other=WORST)
    real = key != WORST
    rows = tl.where(real, key & 0xFFFFFFFF, 0)
    one = query + tl.zeros((1,), tl.int64)
    product = tl.zeros((TILE.n,), tl.float64)
    of_q = tl.zeros((TILE.n,), tl.float64)
    of_g = tl.zeros((TILE.n,), tl.float64)
    for k0 in range(0, D, TILE.k):
        cols = k0 + tl.arange(0, TILE.k)
        q = _gallery_tile(queries.data, queries.scale, one, one >= 0, cols, queries.stride, D, TILE.k, Q_SCALE).to(
            tl.float64
        )
        g = _gallery_tile(gallery.data, gallery.scale, rows, real, cols, gallery.stride, D, TILE.k, G_SCALE).to(
            tl.float64
        )
        if METRIC == L2:
            product += tl.sum((q - g) * (q - g), axis=1)
        else:
            product += tl.sum(q * g, axis=1)
        if METRIC == COSINE:
            of_q += tl.sum(q * q, axis=1)
            of_g += tl.sum(g * g, axis=1)
    if METRIC == COSINE:
        length = tl.sqrt(of_q) * tl.sqrt(of_g)
        product = product / tl.where(length > 0, length, 1.0)
    exact = product if METRIC == L2 else 0.0 - product
    tl.store(cost + query * count + places, tl.where(real, exact.to(tl.float32), float("inf")), mask=there)
