"""h on a GPU: ``branches`` (both input branches), ``linear`` (the wide middle), ``final`` (the last layer);
``first_layers`` where a branch has one layer alone, and for the skip.

Layout, for all kernels: activations are row-major with a pitch that is a multiple of 16 bytes; weights are
``(N, K)`` as the artifact stores them, K padded with zeros to the pitch, so a tile is one 16-byte-aligned copy.
Widths are compile-time constants (an artifact's never change), rows are not; row offsets are 64-bit. ``row0``
points to one int64 in device memory, the chunk's first row in the gallery, so that a captured graph can be replayed
for chunk after chunk. Products accumulate in float32 (int8: int32).

``HOW.exact``: the layers that read the gallery's rows multiply almost as float32 does. Row and weight are split into
two bfloat16 parts, high and low, and three products are summed in float32: high x high, low x high, high x low; the
fourth lies 2^-16 below. bfloat16 for fp16 too, in which low parts would underflow. Such weights are stored as
[high, high, low], PART columns each, and ``ingest`` writes rows as [high, low, high], so that there the same sum is one
``linear`` of three times the depth.

``upcast`` is for Triton's interpreter, whose product of bfloat16 operands is wrong (they become float32 there) and
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
def _store_operand(y, out, rows, live, cols, inside, UPCAST: tl.constexpr):
    """float32 into the next layer's operand: plain cast, or times the channel's ``mul`` first for int8 and FP8.

    int8 adds the channel's ``add``: all 256 values stand for the calibrated range, wherever that lies.
    """
    DTYPE: tl.constexpr = out.data.dtype.element_ty
    if DTYPE == tl.int8:
        mul = tl.load(out.mul + cols, mask=inside, other=0.0)
        add = tl.load(out.add + cols, mask=inside, other=0.0)
        y = _round_int8(y * mul[None, :] + add[None, :], -128.0)
    elif DTYPE == tl.float8e4nv:
        mul = tl.load(out.mul + cols, mask=inside, other=0.0)
        y = y * mul[None, :]
        y = _cast(tl.minimum(tl.maximum(y, -448.0), 448.0), DTYPE, UPCAST)  # 448: e4m3's largest
    else:
        y = _cast(y, DTYPE, UPCAST)
    at = out.data + rows.to(tl.int64)[:, None] * out.stride + cols[None, :]
    tl.store(at, y, mask=live[:, None] & inside[None, :])


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
def _row_parts(x, HOW: tl.constexpr):
    """What the first layer multiplies, (high, low); where rows are rounded both are the rounded rows."""
    if HOW.exact:
        high, low = _split(x, HOW.upcast)
    else:
        high = _cast(x, HOW.compute, HOW.upcast)
        low = high
    return high, low


@triton.jit
def _first_product(high, low, w1, outs, inside, cols, acc, PART: tl.constexpr, HOW: tl.constexpr):
    """acc + rows @ first weights of the channels ``outs``, over the columns ``cols``."""
    pitch: tl.constexpr = 3 * PART if HOW.exact else PART
    at = w1 + outs[:, None] * pitch + cols[None, :]
    mask = inside[:, None] & (cols < PART)[None, :]
    w = tl.load(at, mask=mask, other=0.0)
    if HOW.exact:
        acc = _product(low, w, acc, HOW.precision, HOW.upcast)
        acc = _product(high, w, acc, HOW.precision, HOW.upcast)
        w_low = tl.load(at + 2 * PART, mask=mask, other=0.0)
        return _product(high, w_low, acc, HOW.precision, HOW.upcast)
    else:
        return _product(high, w, acc, HOW.precision, HOW.upcast)


@triton.jit
def _branch(row0, n_rows, joined, first, branch, SHAPE: tl.constexpr, TILE: tl.constexpr, HOW: tl.constexpr):
    """Columns first, first + 1, ... of ``joined`` for one tile of rows; the hidden layer lives in registers,
    TILE.hidden channels at a time."""
    local = tl.program_id(0) * TILE.m + tl.arange(0, TILE.m)
    live = local < n_rows
    at = row0 + local.to(tl.int64)
    outs = tl.arange(0, TILE.n)
    depth = tl.arange(0, TILE.k)
    rows = branch.rows
    acc = tl.zeros((TILE.m, TILE.n), dtype=tl.float32)
    if SHAPE.d <= TILE.k:
        x = _gallery_tile(rows.data, rows.scale, at, live, depth, rows.stride, SHAPE.d, TILE.k, SHAPE.scale)
        high, low = _row_parts(x, HOW)
    for h0 in range(0, SHAPE.hidden, TILE.hidden):
        hidden = h0 + tl.arange(0, TILE.hidden)
        inside = hidden < SHAPE.hidden
        part = tl.zeros((TILE.m, TILE.hidden), dtype=tl.float32)
        if SHAPE.d <= TILE.k:
            part = _first_product(high, low, branch.w1, hidden, inside, depth, part, SHAPE.part, HOW)
        else:
            for k0 in range(0, SHAPE.d, TILE.k):
                cols = k0 + depth
                x = _gallery_tile(rows.data, rows.scale, at, live, cols, rows.stride, SHAPE.d, TILE.k, SHAPE.scale)
                high, low = _row_parts(x, HOW)
                part = _first_product(high, low, branch.w1, hidden, inside, cols, part, SHAPE.part, HOW)
        part += tl.load(branch.b1 + hidden, mask=inside, other=0.0)[None, :]
        if SHAPE.relu1:
            part = tl.maximum(part, 0.0)
        w2 = tl.load(
            branch.w2 + outs[:, None] * SHAPE.pitch + hidden[None, :],
            mask=(outs < SHAPE.n)[:, None] & (hidden < SHAPE.pitch)[None, :], other=0.0,
        )  # fmt: skip
        acc = _product(_cast(part, HOW.compute, HOW.upcast), w2, acc, HOW.precision, HOW.upcast)
    acc += tl.load(branch.b2 + outs, mask=outs < SHAPE.n, other=0.0)[None, :]
    if SHAPE.relu2:
        acc = tl.maximum(acc, 0.0)
    _store_operand(acc, joined, local, live, first + outs, outs < SHAPE.n, HOW.upcast)


@triton.jit
def branches(
    row0, n_rows, joined, old, side,
    OLD: tl.constexpr, SIDE: tl.constexpr, TILE: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """Both branches of h, two layers each: gallery rows in, their halves of the mixer's operand out.

        joined[i] = q([relu(W2 relu(W1 old[row0 + i] + b1) + b2), the same of side[row0 + i] by its own layers])

    joined: Operand of OLD.n + SIDE.n columns, q its quantisation. old, side: Branch; OLD, SIDE: BranchShape.
    Grid (row tiles, 2). TILE: m rows; a branch's whole output in n columns; k of its inputs and ``hidden`` of its
    hidden channels at a time.
    """
    first_row = tl.load(row0)
    if tl.program_id(1) == 0:
        _branch(first_row, n_rows, joined, 0, old, OLD, TILE, HOW)
    else:
        _branch(first_row, n_rows, joined, OLD.n, side, SIDE, TILE, HOW)


@triton.jit
def _read(acc, first_row, n_rows, layer, tile, SHAPE: tl.constexpr, TILE: tl.constexpr, HOW: tl.constexpr):
    """acc + this program's rows @ weights, for tile number ``tile`` of the layer's outputs."""
    local = tl.program_id(1) * TILE.m + tl.arange(0, TILE.m)
    outs = (tile * TILE.n + tl.arange(0, TILE.n)).to(tl.int64)
    rows = layer.rows
    for k0 in range(0, SHAPE.d, TILE.k):
        cols = k0 + tl.arange(0, TILE.k)
        x = _gallery_tile(
            rows.data, rows.scale, first_row + local.to(tl.int64), local < n_rows, cols, rows.stride, SHAPE.d, TILE.k,
            SHAPE.scale,
        )  # fmt: skip
        high, low = _row_parts(x, HOW)
        acc = _first_product(high, low, layer.weight, outs, outs < SHAPE.n, cols, acc, SHAPE.part, HOW)
    return acc


@triton.jit
def _finish(y, tile, n_rows, out, first, bias, SHAPE: tl.constexpr, TILE: tl.constexpr, HOW: tl.constexpr):
    """Bias, ReLU, and into the columns first, first + 1, ... of ``out``: of a layer's outputs, tile number ``tile``."""
    local = tl.program_id(1) * TILE.m + tl.arange(0, TILE.m)
    outs = tile * TILE.n + tl.arange(0, TILE.n)
    y += tl.load(bias + outs, mask=outs < SHAPE.n, other=0.0)[None, :]
    if SHAPE.relu:
        y = tl.maximum(y, 0.0)
    _store_operand(y, out, local, local < n_rows, first + outs, outs < SHAPE.n, HOW.upcast)


