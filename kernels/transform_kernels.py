"""h on a GPU: ``branches`` (both input branches), ``linear`` (the wide middle), ``final`` (the last layer).

Layout, for all kernels: activations are row-major with a pitch that is a multiple of 16 bytes; weights are
``(N, K)`` as the artifact stores them, K padded with zeros to the pitch, so a tile is one 16-byte-aligned copy.
Widths are compile-time constants (an artifact's never change), rows are not; row offsets are 64-bit. ``row0``
points to one int64 in device memory, the chunk's first row in the gallery, so that a captured graph can be replayed
for chunk after chunk. Products accumulate in float32 (int8: int32).

``EXACT``: the layers that read the gallery's rows multiply almost as float32 does. Row and weight are split into two
bfloat16 parts, high and low, and three products are summed in float32: high x high, low x high, high x low; the fourth
lies 2^-16 below. bfloat16 for fp16 too, in which low parts would underflow. Such weights are stored as
[high, high, low], PART columns each, and ``ingest`` writes rows as [high, low, high], so that there the same sum is one
``linear`` of three times the depth.

``UPCAST`` is for Triton's interpreter, whose product of bfloat16 operands is wrong (they become float32 there) and
whose casts to bfloat16 and FP8 lose the carry out of the mantissa (values are rounded before the cast there).
"""

import triton
import triton.language as tl

# How a gallery's int8 scale is laid out: none, one number, one per row, one per dimension.
SCALE_NONE, SCALE_ONE, SCALE_ROW, SCALE_DIM = (tl.constexpr(i) for i in range(4))


