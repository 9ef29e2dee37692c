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
// What an unread tail may add lowers it, to no less than what every row reaches.
template <bool half, bool tail>
inline __m512i start_of(const ScanTile& tile, const ScanQueries& queries, int64_t q, int v) {
    const float init = static_cast<float>(queries.init[q]);
    const float extra = 1 + (init < 0 ? -init : init) * 0x1p-22f;
    __m512 start = _mm512_set1_ps(init + extra);
    if (half)
        start = _mm512_fnmadd_ps(_mm512_set1_ps(queries.limit_inverse[q]), _mm512_load_ps(tile.half_inverse + 16 * v),
                                 start);
    if (tail)
        start = _mm512_fmadd_ps(_mm512_set1_ps(queries.per_tail[q]), _mm512_load_ps(tile.tail_inverse + 16 * v), start);
    start = _mm512_fnmadd_ps(_mm512_set1_ps(queries.limit[q]), _mm512_load_ps(tile.inverse + 16 * v), start);
    if (tail) start = _mm512_min_ps(start, _mm512_set1_ps(init + tile.room));  // which also a NaN becomes
    return _mm512_cvtps_epi32(start);
}

// Sixteen rows' values of step k, which is odd or even.
template <Values values>
inline __m512i values_of(const ScanTile& tile, int64_t k, bool odd, int v) {
    if (values == Values::bytes) return _mm512_loadu_si512(tile.values + k * 4 * kTile + v * 64);
    const int64_t at = k / 2 * 4 * kTile + v * 64;
    const __m512i upper = _mm512_set1_epi8(static_cast<char>(0xf0));
    __m512i x = _mm512_loadu_si512(tile.values + at);
    if (odd) x = _mm512_slli_epi32(x, 4);
    if (values == Values::high) return _mm512_and_si512(x, upper);
    __m512i low = _mm512_loadu_si512(tile.low + at);
    if (odd) low = _mm512_srli_epi32(low, 4);
    return _mm512_ternarylogic_epi32(upper, x, low, 0xca);  // x where upper, else low
}

template <int group, bool half, bool tail, Values values>
bool scan_vectors(const ScanTile& tile, int64_t steps, const ScanQueries& queries, int64_t first, uint64_t* masks,
                  float* keys) {
    const int32_t* const words = queries.words + first * queries.stride;
    __m512i sums[group][4];
#pragma GCC unroll 8
    for (int q = 0; q < group; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sums[q][v] = start_of<half, tail>(tile, queries, first + q, v);
    // One query has few sums, each of which waits for itself: the odd steps go into others.
    constexpr bool apart = group == 1;
    __m512i odd_sums[4] = {};
    const auto multiply = [&](int64_t k, const __m512i(&x)[4], bool odd) {
#pragma GCC unroll 8
        for (int q = 0; q < group; ++q) {
            const __m512i y = _mm512_set1_epi32(words[k * group + q]);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                __m512i& sum = apart && odd ? odd_sums[v] : sums[q][v];
                sum = dot4(sum, x[v], y);
            }
        }
    };
    int64_t k = 0;
    for (__m512i x[4]; k + 1 < steps; k += 2) {
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) x[v] = values_of<values>(tile, k + odd, odd, v);
            multiply(k + odd, x, odd);
        }
    }
    for (__m512i x[4]; values == Values::bytes && k < steps; ++k) {  // halves have an even number
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) x[v] = values_of<values>(tile, k, false, v);
        multiply(k, x, false);
    }
#pragma GCC unroll 4
    for (int v = 0; apart && v < 4; ++v) sums[0][v] = _mm512_add_epi32(sums[0][v], odd_sums[v]);
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
                _mm512_add_epi32(_mm512_sub_epi32(sums[q][v], start_of<half, tail>(tile, queries, first + q, v)),
                                 _mm512_set1_epi32(queries.init[first + q]));
            const __m512 key =
                _mm512_fnmadd_ps(_mm512_loadu_ps(tile.half() + 16 * v), y,
                                 _mm512_mul_ps(_mm512_cvtepi32_ps(product), _mm512_loadu_ps(tile.scale() + 16 * v)));
            _mm512_storeu_ps(keys + q * kTile + v * 16, key);
            const __mmask16 counts =
                tail ? _mm512_cmp_ps_mask(_mm512_fmadd_ps(_mm512_loadu_ps(tile.tails + 16 * v),
                                                          _mm512_set1_ps(queries.per_tail[first + q]), key),
                                          limit, _CMP_NLT_UQ)
                     : _mm512_cmp_ps_mask(key, limit, _CMP_GE_OQ);
            masks[q] |= static_cast<uint64_t>(counts) << (16 * v);
        }
        any |= masks[q];
    }
    return any != 0;
}

