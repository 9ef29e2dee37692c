"""Exact search on a GPU without a distance matrix: ``scan`` proposes candidates, ``rescore`` gives their exact scores.

The scan's operands are bfloat16 or int8 shadows of the rows, and its score is an upper bound of the true one: with
q = q' + dq and g = g' + dg, ``q.g <= q'.g' + |q| |dg| + |dq| |g'|`` (Cauchy and Schwarz), and the rounding of the sums
is covered besides (:mod:`fct.ops.topk_triton`). So whatever a list dropped scores no better than the worst it kept.

One program holds BQ queries and walks every ``splits``-th tile of BG gallery rows; neighbouring rows, which are often
alike, spread over all lists. A candidate is one int64: its cost, as an integer that sorts like the float, above its
row; so one comparison orders by cost and breaks ties by the lower row. A tile in which nothing beats the worst kept
candidate costs its product and one reduction; else the tile is merged by sorting.
"""

import triton
import triton.language as tl
from fct.kernels.configs import Tile
from fct.kernels.transform import SCALE_DIM, SCALE_NONE, SCALE_ONE, SCALE_ROW, _gallery_tile, _product  # noqa: F401

WORST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
L2, IP, COSINE = (tl.constexpr(i) for i in range(3))
KEEPS = (32, 64)  # candidates of each list: for a small k, for a large one
RESCORE = Tile(1, 32, 64, 4, 1)  # candidates of one program (n), dimensions at a time (k)


def tile(kind: str, keep: int, target: str) -> Tile:
    """m queries by n gallery rows, k dimensions (128 bytes) at a time; keep: candidates of each list, at most n."""
    deep = 128 if kind == "int8" else 64
    if target.startswith("gfx"):
        return Tile(16, 64, deep, 4, 2)  # 32 queries spill there
    return Tile(32, 64, deep, 8 if keep > 32 else 4, 3)


def signature(kind: str, shape: Tile, keep: int) -> tuple[dict, dict]:
    """Argument types and constants for compiling ``scan`` at 128 dimensions, without launching it."""
    pointers = {"q_ptr": f"*{kind}", "g_ptr": f"*{kind}", "q_meta": "*fp32", "g_meta": "*fp32", "out_ptr": "*i64"}
    numbers = {"n_q": "i32", "n_g": "i32", "splits": "i32", "stride_q": "i64", "stride_g": "i64"}
    constants = {"D": 128, "KEEP": keep, "BQ": shape.m, "BG": shape.n, "BK": shape.k, "UPCAST": False}
    return pointers | numbers, constants


def rescore_signature(element: str, scale: int) -> tuple[dict, dict]:
    """The same for ``rescore`` of l2."""
    types = {"q_ptr": f"*{element}", "g_ptr": f"*{element}", "q_scale_ptr": "*fp32", "g_scale_ptr": "*fp32",
             "keys_ptr": "*i64", "cost_ptr": "*fp32", "count": "i32", "stride_q": "i64", "stride_g": "i64"}  # fmt: skip
    return types, {"D": 128, "METRIC": 0, "Q_SCALE": scale, "G_SCALE": scale, "BC": RESCORE.n, "BK": RESCORE.k}


