// AVX-512-BF16: two bf16 products a lane and instruction, added to fp32 (vdpbf16ps; it takes subnormals as zero). The
// other precisions come once more, since their epilogues convert to bf16 in one instruction here.
#include "cpu/transform_avx512.h"

namespace fct::cpu {
namespace {

struct Bf16 {
    using acc = __m512;
    using operand = __m512i;
    static constexpr bool kInteger = false;
    static constexpr int kGroup = 2;
    static acc zero() { return _mm512_setzero_ps(); }
    static operand load(const uint8_t* p) { return Avx512Integer::load(p); }
    static operand bcast(const uint8_t* p) { return Avx512Integer::bcast(p); }
    static acc fma(acc c, operand w, operand a) {
        asm("vdpbf16ps %1, %2, %0" : "+v"(c) : "v"(w), "v"(a));
        return c;
    }
    static __m512 to_float(acc c) { return c; }
};

}  // namespace

void add_avx512_bf16_kernels(Kernels& kernels) {
    fill_shape<Avx512>(kernels);
    fill_precision<Avx512, Avx512Fp32>(kernels, Precision::fp32);
    fill_precision<Avx512, Bf16>(kernels, Precision::bf16);
    fill_precision<Avx512, Avx512Vnni>(kernels, Precision::int8);
    fill_precision<Avx512, Avx512Vnni16>(kernels, Precision::int16);
}

}  // namespace fct::cpu