@triton.jit
def first_layers(
    row0, n_rows, joined, added, old, side, skip_old, skip_side,
    SHAPES: tl.constexpr, TILE: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """Branches of one layer, and the skip: what reads the gallery's rows and is no deeper.

        joined[i] = q([relu(W old[row0 + i] + b), relu(W' side[row0 + i] + b')])
        added[i] = S [old[row0 + i], side[row0 + i]] + c

    joined: Operand, q its quantisation; added: Operand of float32. old, side, skip_old, skip_side: RowLayer, c the bias
    of skip_old. Layers that SHAPES, FirstShapes, does not have are neither read nor written. Grid (column tiles of
    old, of side, of the skip; row tiles), so that programs which read the same rows run together. TILE: m rows, n
    outputs, k inputs at a time.
    """
    first_row = tl.load(row0)
    column = tl.program_id(0)
    side_from: tl.constexpr = (SHAPES.old.n + TILE.n - 1) // TILE.n
    skip_from: tl.constexpr = side_from + (SHAPES.side.n + TILE.n - 1) // TILE.n
    zero = tl.zeros((TILE.m, TILE.n), dtype=tl.float32)
    if SHAPES.old.n > 0:
        if column < side_from:
            y = _read(zero, first_row, n_rows, old, column, SHAPES.old, TILE, HOW)
            _finish(y, column, n_rows, joined, 0, old.bias, SHAPES.old, TILE, HOW)
    if SHAPES.side.n > 0:
        if (column >= side_from) & (column < skip_from):
            tile = column - side_from
            y = _read(zero, first_row, n_rows, side, tile, SHAPES.side, TILE, HOW)
            _finish(y, tile, n_rows, joined, SHAPES.before_side, side.bias, SHAPES.side, TILE, HOW)
    if SHAPES.skip_old.n > 0:
        if column >= skip_from:
            tile = column - skip_from
            y = _read(zero, first_row, n_rows, skip_old, tile, SHAPES.skip_old, TILE, HOW)
            if SHAPES.skip_side.n > 0:
                y = _read(y, first_row, n_rows, skip_side, tile, SHAPES.skip_side, TILE, HOW)
            _finish(y, tile, n_rows, added, 0, skip_old.bias, SHAPES.skip_old, TILE, HOW)


@triton.jit
def ingest(
    row0, n_rows, rows, out,
    D: tl.constexpr, PART: tl.constexpr, SCALE: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gallery rows as the first layer's operand, for layer plans that ``branches`` does not cover.

        out[i] = x = rows[row0 + i], or with PART [high(x), low(x), high(x)], PART columns each

    rows: Gallery of D columns; out: Operand. The three parts are zero beyond D, since the product walks across them.
    Grid (row tiles, column tiles) of TILE.m x TILE.n.
    """
    first_row = tl.load(row0)
    local = tl.program_id(0) * TILE.m + tl.arange(0, TILE.m)
    cols = tl.program_id(1) * TILE.n + tl.arange(0, TILE.n)
    live = local < n_rows
    x = _gallery_tile(rows.data, rows.scale, first_row + local.to(tl.int64), live, cols, rows.stride, D, TILE.n, SCALE)
    at = out.data + local.to(tl.int64)[:, None] * out.stride + cols[None, :]
    if PART > 0:
        inside = live[:, None] & (cols < PART)[None, :]
        high, low = _split(x, UPCAST)
        tl.store(at, high, mask=inside)
        tl.store(at + PART, low, mask=inside)
        tl.store(at + 2 * PART, high, mask=inside)
    else:
        tl.store(at, _cast(x, out.data.dtype.element_ty, UPCAST), mask=live[:, None] & (cols < D)[None, :])


@triton.jit
def _operand_tile(at, first_row, first_col, n_rows, stride, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """A (ROWS, TILE.k) tile of a K-wide operand, zero outside; ``at``: a TMA descriptor, or a pointer."""
    if TILE.tma:
        return at.load([first_row, first_col])
    else:
        rows = first_row + tl.arange(0, ROWS)
        cols = first_col + tl.arange(0, TILE.k)
        at = at + rows.to(tl.int64)[:, None] * stride + cols[None, :]
        if K % TILE.k == 0:
            return tl.load(at, mask=(rows < n_rows)[:, None], other=0.0)
        else:
            return tl.load(at, mask=(rows < n_rows)[:, None] & (cols < K)[None, :], other=0.0)


@triton.jit
def _layer_tile(
    m0, n0, n_rows, a, a_stride, w, layer, SHAPE: tl.constexpr, TILE: tl.constexpr, HOW: tl.constexpr
):  # fmt: skip
    """(a W' * scale + bias), with its ReLU if it has one: the (TILE.m, TILE.n) outputs at (m0, n0), in float32."""
    INT8: tl.constexpr = HOW.compute == tl.int8
    acc = tl.zeros((TILE.m, TILE.n), dtype=tl.int32 if INT8 else tl.float32)
    for k0 in range(0, SHAPE.k, TILE.k):
        x = _operand_tile(a, m0, k0, n_rows, a_stride, SHAPE.k, TILE.m, TILE)
        weights = _operand_tile(w, n0, k0, SHAPE.n, layer.stride, SHAPE.k, TILE.n, TILE)
        acc = _product(x, weights, acc, HOW.precision, HOW.upcast)
    cols = n0 + tl.arange(0, TILE.n)
    inside = cols < SHAPE.n
    y = acc.to(tl.float32)
    if layer.scale is not None:
        y = y * tl.load(layer.scale + cols, mask=inside, other=0.0)[None, :]
    y += tl.load(layer.bias + cols, mask=inside, other=0.0)[None, :]
    if SHAPE.relu:
        y = tl.maximum(y, 0.0)
    return y


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
    n_rows, a, a_stride, w, layer, out,
    SHAPE: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """One layer of the mixer.

        out = q(relu(a W' * scale + bias)),    a (n_rows, k), W (n, k), out (n_rows, n)

    a, w: pointers, or TMA descriptors where TILE says so. layer: Layer; out: Operand, q its quantisation; SHAPE:
    LayerShape. Persistent: the grid is the number of multiprocessors, each program walks tiles in ``tile_order``, so
    that both operands are found in L2.
    """
    tiles_m = tl.cdiv(n_rows, TILE.m)
    tiles_n: tl.constexpr = (SHAPE.n + TILE.n - 1) // TILE.n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, tiles_m, tiles_n, GROUP)
        m0 = tile_m * TILE.m
        n0 = tile_n * TILE.n
        y = _layer_tile(m0, n0, n_rows, a, a_stride, w, layer, SHAPE, TILE, HOW)
        rows = m0 + tl.arange(0, TILE.m)
        cols = n0 + tl.arange(0, TILE.n)
        _store_operand(y, out, rows, rows < n_rows, cols, cols < SHAPE.n, HOW.upcast)


@triton.jit
def _of_length(y, LENGTH: tl.constexpr):
    """Rows brought to LENGTH; a zero row stays zero. The largest element is taken out first: no overflow."""
    top = tl.max(tl.abs(y), axis=1)
    y = y / tl.where(top > 0, top, 1.0)[:, None]
    norm = tl.sqrt(tl.sum(y * y, axis=1))
    y = y / tl.where(norm > 0, norm, 1.0)[:, None]
    if LENGTH != 1:
        y = y * LENGTH
    return y


@triton.jit
def _store_gallery(y, out, rows, live, cols, D: tl.constexpr, SCALE: tl.constexpr, UPCAST: tl.constexpr):
    """float32 rows cast to the destination's dtype; int8 is divided by the destination's scale and rounded."""
    if SCALE == SCALE_ONE:
        y = y / tl.load(out.scale)
    elif SCALE == SCALE_ROW:
        y = y / tl.load(out.scale + rows, mask=live, other=1.0)[:, None]
    elif SCALE == SCALE_DIM:
        y = y / tl.load(out.scale + cols, mask=cols < D, other=1.0)[None, :]
    if SCALE != SCALE_NONE:
        y = _round_int8(y, -127.0)
    tl.store(
        out.data + rows[:, None] * out.stride + cols[None, :],
        y.to(tl.int8) if SCALE != SCALE_NONE else _cast(y, out.data.dtype.element_ty, UPCAST),
        mask=live[:, None] & (cols < D)[None, :],
    )


@triton.jit
def final(
    row0, n_rows, a, a_stride, w, layer, added, out,
    SHAPE: tl.constexpr, LENGTH: tl.constexpr, SCALE: tl.constexpr, TILE: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """The last layer, straight into the destination.

        y = a W' * scale + bias + added,    out[row0 + i] = y[i], or LENGTH * y[i] / |y[i]| where LENGTH > 0, cast

    a, w, layer, SHAPE: as ``linear`` has them. added: Operand of float32, the skip's output, or None. out: Gallery,
    whose scale lies as SCALE says. Grid (row tiles, column tiles); with LENGTH one tile must hold the whole row.
    """
    tl.static_assert(LENGTH == 0 or TILE.n >= SHAPE.n)
    first_row = tl.load(row0)
    m0 = tl.program_id(0) * TILE.m
    n0 = tl.program_id(1) * TILE.n
    y = _layer_tile(m0, n0, n_rows, a, a_stride, w, layer, SHAPE, TILE, HOW)
    local = m0 + tl.arange(0, TILE.m)
    cols = n0 + tl.arange(0, TILE.n)
    if added is not None:
        at = added.data + local.to(tl.int64)[:, None] * added.stride + cols[None, :]
        y += tl.load(at, mask=(local < n_rows)[:, None] & (cols < SHAPE.n)[None, :], other=0.0)
    if LENGTH > 0:
        y = _of_length(y, LENGTH)
    _store_gallery(y, out, first_row + local.to(tl.int64), local < n_rows, cols, SHAPE.n, SCALE, HOW.upcast)


@triton.jit
def normalise(
    row0, n_rows, y, y_stride, out,
    N: tl.constexpr, LENGTH: tl.constexpr, SCALE: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[row0 + i] = LENGTH * y[i] / |y[i]|, cast, for rows too wide for one tile of ``final``.

    y: float32 scratch of N columns; out: Gallery. Grid (row tiles,); TILE: m rows of n >= N columns.
    """
    first_row = tl.load(row0)
    local = tl.program_id(0) * TILE.m + tl.arange(0, TILE.m)
    cols = tl.arange(0, TILE.n)
    live = local < n_rows
    values = tl.load(
        y + local.to(tl.int64)[:, None] * y_stride + cols[None, :],
        mask=live[:, None] & (cols < N)[None, :], other=0.0,
    )  # fmt: skip
    values = _of_length(values, LENGTH)
    _store_gallery(values, out, first_row + local.to(tl.int64), live, cols, N, SCALE, UPCAST)