@triton.jit
def _product(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b.T for a (M, K) and b (N, K) tiles of one dtype."""
    if UPCAST:
        if a.dtype == tl.int8:
            return acc + tl.dot(a.to(tl.float32), tl.trans(b).to(tl.float32), input_precision="ieee").to(tl.int32)
        else:
            return tl.dot(a.to(tl.float32), tl.trans(b).to(tl.float32), acc, input_precision="ieee")
    else:
        if acc.dtype == tl.int32:
            return tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
        else:
            return tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)


@triton.jit
def _round_int8(y, LOWEST: tl.constexpr):
    """To the nearest integer, ties to even, clamped to [LOWEST, 127]; adding 1.5 * 2^23 does the rounding."""
    y = tl.minimum(tl.maximum(y, LOWEST), 127.0)
    return ((y + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def _cast(y, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """float32 to the operand dtype, to nearest, ties to even."""
    if UPCAST:
        bits = y.to(tl.int32, bitcast=True)
        if DTYPE == tl.bfloat16:
            y = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        elif DTYPE == tl.float8e4nv:
            normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
            y = tl.where(tl.abs(y) < 0.015625, (y + 24576.0) - 24576.0, normal)  # below 2^-6: multiples of 2^-9
    return y.to(DTYPE)


@triton.jit
def _split(x, UPCAST: tl.constexpr):
    """float32 as two bfloat16 parts, (high, low); what their sum lacks of x is below 2^-16 of it."""
    high = _cast(x, tl.bfloat16, UPCAST)
    return high, _cast(x - high.to(tl.float32), tl.bfloat16, UPCAST)


@triton.jit
def _requantise(y, next_ptr, shift_ptr, cols, inside, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """float32 to the next layer's operand: plain cast, or times the channel's 1/scale first for int8 and FP8.

    int8 adds the channel's shift: all 256 values stand for the calibrated range, wherever that lies.
    """
    if DTYPE == tl.int8:
        inverse = tl.load(next_ptr + cols, mask=inside, other=0.0)
        shift = tl.load(shift_ptr + cols, mask=inside, other=0.0)
        return _round_int8(y * inverse[None, :] + shift[None, :], -128.0)
    elif DTYPE == tl.float8e4nv:
        inverse = tl.load(next_ptr + cols, mask=inside, other=0.0)
        y = y * inverse[None, :]
        return _cast(tl.minimum(tl.maximum(y, -448.0), 448.0), DTYPE, UPCAST)  # 448: e4m3's largest
    else:
        return _cast(y, DTYPE, UPCAST)


@triton.jit
def _gallery_tile(x_ptr, scale_ptr, rows, live, cols, stride, D: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr):
    """(rows, cols) of the gallery as float32: scale applied, zero beyond the last row and the last dimension."""
    inside = live[:, None]
    if D % BK != 0:
        inside = inside & (cols < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if SCALE == SCALE_ONE:
        x = x * tl.load(scale_ptr)
    elif SCALE == SCALE_ROW:
        x = x * tl.load(scale_ptr + rows, mask=live, other=0.0)[:, None]
    elif SCALE == SCALE_DIM:
        x = x * tl.load(scale_ptr + cols, mask=cols < D, other=0.0)[None, :]
    return x


@triton.jit
def _row_operands(x, COMPUTE: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr):
    """What the first layer multiplies, (high, low); without EXACT both are the rounded rows."""
    if EXACT:
        high, low = _split(x, UPCAST)
    else:
        high = _cast(x, COMPUTE, UPCAST)
        low = high
    return high, low


@triton.jit
def _first_product(
    high, low, w_ptr, hidden, inside, cols, acc, PART: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + rows @ first layer's weights of the hidden channels, over the columns ``cols``."""
    pitch: tl.constexpr = 3 * PART if EXACT else PART
    at = w_ptr + hidden[:, None] * pitch + cols[None, :]
    mask = inside[:, None] & (cols < PART)[None, :]
    w = tl.load(at, mask=mask, other=0.0)
    if EXACT:
        acc = _product(low, w, acc, PRECISION, UPCAST)
        acc = _product(high, w, acc, PRECISION, UPCAST)
        w_low = tl.load(at + 2 * PART, mask=mask, other=0.0)
        return _product(high, w_low, acc, PRECISION, UPCAST)
    else:
        return _product(high, w, acc, PRECISION, UPCAST)


@triton.jit
def _branch(
    x_ptr, x_scale_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, next_ptr, shift_ptr, out_ptr, row0, n_rows, stride_x,
    stride_out,
    D: tl.constexpr, PART: tl.constexpr, H: tl.constexpr, PITCH2: tl.constexpr, N: tl.constexpr,
    SCALE: tl.constexpr, RELU1: tl.constexpr, RELU2: tl.constexpr, COMPUTE: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Two layers for BM rows; the hidden layer lives in registers, BH channels at a time."""
    local = tl.program_id(0) * BM + tl.arange(0, BM)
    live = local < n_rows
    rows = row0 + local.to(tl.int64)
    outs = tl.arange(0, BN)
    depth = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if D <= BK:
        x = _gallery_tile(x_ptr, x_scale_ptr, rows, live, depth, stride_x, D, BK, SCALE)
        high, low = _row_operands(x, COMPUTE, EXACT, UPCAST)
    for h0 in range(0, H, BH):
        hidden = h0 + tl.arange(0, BH)
        inside_h = hidden < H
        part = tl.zeros((BM, BH), dtype=tl.float32)
        if D <= BK:
            part = _first_product(high, low, w1_ptr, hidden, inside_h, depth, part, PART, EXACT, PRECISION, UPCAST)
        else:
            for k0 in range(0, D, BK):
                cols = k0 + depth
                x = _gallery_tile(x_ptr, x_scale_ptr, rows, live, cols, stride_x, D, BK, SCALE)
                high, low = _row_operands(x, COMPUTE, EXACT, UPCAST)
                part = _first_product(high, low, w1_ptr, hidden, inside_h, cols, part, PART, EXACT, PRECISION, UPCAST)
        part += tl.load(b1_ptr + hidden, mask=inside_h, other=0.0)[None, :]
        if RELU1:
            part = tl.maximum(part, 0.0)
        w2 = tl.load(
            w2_ptr + outs[:, None] * PITCH2 + hidden[None, :],
            mask=(outs < N)[:, None] & (hidden < PITCH2)[None, :], other=0.0,
        )  # fmt: skip
        acc = _product(_cast(part, COMPUTE, UPCAST), w2, acc, PRECISION, UPCAST)
    acc += tl.load(b2_ptr + outs, mask=outs < N, other=0.0)[None, :]
    if RELU2:
        acc = tl.maximum(acc, 0.0)
    y = _requantise(acc, next_ptr, shift_ptr, outs, outs < N, out_ptr.dtype.element_ty, UPCAST)
    tl.store(
        out_ptr + local.to(tl.int64)[:, None] * stride_out + outs[None, :], y, mask=live[:, None] & (outs < N)[None, :]
    )


@triton.jit
def branches(
    row0_ptr, n_rows, out_ptr, stride_out, next_ptr, shift_ptr,
    old_ptr, old_scale_ptr, stride_old, old_w1, old_b1, old_w2, old_b2,
    side_ptr, side_scale_ptr, stride_side, side_w1, side_b1, side_w2, side_b2,
    OLD_D: tl.constexpr, OLD_PART: tl.constexpr, OLD_H: tl.constexpr, OLD_PITCH2: tl.constexpr, OLD_N: tl.constexpr,
    SIDE_D: tl.constexpr, SIDE_PART: tl.constexpr, SIDE_H: tl.constexpr, SIDE_PITCH2: tl.constexpr,
    SIDE_N: tl.constexpr, OLD_SCALE: tl.constexpr, SIDE_SCALE: tl.constexpr,
    OLD_RELU1: tl.constexpr, OLD_RELU2: tl.constexpr, SIDE_RELU1: tl.constexpr, SIDE_RELU2: tl.constexpr,
    COMPUTE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Both branches of h, two layers each, grid (row tiles, 2): gallery rows in, their half of the concatenation out.

    out: (n_rows, OLD_N + SIDE_N) of the next layer's operand dtype; row i is gallery row row0 + i.
    """
    row0 = tl.load(row0_ptr)
    if tl.program_id(1) == 0:
        _branch(
            old_ptr, old_scale_ptr, old_w1, old_b1, old_w2, old_b2, next_ptr, shift_ptr, out_ptr, row0, n_rows,
            stride_old, stride_out, OLD_D, OLD_PART, OLD_H, OLD_PITCH2, OLD_N, OLD_SCALE, OLD_RELU1, OLD_RELU2,
            COMPUTE, EXACT, BM, BK, BH, BN, PRECISION, UPCAST,
        )  # fmt: skip
    else:
        _branch(
            side_ptr, side_scale_ptr, side_w1, side_b1, side_w2, side_b2, next_ptr + OLD_N, shift_ptr + OLD_N,
            out_ptr + OLD_N, row0, n_rows, stride_side, stride_out, SIDE_D, SIDE_PART, SIDE_H, SIDE_PITCH2, SIDE_N,
            SIDE_SCALE, SIDE_RELU1, SIDE_RELU2, COMPUTE, EXACT, BM, BK, BH, BN, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def ingest(
    row0_ptr, n_rows, x_ptr, scale_ptr, stride_x, out_ptr, stride_out, PART: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gallery rows as the first layer's operand, for layer plans that ``branches`` does not cover. Grid (tiles, tiles).

    EXACT: three parts of PART columns each, zero beyond D, since the product walks across them.
    """
    row0 = tl.load(row0_ptr)
    local = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    live = local < n_rows
    x = _gallery_tile(x_ptr, scale_ptr, row0 + local.to(tl.int64), live, cols, stride_x, D, BN, SCALE)
    at = out_ptr + local.to(tl.int64)[:, None] * stride_out + cols[None, :]
    if EXACT:
        inside = live[:, None] & (cols < PART)[None, :]
        high, low = _split(x, UPCAST)
        tl.store(at, high, mask=inside)
        tl.store(at + PART, low, mask=inside)
        tl.store(at + 2 * PART, high, mask=inside)
    else:
        tl.store(at, _cast(x, out_ptr.dtype.element_ty, UPCAST), mask=live[:, None] & (cols < D)[None, :])


@triton.jit
def _operand_tile(ptr, first_row, first_col, n_rows, stride, K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                  TMA: tl.constexpr):  # fmt: skip
    """A (ROWS, COLS) tile of a K-wide operand, zero outside; through a TMA descriptor or 16-byte async copies."""
    if TMA:
        return ptr.load([first_row, first_col])
    else:
        rows = first_row + tl.arange(0, ROWS)
        cols = first_col + tl.arange(0, COLS)
        at = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
        if K % COLS == 0:
            return tl.load(at, mask=(rows < n_rows)[:, None], other=0.0)
        else:
            return tl.load(at, mask=(rows < n_rows)[:, None] & (cols < K)[None, :], other=0.0)


@triton.jit
def _matmul_tile(
    a_ptr, w_ptr, m0, n0, n_rows, stride_a, stride_w, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, INT8: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BM, BN), dtype=tl.int32 if INT8 else tl.float32)
    for k0 in range(0, K, BK):
        a = _operand_tile(a_ptr, m0, k0, n_rows, stride_a, K, BM, BK, TMA)
        w = _operand_tile(w_ptr, n0, k0, N, stride_w, K, BN, BK, TMA)
        acc = _product(a, w, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def tile_order(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row tile, column tile) of ``linear``'s tile number ``tile``: GROUP row tiles share their weight columns before
    the walk moves on. In plain Python too, as ``tile_order.fn``: what tools.gpu_traffic walks."""
    group = tile // (GROUP * tiles_n)
    first = group * GROUP
    height = min(tiles_m - first, GROUP)
    within = tile % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def linear(
    n_rows, a_ptr, stride_a, w_ptr, stride_w, scale_ptr, bias_ptr, next_ptr, shift_ptr, out_ptr, stride_out,
    N: tl.constexpr, K: tl.constexpr, RELU: tl.constexpr, SCALED: tl.constexpr, INT8: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (n_rows, N) = relu(a (n_rows, K) @ w (N, K).T * scale + bias), requantised for the next layer.

    Persistent: the grid is the number of multiprocessors, each program walks tiles in ``tile_order``, so that both
    operands are found in L2.
    """
    tiles_m = tl.cdiv(n_rows, BM)
    tiles_n: tl.constexpr = (N + BN - 1) // BN
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, tiles_m, tiles_n, GROUP)
        m0 = tile_m * BM
        n0 = tile_n * BN
        acc = _matmul_tile(
            a_ptr, w_ptr, m0, n0, n_rows, stride_a, stride_w, N, K, BM, BN, BK, INT8, TMA, PRECISION, UPCAST
        )
        rows = m0 + tl.arange(0, BM)
        cols = n0 + tl.arange(0, BN)
        inside = cols < N
        y = acc.to(tl.float32)
        if SCALED:
            y = y * tl.load(scale_ptr + cols, mask=inside, other=0.0)[None, :]
        y += tl.load(bias_ptr + cols, mask=inside, other=0.0)[None, :]
        if RELU:
            y = tl.maximum(y, 0.0)
        y = _requantise(y, next_ptr, shift_ptr, cols, inside, out_ptr.dtype.element_ty, UPCAST)
        tl.store(
            out_ptr + rows.to(tl.int64)[:, None] * stride_out + cols[None, :],
            y,
            mask=(rows < n_rows)[:, None] & inside[None, :],
        )


@triton.jit
def _unit_length(y):
    """Rows brought to length 1; a zero row stays zero. The largest element is taken out first: no overflow."""
    top = tl.max(tl.abs(y), axis=1)
    y = y / tl.where(top > 0, top, 1.0)[:, None]
    norm = tl.sqrt(tl.sum(y * y, axis=1))
    return y / tl.where(norm > 0, norm, 1.0)[:, None]


@triton.jit
def _store_gallery(
    y, out_ptr, out_scale_ptr, rows, live, cols, stride_out, D: tl.constexpr, SCALE: tl.constexpr, UPCAST: tl.constexpr
):
    """float32 rows cast to the destination's dtype; int8 is divided by the destination's scale and rounded."""
    if SCALE == SCALE_ONE:
        y = y / tl.load(out_scale_ptr)
    elif SCALE == SCALE_ROW:
        y = y / tl.load(out_scale_ptr + rows, mask=live, other=1.0)[:, None]
    elif SCALE == SCALE_DIM:
        y = y / tl.load(out_scale_ptr + cols, mask=cols < D, other=1.0)[None, :]
    if SCALE != SCALE_NONE:
        y = _round_int8(y, -127.0)
    tl.store(
        out_ptr + rows[:, None] * stride_out + cols[None, :],
        y.to(tl.int8) if SCALE != SCALE_NONE else _cast(y, out_ptr.dtype.element_ty, UPCAST),
        mask=live[:, None] & (cols < D)[None, :],
    )


@triton.jit
def final(
    row0_ptr, n_rows, a_ptr, stride_a, w_ptr, stride_w, scale_ptr, bias_ptr, out_ptr, out_scale_ptr, stride_out,
    N: tl.constexpr, K: tl.constexpr, RELU: tl.constexpr, NORMALISE: tl.constexpr, SCALED: tl.constexpr,
    INT8: tl.constexpr, OUT_SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The last layer, straight into the destination's rows row0 + i: cast, and brought to unit length if asked.

    Grid (row tiles, column tiles); with NORMALISE one tile must hold the whole row (BN >= N).
    """
    tl.static_assert(not NORMALISE or BN >= N)
    row0 = tl.load(row0_ptr)
    m0 = tl.program_id(0) * BM
    n0 = tl.program_id(1) * BN
    acc = _matmul_tile(a_ptr, w_ptr, m0, n0, n_rows, stride_a, stride_w, N, K, BM, BN, BK, INT8, TMA, PRECISION, UPCAST)
    local = m0 + tl.arange(0, BM)
    cols = n0 + tl.arange(0, BN)
    y = acc.to(tl.float32)
    if SCALED:
        y = y * tl.load(scale_ptr + cols, mask=cols < N, other=0.0)[None, :]
    y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0)[None, :]
    if RELU:
        y = tl.maximum(y, 0.0)
    if NORMALISE:
        y = _unit_length(y)
    _store_gallery(
        y, out_ptr, out_scale_ptr, row0 + local.to(tl.int64), local < n_rows, cols, stride_out, N, OUT_SCALE, UPCAST
    )


@triton.jit
def normalise(
    row0_ptr, n_rows, y_ptr, stride_y, out_ptr, out_scale_ptr, stride_out,
    N: tl.constexpr, OUT_SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Unit length and cast for rows too wide for one tile of ``final``: float32 scratch in, destination out."""
    row0 = tl.load(row0_ptr)
    local = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BN)
    live = local < n_rows
    y = tl.load(
        y_ptr + local.to(tl.int64)[:, None] * stride_y + cols[None, :],
        mask=live[:, None] & (cols < N)[None, :], other=0.0,
    )  # fmt: skip
    _store_gallery(
        _unit_length(y), out_ptr, out_scale_ptr, row0 + local.to(tl.int64), live, cols, stride_out, N, OUT_SCALE, UPCAST
    )
