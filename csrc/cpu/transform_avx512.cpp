// AVX-512 F, BW, DQ, VL: fp32 natively; bf16 and int8 in two steps each, exactly (no intermediate saturates).
#include "cpu/transform_avx512.h"

namespace fct::cpu {
namespace {

// A pair of bf16 is two floats cut short: the high one is the word itself with its low half cleared.
struct Bf16 {
    using acc = __m512;
    using operand = __m512i;
    static constexpr bool kInteger = false;
    static constexpr int kGroup = 2;
    static acc zero() { return _mm512_setzero_ps(); }
    static operand load(const uint8_t* p) { return Avx512Integer::load(p); }
    static operand bcast(const uint8_t* p) { return Avx512Integer::bcast(p); }
    static __m512 low(operand x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
    static __m512 high(operand x) {
        return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    }
    static acc fma(acc c, operand w, operand a) {
        return _mm512_fmadd_ps(high(w), high(a), _mm512_fmadd_ps(low(w), low(a), c));
    }
    static __m512 to_float(acc c) { return c; }
};

// vpmaddubsw would saturate: even and odd bytes are widened to 16 bits instead, whose pair products fit.
struct Int8 : Avx512Integer {
    static acc fma(acc c, operand w, operand a) {
        const __m512i even = _mm512_madd_epi16(_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8),
                                               _mm512_and_si512(a, _mm512_set1_epi16(0xff)));
        const __m512i odd = _mm512_madd_epi16(_mm512_srai_epi16(w, 8), _mm512_srli_epi16(a, 8));
        return _mm512_add_epi32(c, _mm512_add_epi32(even, odd));
    }
};

struct Int16 : Avx512Integer {
    static constexpr int kGroup = 2;
    static acc fma(acc c, operand w, operand a) { return _mm512_add_epi32(c, _mm512_madd_epi16(w, a)); }
};

}  // namespace

void add_avx512_kernels(Kernels& kernels) {
    fill_shape<Avx512>(kernels);
    fill_precision<Avx512, Avx512Fp32>(kernels, Precision::fp32);
    fill_precision<Avx512, Bf16>(kernels, Precision::bf16);
    fill_precision<Avx512, Int8>(kernels, Precision::int8);
    fill_precision<Avx512, Int16>(kernels, Precision::int16);
}

}  // namespace fct::cpu
