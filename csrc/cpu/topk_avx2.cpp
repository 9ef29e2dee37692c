#include <immintrin.h>

#include <cstring>

#include "cpu/topk.h"
#include "cpu/topk_kernels.h"

#define FCT_TOPK_DOUBLES 4

namespace fct::cpu::avx2 {
namespace {

// Bytes are widened to 16 bits (even and odd ones apart), since _mm256_maddubs_epi16 saturates.
inline __m256i dot4(__m256i sum, __m256i x, int32_t word) {
    const __m256i even = _mm256_and_si256(x, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(x, 8);
    const __m256i y = _mm256_set1_epi32(word);
    const __m256i y_even = _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8), y_odd = _mm256_srai_epi16(y, 8);
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(even, y_even), _mm256_madd_epi16(odd, y_odd)));
}

// Eight rows' values of step k.
inline __m256i values_of(const ScanTile& tile, int64_t k, int part) {
    const auto load = [](const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); };
    if (tile.kind == Values::bytes) return load(tile.values + k * 4 * kTile + part * 32);
    const int64_t at = k / 2 * 4 * kTile + part * 32;
    const __m256i upper = _mm256_set1_epi8(static_cast<char>(0xf0)), both = load(tile.values + at);
    const __m256i high = _mm256_and_si256(k % 2 ? _mm256_slli_epi32(both, 4) : both, upper);
    if (tile.kind == Values::high) return high;
    const __m256i low = load(tile.low + at);
    return _mm256_or_si256(high, _mm256_andnot_si256(upper, k % 2 ? _mm256_srli_epi32(low, 4) : low));
}

template <int group>
bool scan_products(const ScanTile& tile, int64_t steps, const ScanQueries& queries, int64_t first, uint64_t* masks,
                   float* keys) {
    const int32_t *const words = queries.words + first * queries.stride, *const init = queries.init + first;
    const float *const inverse = queries.inverse + first, *const threshold = queries.threshold + first;
    uint64_t any = 0;
    for (int q = 0; q < group; ++q) masks[q] = 0;
    for (int part = 0; part < kTile / 8; ++part) {
        __m256i sums[group];
#pragma GCC unroll 8
        for (int q = 0; q < group; ++q) sums[q] = _mm256_set1_epi32(init[q]);
        for (int64_t k = 0; k < steps; ++k) {
            const __m256i x = values_of(tile, k, part);
#pragma GCC unroll 8
            for (int q = 0; q < group; ++q) sums[q] = dot4(sums[q], x, words[k * group + q]);
        }
        const __m256 s = _mm256_loadu_ps(tile.scale() + part * 8), h = _mm256_loadu_ps(tile.half() + part * 8);
        for (int q = 0; q < group; ++q) {
            const __m256 key =
                _mm256_fnmadd_ps(h, _mm256_set1_ps(inverse[q]), _mm256_mul_ps(_mm256_cvtepi32_ps(sums[q]), s));
            _mm256_storeu_ps(keys + q * kTile + part * 8, key);
            const __m256 limit = _mm256_set1_ps(threshold[q]);
            int hit;
            if (tile.has_tail) {
                const __m256 end = _mm256_fmadd_ps(_mm256_loadu_ps(tile.tails + part * 8),
                                                   _mm256_set1_ps(queries.per_tail[first + q]), key);
                hit = _mm256_movemask_ps(_mm256_cmp_ps(end, limit, _CMP_NLT_UQ));
            } else {
                hit = _mm256_movemask_ps(_mm256_cmp_ps(key, limit, _CMP_GE_OQ));
            }
            masks[q] |= static_cast<uint64_t>(static_cast<unsigned>(hit)) << (part * 8);
            any |= masks[q];
        }
    }
    return any != 0;
}

inline __m256d difference(__m256d x, const double* y) { return _mm256_sub_pd(x, _mm256_broadcast_sd(y)); }
inline __m256d add_product(__m256d sum, __m256d x, const double* y) {
    return _mm256_fmadd_pd(x, _mm256_broadcast_sd(y), sum);
}

inline int count_within(const float* x, float limit) {
    const __m256 y = _mm256_set1_ps(limit);
    return __builtin_popcount(
        static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), y, _CMP_LE_OQ)) |
                              _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + 8), y, _CMP_LE_OQ)) << 8));
}

void tails(const uint8_t* records, int64_t size, const uint8_t* rows, int count, const int8_t* q, int64_t bytes,
           int32_t* out) {
    for (int i = 0; i < count; ++i) {
        const uint8_t* const x = records + rows[i] * size + sizeof(TailFacts);
        int32_t sum = 0;
        for (int64_t j = 0; j < bytes; ++j) sum += x[j] * q[j];
        out[i] = sum;
    }
}

uint64_t reaching(const float* ends, float threshold) {
    uint64_t mask = 0;
    for (int r = 0; r < kTile; ++r) mask |= static_cast<uint64_t>(!(ends[r] < threshold)) << r;
    return mask;
}

#include "cpu/topk_kernels.inl"

}  // namespace
const TopkKernels& topk_kernels() {
    static const TopkKernels table = make_table();
    return table;
}
}  // namespace fct::cpu::avx2