@triton.jit
def scan(
    q_ptr, stride_q, q_meta, g_ptr, stride_g, g_meta, out_ptr, n_q, n_g, splits,
    D: tl.constexpr, KEEP: tl.constexpr, BQ: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (n_q, splits, KEEP) int64, ascending: the best KEEP among the rows of tiles s, s + splits, ... for split s.

    Grid (query tiles, splits). q (n_q, D), g (n_g, D): bfloat16 or int8. q_meta (n_q, 4): scale, |q|, |dq|, -;
    g_meta (n_g, 4): scale, bias, |dg| and slack, |g'|; float32. Cost: the negated upper bound of q.g + bias. Places
    without a candidate hold WORST. KEEP and BG are powers of two, KEEP at most BG; n_g is at most 2^30.
    """
    queries = tl.program_id(0) * BQ + tl.arange(0, BQ)
    live = queries < n_q
    split = tl.program_id(1)
    depth = tl.arange(0, BK)
    best = tl.full((BQ, KEEP), WORST, tl.int64)
    worst = tl.full((BQ,), WORST, tl.int64)
    at_q = q_meta + queries * 4
    q_scale = tl.load(at_q, mask=live, other=0.0)
    q_norm = tl.load(at_q + 1, mask=live, other=0.0)
    q_lost = tl.load(at_q + 2, mask=live, other=0.0)
    for t in range(split, tl.cdiv(n_g, BG), splits):
        rows = (t * BG + tl.arange(0, BG)).to(tl.int64)
        inside = rows < n_g
        if q_ptr.dtype.element_ty == tl.int8:
            acc = tl.zeros((BQ, BG), dtype=tl.int32)
        else:
            acc = tl.zeros((BQ, BG), dtype=tl.float32)
        for k0 in range(0, D, BK):
            cols = k0 + depth
            q = tl.load(
                q_ptr + queries.to(tl.int64)[:, None] * stride_q + cols[None, :],
                mask=live[:, None] & (cols < D)[None, :], other=0,
            )  # fmt: skip
            g = tl.load(
                g_ptr + rows[:, None] * stride_g + cols[None, :],
                mask=inside[:, None] & (cols < D)[None, :], other=0,
            )  # fmt: skip
            acc = _product(q, g, acc, "ieee", UPCAST)
        at_g = g_meta + rows * 4
        bias = tl.load(at_g + 1, mask=inside, other=0.0)
        g_lost = tl.load(at_g + 2, mask=inside, other=0.0)
        g_norm = tl.load(at_g + 3, mask=inside, other=0.0)
        bound = acc.to(tl.float32)
        if q_ptr.dtype.element_ty == tl.int8:
            bound = bound * (q_scale[:, None] * tl.load(at_g, mask=inside, other=0.0)[None, :])
        bound = bound + bias[None, :] + q_norm[:, None] * g_lost[None, :] + q_lost[:, None] * g_norm[None, :]
        bits = (0.0 - bound).to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers now sort as the floats do
        key = (bits.to(tl.int64) << 32) | rows[None, :]
        key = tl.where(live[:, None] & inside[None, :], key, WORST)
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
    places = (queries.to(tl.int64) * splits + split)[:, None] * KEEP + tl.arange(0, KEEP)[None, :]
    tl.store(out_ptr + places, best, mask=live[:, None])


@triton.jit
def rescore(
    q_ptr, q_scale_ptr, stride_q, g_ptr, g_scale_ptr, stride_g, keys_ptr, cost_ptr, count,
    D: tl.constexpr, METRIC: tl.constexpr, Q_SCALE: tl.constexpr, G_SCALE: tl.constexpr, BC: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """cost (n_q, count) float32: of each candidate's row, from the rows themselves, summed in float64, rounded once.

    Grid (n_q, candidate blocks). q, g: rows in their own layout, with the SCALE that brings them back. keys (n_q,
    count): the scan's; infinity stands where one holds WORST. Lowest is best: squared l2, or the negated product.
    """
    query = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BC + tl.arange(0, BC)
    there = places < count
    key = tl.load(keys_ptr + query * count + places, mask=there, other=WORST)
    real = key != WORST
    rows = tl.where(real, key & 0xFFFFFFFF, 0)
    one = query + tl.zeros((1,), tl.int64)
    product = tl.zeros((BC,), tl.float64)
    of_q = tl.zeros((BC,), tl.float64)
    of_g = tl.zeros((BC,), tl.float64)
    for k0 in range(0, D, BK):
        cols = k0 + tl.arange(0, BK)
        q = _gallery_tile(q_ptr, q_scale_ptr, one, one >= 0, cols, stride_q, D, BK, Q_SCALE).to(tl.float64)
        g = _gallery_tile(g_ptr, g_scale_ptr, rows, real, cols, stride_g, D, BK, G_SCALE).to(tl.float64)
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
    cost = product if METRIC == L2 else 0.0 - product
    tl.store(cost_ptr + query * count + places, tl.where(real, cost.to(tl.float32), float("inf")), mask=there)
