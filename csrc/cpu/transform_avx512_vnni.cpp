// AVX-512-VNNI: four u8 x s8 products a lane and instruction, added to int32 without saturation (vpdpbusd).
#include "cpu/transform_avx512.h"

namespace fct::cpu {

void add_avx512_vnni_kernels(Kernels& kernels) {
    fill_precision<Avx512, Avx512Vnni>(kernels, Precision::int8);
    fill_precision<Avx512, Avx512Vnni16>(kernels, Precision::int16);
}

}  // namespace fct::cpu
