// With the broadcast inside the instruction: as a load of its own it takes a place in the pipes that add and multiply
// (Zen 4: 98 % of the peak against 70 %).
inline __m512d difference(__m512d x, const double* y) {
    __m512d out;
    asm("vsubpd %2%{1to8%}, %1, %0" : "=v"(out) : "v"(x), "m"(*y));
    return out;
}

inline __m512d add_product(__m512d sum, __m512d x, const double* y) {
    asm("vfmadd231pd %2%{1to8%}, %1, %0" : "+v"(sum) : "v"(x), "m"(*y));
    return sum;
}

inline int count_within(const float* x, float limit) {
    return __builtin_popcount(_mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(limit), _CMP_LE_OQ));
}

// The scan of a tile in four 512-bit vectors of 16 rows; dot4(sum, bytes, word) comes from the includer.
//
// The sums begin at minus what they have to reach, so that the sign says whether a row counts: nothing has to be
// converted, scaled and compared afterwards. Rounding that start may take off up to half a whole number, and 2^-22 of
// the init in it, which is added; its other roundings are relative to the threshold and to half and within their slack.
template <bool half>
inline __m512i start_of(const ScanTile& tile, const ScanQueries& queries, int64_t q, int v) {
    const float init = static_cast<float>(queries.init[q]);
    const float extra = 1 + (init < 0 ? -init : init) * 0x1p-22f;
    __m512 start = _mm512_set1_ps(init + extra);
    if (half)
        start = _mm512_fnmadd_ps(_mm512_set1_ps(queries.limit_inverse[q]), _mm512_load_ps(tile.half_inverse + 16 * v),
                                 start);
    return _mm512_cvtps_epi32(
        _mm512_fnmadd_ps(_mm512_set1_ps(queries.limit[q]), _mm512_load_ps(tile.inverse + 16 * v), start));
}

template <int group, bool half>
bool scan_vectors(const ScanTile& tile, int64_t steps, const ScanQueries& queries, int64_t first, uint64_t* masks,
                  float* keys) {
    const int32_t* const words = queries.words + first * steps;
    __m512i sums[group][4];
#pragma GCC unroll 8
    for (int q = 0; q < group; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sums[q][v] = start_of<half>(tile, queries, first + q, v);
    for (int64_t k = 0; k < steps; ++k) {
        __m512i x[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) x[v] = _mm512_loadu_si512(tile.values + k * 4 * kTile + v * 64);
#pragma GCC unroll 8
        for (int q = 0; q < group; ++q) {
            const __m512i y = _mm512_set1_epi32(words[k * group + q]);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) sums[q][v] = dot4(sums[q][v], x[v], y);
        }
    }
    __m512i below[group];  // the sign is set where no row of the four counts
    __m512i all = _mm512_set1_epi32(-1);
#pragma GCC unroll 8
    for (int q = 0; q < group; ++q) {
        below[q] = _mm512_and_si512(_mm512_and_si512(sums[q][0], sums[q][1]), _mm512_and_si512(sums[q][2], sums[q][3]));
        all = _mm512_and_si512(all, below[q]);
    }
    if (__builtin_expect(_mm512_movepi32_mask(all) == 0xffff, 1)) return false;
    uint64_t any = 0;
#pragma GCC unroll 8
    for (int q = 0; q < group; ++q) {
        masks[q] = 0;
        if (_mm512_movepi32_mask(below[q]) == 0xffff) continue;
        const __m512 y = _mm512_set1_ps(queries.inverse[first + q]);
        const __m512 limit = _mm512_set1_ps(queries.threshold[first + q]);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const __m512i product =
                _mm512_add_epi32(_mm512_sub_epi32(sums[q][v], start_of<half>(tile, queries, first + q, v)),
                                 _mm512_set1_epi32(queries.init[first + q]));
            const __m512 key =
                _mm512_fnmadd_ps(_mm512_loadu_ps(tile.half() + 16 * v), y,
                                 _mm512_mul_ps(_mm512_cvtepi32_ps(product), _mm512_loadu_ps(tile.scale() + 16 * v)));
            _mm512_storeu_ps(keys + q * kTile + v * 16, key);
            masks[q] |= static_cast<uint64_t>(_mm512_cmp_ps_mask(key, limit, _CMP_GE_OQ)) << (16 * v);
        }
        any |= masks[q];
    }
    return any != 0;
}

template <int group>
bool scan_products(const ScanTile& tile, int64_t steps, const ScanQueries& queries, int64_t first, uint64_t* masks,
                   float* keys) {
    return tile.has_half ? scan_vectors<group, true>(tile, steps, queries, first, masks, keys)
                         : scan_vectors<group, false>(tile, steps, queries, first, masks, keys);
}