template <int group>
bool scan_products(const ScanTile& tile, int64_t steps, const ScanQueries& queries, int64_t first, uint64_t* masks,
                   float* keys) {
    const auto scan_with = [&](auto values) {
        constexpr Values with = decltype(values)::value;
        constexpr bool tail = with == Values::high;
        return tile.has_half ? scan_vectors<group, true, tail, with>(tile, steps, queries, first, masks, keys)
                             : scan_vectors<group, false, tail, with>(tile, steps, queries, first, masks, keys);
    };
    if (tile.kind == Values::high) return scan_with(std::integral_constant<Values, Values::high>{});
    if (tile.kind == Values::halves) return scan_with(std::integral_constant<Values, Values::halves>{});
    if (!tile.has_tail) return scan_with(std::integral_constant<Values, Values::bytes>{});
    return tile.has_half ? scan_vectors<group, true, true, Values::bytes>(tile, steps, queries, first, masks, keys)
                         : scan_vectors<group, false, true, Values::bytes>(tile, steps, queries, first, masks, keys);
}

inline __m512i tail_sum(const uint8_t* x, const int8_t* q, int64_t whole, __mmask64 rest) {
    __m512i sum = _mm512_setzero_si512(), other = sum;
    int64_t k = 0;
    for (; k + 128 <= whole; k += 128) {
        sum = dot4(sum, _mm512_loadu_si512(x + k), _mm512_loadu_si512(q + k));
        other = dot4(other, _mm512_loadu_si512(x + k + 64), _mm512_loadu_si512(q + k + 64));
    }
    if (k < whole) sum = dot4(sum, _mm512_loadu_si512(x + k), _mm512_loadu_si512(q + k));
    if (rest) other = dot4(other, _mm512_maskz_loadu_epi8(rest, x + whole), _mm512_loadu_si512(q + whole));
    return _mm512_add_epi32(sum, other);
}

// Four rows at a time, so that their sums are added up together.
void tails(const uint8_t* records, int64_t size, const uint8_t* rows, int count, const int8_t* q, int64_t bytes,
           int32_t* out) {
    const int64_t whole = bytes / 64 * 64;
    const __mmask64 rest = (uint64_t{1} << (bytes - whole)) - 1;
    const uint8_t* const from = records + sizeof(TailFacts);
    int i = 0;
    for (; i + 2 < count; i += 4) {
        const uint8_t* x[4];
        for (int j = 0; j < 4; ++j) x[j] = from + rows[i + j < count ? i + j : i] * size;
        __m512i sums[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[j] = _mm512_setzero_si512();
        for (int64_t k = 0; k < whole; k += 64) {
            const __m512i y = _mm512_loadu_si512(q + k);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sums[j] = dot4(sums[j], _mm512_loadu_si512(x[j] + k), y);
        }
        if (rest) {
            const __m512i y = _mm512_loadu_si512(q + whole);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sums[j] = dot4(sums[j], _mm512_maskz_loadu_epi8(rest, x[j] + whole), y);
        }
        const __m512i ab =
            _mm512_add_epi32(_mm512_unpacklo_epi32(sums[0], sums[1]), _mm512_unpackhi_epi32(sums[0], sums[1]));
        const __m512i ce =
            _mm512_add_epi32(_mm512_unpacklo_epi32(sums[2], sums[3]), _mm512_unpackhi_epi32(sums[2], sums[3]));
        const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, ce), _mm512_unpackhi_epi64(ab, ce));
        const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), four);  // out has room for a tile
    }
    for (; i < count; ++i) out[i] = _mm512_reduce_add_epi32(tail_sum(from + rows[i] * size, q, whole, rest));
}

uint64_t reaching(const float* ends, float threshold) {
    const __m512 y = _mm512_set1_ps(threshold);
    uint64_t mask = 0;
    for (int v = 0; v < 4; ++v)
        mask |= static_cast<uint64_t>(_mm512_cmp_ps_mask(_mm512_loadu_ps(ends + 16 * v), y, _CMP_NLT_UQ)) << (16 * v);
    return mask;
}
