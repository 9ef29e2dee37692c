// AVX-512-VNNI: four u8 x s8 products a lane and instruction, added to int32 without saturation (vpdpbusd).
#include "cpu/transform_avx512.h"

namespace fct::cpu {
namespace {

struct Int8 : Avx512Integer {
    static acc fma(acc c, operand w, operand a) { return _mm512_dpbusd_epi32(c, a, w); }
};

}  // namespace

void add_avx512_vnni_kernels(Kernels& kernels) { fill_precision<Avx512, Int8>(kernels, Precision::int8); }

}  // namespace fct::cpu
