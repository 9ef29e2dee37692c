#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "cpu/topk.h"
#include "cpu/topk_kernels.h"

#define FCT_TOPK_DOUBLES 8

namespace fct::cpu::avx512_vnni {
namespace {

// In assembly, since GCC 12 copies the sum around the intrinsic in a loop of 24 of them.
inline __m512i dot4(__m512i sum, __m512i bytes, __m512i word) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(word));
    return sum;
}

#include "cpu/topk_avx512_scan.inl"
#include "cpu/topk_kernels.inl"

}  // namespace
const TopkKernels& topk_kernels() {
    static const TopkKernels table = make_table();
    return table;
}
}  // namespace fct::cpu::avx512_vnni
