"""Exact search on a GPU without a distance matrix: ``scan`` keeps the best of each query while it walks the gallery.

One program holds BQ queries and walks one part of the gallery in tiles of BG rows. A candidate is one int64: its cost,
as an integer that sorts like the float, above its row in the part; so one comparison orders by cost and breaks ties by
the lower row. A tile in which nothing beats the worst kept candidate costs its product and one reduction; else the tile
is merged by sorting. Rows the caller must still tell apart are rescored in float64 afterwards (:mod:`fct.ops.search`).
"""

import triton
import triton.language as tl
from fct.kernels.configs import Tile
from fct.kernels.transform import SCALE_DIM, SCALE_NONE, SCALE_ONE, SCALE_ROW, _gallery_tile, _product  # noqa: F401

WORST = tl.constexpr(0x7FFFFFFFFFFFFFFF)


def tile(precision: str) -> Tile:
    """m queries by n gallery rows, k dimensions at a time."""
    return Tile(32, 64, 32, 8, 2) if precision == "fp32" else Tile(32, 128, 64, 4, 2)


def signature(kind: str, shape: Tile, product: dict) -> tuple[dict, dict]:
    """Argument types and constants for compiling ``scan`` at 128 dimensions and k = 10, without launching it."""
    pointers = {"q_ptr": f"*{kind}", "g_ptr": f"*{kind}", "q2_ptr": "*fp32", "g2_ptr": "*fp32", "out_ptr": "*i64"}
    numbers = {"n_q": "i32", "n_g": "i64", "part": "i64", "first_query": "i64", "stride_q": "i64", "stride_g": "i64"}
    constants = {"D": 128, "KEEP": 16, "L2": True, "SAME": False, "BQ": shape.m, "BG": shape.n, "BK": shape.k}
    return pointers | numbers, constants | product


@triton.jit
def scan(
    q_ptr, stride_q, g_ptr, stride_g, q2_ptr, g2_ptr, out_ptr, n_q, n_g, part, first_query,
    D: tl.constexpr, KEEP: tl.constexpr, L2: tl.constexpr, SAME: tl.constexpr,
    BQ: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (parts, n_q, KEEP) int64, ascending: the best KEEP of gallery rows [p * part, (p + 1) * part) for part p.

    Grid (query tiles, parts). q, g: operands of one dtype; q2, g2: squared lengths, float32 (L2 only). Cost:
    q2 + g2 - 2 q.g, or -q.g. Places without a candidate hold WORST. KEEP is a power of two, at most BG.
    SAME leaves row first_query + i out of query i's answer. part is below 2^31.
    """
    queries = tl.program_id(0) * BQ + tl.arange(0, BQ)
    live = queries < n_q
    begin = tl.program_id(1).to(tl.int64) * part
    count = tl.minimum(n_g - begin, part).to(tl.int32)
    depth = tl.arange(0, BK)
    best = tl.full((BQ, KEEP), WORST, tl.int64)
    worst = tl.full((BQ,), WORST, tl.int64)
    if L2:
        q2 = tl.load(q2_ptr + queries, mask=live, other=0.0)
    for g0 in range(0, count, BG):
        local = g0 + tl.arange(0, BG)
        inside = local < count
        rows = begin + local
        acc = tl.zeros((BQ, BG), dtype=tl.float32)
        for k0 in range(0, D, BK):
            cols = k0 + depth
            q = tl.load(
                q_ptr + queries.to(tl.int64)[:, None] * stride_q + cols[None, :],
                mask=live[:, None] & (cols < D)[None, :], other=0.0,
            )  # fmt: skip
            g = tl.load(
                g_ptr + rows[:, None] * stride_g + cols[None, :],
                mask=inside[:, None] & (cols < D)[None, :], other=0.0,
            )  # fmt: skip
            acc = _product(q, g, acc, PRECISION, UPCAST)
        if L2:
            g2 = tl.load(g2_ptr + rows, mask=inside, other=0.0)
            cost = q2[:, None] + g2[None, :] - 2.0 * acc
        else:
            cost = 0.0 - acc
        bits = cost.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers now sort as the floats do
        key = (bits.to(tl.int64) << 32) | local.to(tl.int64)[None, :]
        allowed = live[:, None] & inside[None, :]
        if SAME:
            allowed = allowed & (rows[None, :] != (first_query + queries)[:, None])
        key = tl.where(allowed, key, WORST)
        beaten = tl.max((tl.min(key, axis=1) < worst).to(tl.int32), axis=0)
        if beaten > 0:
            # the KEEP lowest of the tile against the KEEP kept: of two ascending lists, one reversed, the lower of
            # each pair are the KEEP lowest of both
            found = tl.sort(key, dim=1)
            found = tl.sum(
                tl.where(
                    tl.arange(0, BG // KEEP)[None, :, None] == 0, tl.reshape(found, (BQ, BG // KEEP, KEEP)), 0
                ), axis=1,
            )  # fmt: skip
            best = tl.sort(tl.minimum(best, tl.flip(found, 1)), dim=1)
            worst = tl.max(best, axis=1)
    places = (tl.program_id(1).to(tl.int64) * n_q + queries)[:, None] * KEEP + tl.arange(0, KEEP)[None, :]
    tl.store(out_ptr + places, best, mask=live[:, None])
