// AVX2 and FMA. Tile: 6 rows x 2 vectors = 12 accumulators, 2 weight vectors, 1 broadcast: 15 of 16 registers.
#include <immintrin.h>

#include "cpu/transform_kernel.h"

namespace fct::cpu {
namespace {

struct Avx2 {
    using f = __m256;
    static constexpr int W = 8, kRows = 6, kHalf = 3, kCols = 16;
    // The compiler loses track of the value.
    template <class T>
    static void hide(T& x) {
        asm volatile("" : "+x"(x));
    }
    static f load(const float* p) { return _mm256_loadu_ps(p); }
    static f set(float x) { return _mm256_set1_ps(x); }
    static f add(f a, f b) { return _mm256_add_ps(a, b); }
    static f fma(f a, f b, f c) { return _mm256_fmadd_ps(a, b, c); }
    static f max_keeping_nan(f value, f lowest) { return _mm256_max_ps(lowest, value); }
    static void store_f32(void* p, f x) { _mm256_storeu_ps(static_cast<float*>(p), x); }
    static void store_bf16(void* p, f x) {
        const __m256i u = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i r = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
        _mm_storeu_si128(static_cast<__m128i*>(p),
                         _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
    }
    static void store_u8(void* p, f x) {
        const __m256i q = _mm256_cvtps_epi32(_mm256_min_ps(x, _mm256_set1_ps(255.0f)));
        const __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
        _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packus_epi16(h, h));
    }
    static void store_s16(void* p, f x) {
        const __m256 most = _mm256_set1_ps(kMostInt16);
        const __m256 cut = _mm256_max_ps(_mm256_min_ps(x, most), _mm256_sub_ps(_mm256_setzero_ps(), most));
        const __m256i q = _mm256_cvtps_epi32(cut);
        _mm_storeu_si128(static_cast<__m128i*>(p),
                         _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1)));
    }
};

struct Fp32 {
    using acc = __m256;
    using operand = __m256;
    static constexpr bool kInteger = false;
    static constexpr int kGroup = 1;
    static acc zero() { return _mm256_setzero_ps(); }
    static operand load(const uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
    static operand bcast(const uint8_t* p) { return _mm256_broadcast_ss(reinterpret_cast<const float*>(p)); }
    static acc fma(acc c, operand w, operand a) { return _mm256_fmadd_ps(w, a, c); }
    static __m256 to_float(acc c) { return c; }
};

struct Words {
    using operand = __m256i;
    static operand load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static operand bcast(const uint8_t* p) {
        int32_t x;
        std::memcpy(&x, p, 4);
        return _mm256_set1_epi32(x);
    }
};

// A pair of bf16 is two floats cut short: the high one is the word itself with its low half cleared.
struct Bf16 : Words {
    using acc = __m256;
    static constexpr bool kInteger = false;
    static constexpr int kGroup = 2;
    static acc zero() { return _mm256_setzero_ps(); }
    static __m256 low(operand x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
    static __m256 high(operand x) {
        return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    }
    static acc fma(acc c, operand w, operand a) {
        return _mm256_fmadd_ps(high(w), high(a), _mm256_fmadd_ps(low(w), low(a), c));
    }
    static __m256 to_float(acc c) { return c; }
};

// vpmaddubsw would saturate: even and odd bytes are widened to 16 bits instead, whose pair products fit.
struct Int8 : Words {
    using acc = __m256i;
    static constexpr bool kInteger = true;
    static constexpr int kGroup = 4;
    static acc zero() { return _mm256_setzero_si256(); }
    static acc fma(acc c, operand w, operand a) {
        const __m256i even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8),
                                               _mm256_and_si256(a, _mm256_set1_epi16(0xff)));
        const __m256i odd = _mm256_madd_epi16(_mm256_srai_epi16(w, 8), _mm256_srli_epi16(a, 8));
        return _mm256_add_epi32(c, _mm256_add_epi32(even, odd));
    }
    static __m256 to_float(acc c) { return _mm256_cvtepi32_ps(c); }
};

struct Int16 : Int8 {
    static constexpr int kGroup = 2;
    static acc fma(acc c, operand w, operand a) { return _mm256_add_epi32(c, _mm256_madd_epi16(w, a)); }
};

}  // namespace

void add_avx2_kernels(Kernels& kernels) {
    fill_shape<Avx2>(kernels);
    fill_precision<Avx2, Fp32>(kernels, Precision::fp32);
    fill_precision<Avx2, Bf16>(kernels, Precision::bf16);
    fill_precision<Avx2, Int8>(kernels, Precision::int8);
    fill_precision<Avx2, Int16>(kernels, Precision::int16);
}

}  // namespace fct::cpu
