// Part of topk_kernels.inl: a tile of the shadow is opened, aimed at by the queries, and scanned.

void open_tile(const uint8_t* values, const uint8_t* low, const float* meta, bool heads, const float* high_error,
               float room, ScanTile* tile) {
    tile->values = values;
    tile->low = low;
    tile->meta = meta;
    tile->has_tail = heads || high_error;
    tile->tails = high_error ? high_error : meta + 2 * kTile;
    tile->kind = high_error ? Values::high : low ? Values::halves : Values::bytes;
    const float* const most = meta + (heads ? 3 : 4) * kTile;
    tile->most_error = most[0];
    tile->most_norm = most[1];
    tile->most_half = most[2];
    tile->room = room;
    tile->has_half = tile->most_half > 0;
    // Lanes, since one query spends as long here as on the products, and a compiler keeps the order of a plain loop.
    Floats most_lanes{}, least_lanes = Floats{} + 3e38f, tail_lanes{};
    for (int r = 0; r < kTile; r += kFloats) {
        const Floats scale = *reinterpret_cast<const LooseFloats*>(meta + r);
        const Floats some = scale > 0.0f ? scale : Floats{} + 3e38f;
        most_lanes = scale > most_lanes ? scale : most_lanes;
        least_lanes = some < least_lanes ? some : least_lanes;
        const Floats tail = *reinterpret_cast<const LooseFloats*>(tile->tails + r);
        tail_lanes = tail > tail_lanes ? tail : tail_lanes;
    }
    float lanes[3][kFloats];
    std::memcpy(lanes[0], &most_lanes, sizeof most_lanes);
    std::memcpy(lanes[1], &least_lanes, sizeof least_lanes);
    std::memcpy(lanes[2], &tail_lanes, sizeof tail_lanes);
#pragma GCC unroll 4
    for (int width = kFloats / 2; width > 0; width /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < width; ++i) {
            lanes[0][i] = lanes[0][i] > lanes[0][i + width] ? lanes[0][i] : lanes[0][i + width];
            lanes[1][i] = lanes[1][i] < lanes[1][i + width] ? lanes[1][i] : lanes[1][i + width];
            lanes[2][i] = lanes[2][i] > lanes[2][i + width] ? lanes[2][i] : lanes[2][i + width];
        }
    if (high_error) {  // of the rows, each, in place of the tile's largest
        tile->most_norm += (tile->most_error + lanes[2][0]) * (1 + 0x1p-20f);
        tile->most_error = 0;
    }
    tile->smallest = lanes[0][0] > 0 ? lanes[1][0] : 1;
    const Floats other = Floats{} + 1 / (lanes[0][0] > 0 ? lanes[0][0] : 1);
    for (int r = 0; r < kTile; r += kFloats) {
        const Floats scale = *reinterpret_cast<const LooseFloats*>(meta + r);
        const Floats inverse = scale > 0.0f ? 1 / scale : other;
        std::memcpy(tile->inverse + r, &inverse, sizeof inverse);
        const Floats half = *reinterpret_cast<const LooseFloats*>(meta + kTile + r) * inverse;
        std::memcpy(tile->half_inverse + r, &half, sizeof half);
    }
    if (!tile->has_tail) return;
    for (int r = 0; r < kTile; ++r) tile->tail_inverse[r] = tile->tails[r] * tile->inverse[r];
}

void aim(const ScanTile& tile, const ScanQueries& queries, int64_t count) {
    const float error = tile.most_error, norm = tile.most_norm, half = tile.most_half;
    const float most = tile.room * tile.smallest;
    const ScanQueries all = queries;  // whose addresses no store below can change
#pragma GCC ivdep
    for (int64_t q = 0; q < count; ++q) {
        const float inverse = all.inverse[q];
        const float threshold =
            all.base[q] - all.per_error[q] * error - all.per_norm[q] * norm - all.per_half[q] * half;
        const float limit = threshold < most ? threshold : most;
        all.threshold[q] = threshold;
        all.limit[q] = limit > -most ? limit : -most;
        all.limit_inverse[q] = threshold < -most ? 0.0f : inverse;
    }
}

bool scan(const ScanTile& tile, int64_t steps, const ScanQueries& queries, int64_t first, int group, uint64_t* masks,
          float* keys) {
    switch (group) {
        case 1:
            return scan_products<1>(tile, steps, queries, first, masks, keys);
        case 2:
            return scan_products<2>(tile, steps, queries, first, masks, keys);
        case 4:
            return scan_products<4>(tile, steps, queries, first, masks, keys);
        default:
            return scan_products<6>(tile, steps, queries, first, masks, keys);
    }
}

void join(const uint8_t* high, const uint8_t* low, int64_t steps, uint8_t* values) {
    for (int64_t k = 0; k < steps; k += 2) {
        uint8_t *const even = values + k * 4 * kTile, *const odd = even + 4 * kTile;
        const uint8_t *const h = high + k * 2 * kTile, *const l = low + k * 2 * kTile;
#pragma GCC ivdep
        for (int i = 0; i < 4 * kTile; ++i) {
            even[i] = static_cast<uint8_t>((h[i] & 0xf0) | (l[i] & 0x0f));
            odd[i] = static_cast<uint8_t>((h[i] << 4) | (l[i] >> 4));
        }
    }
}
