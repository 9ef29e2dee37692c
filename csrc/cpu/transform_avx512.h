// AVX-512 vectors, shared by the three AVX-512 files. Tile: 14 rows x 2 vectors = 28 accumulators, 2 weight vectors,
// 1 broadcast: 31 of 32 registers, 16 loads for 28 multiply-adds. The multiply-adds are written as assembly: GCC 12
// spills the accumulators of the intrinsics, or moves them from register to register.
#pragma once
#include <immintrin.h>

#include "cpu/transform_kernel.h"

namespace fct::cpu {
namespace {

struct Avx512 {
    using f = __m512;
    static constexpr int W = 16, kRows = 14, kHalf = 8, kCols = 32;
    // The compiler loses track of the value.
    template <class T>
    static void hide(T& x) {
        asm volatile("" : "+v"(x));
    }
    static f load(const float* p) { return _mm512_loadu_ps(p); }
    static f set(float x) { return _mm512_set1_ps(x); }
    static f add(f a, f b) { return _mm512_add_ps(a, b); }
    static f fma(f a, f b, f c) { return _mm512_fmadd_ps(a, b, c); }
    static f max_keeping_nan(f value, f lowest) { return _mm512_max_ps(lowest, value); }
    static void store_f32(void* p, f x) { _mm512_storeu_ps(p, x); }
    static void store_bf16(void* p, f x) {
#ifdef __AVX512BF16__
        _mm256_storeu_si256(static_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
#else
        const __m512i u = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
        r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
        _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
#endif
    }
    // x >= 0 already; saturates at 255.
    static void store_u8(void* p, f x) {
        const __m512i q = _mm512_cvtps_epi32(_mm512_min_ps(x, _mm512_set1_ps(255.0f)));
        _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(q));
    }
    static void store_s16(void* p, f x) {
        const __m512 most = _mm512_set1_ps(kMostInt16);
        const __m512 cut = _mm512_max_ps(_mm512_min_ps(x, most), _mm512_sub_ps(_mm512_setzero_ps(), most));
        _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(cut)));
    }
};

struct Avx512Fp32 {
    using acc = __m512;
    using operand = __m512;
    static constexpr bool kInteger = false;
    static constexpr int kGroup = 1;
    static acc zero() { return _mm512_setzero_ps(); }
    static operand load(const uint8_t* p) { return _mm512_loadu_ps(p); }
    static operand bcast(const uint8_t* p) {
        return _mm512_broadcastss_ps(_mm_load_ss(reinterpret_cast<const float*>(p)));
    }
    static acc fma(acc c, operand w, operand a) {
        asm("vfmadd231ps %1, %2, %0" : "+v"(c) : "v"(w), "v"(a));
        return c;
    }
    static __m512 to_float(acc c) { return c; }
};

struct Avx512Integer {
    using acc = __m512i;
    using operand = __m512i;
    static constexpr bool kInteger = true;
    static constexpr int kGroup = 4;
    static acc zero() { return _mm512_setzero_si512(); }
    static operand load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static operand bcast(const uint8_t* p) {
        int32_t x;
        std::memcpy(&x, p, 4);
        return _mm512_set1_epi32(x);
    }
    static __m512 to_float(acc c) { return _mm512_cvtepi32_ps(c); }
};

#ifdef __AVX512VNNI__
struct Avx512Vnni : Avx512Integer {
    static acc fma(acc c, operand w, operand a) {
        asm("vpdpbusd %1, %2, %0" : "+v"(c) : "v"(w), "v"(a));
        return c;
    }
};

// Two s16 x s16 products a lane and instruction, as fast as bf16's and with twice its bits.
struct Avx512Vnni16 : Avx512Integer {
    static constexpr int kGroup = 2;
    static acc fma(acc c, operand w, operand a) {
        asm("vpdpwssd %1, %2, %0" : "+v"(c) : "v"(w), "v"(a));
        return c;
    }
};
#endif

}  // namespace
}  // namespace fct::cpu
