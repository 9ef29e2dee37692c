#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "cpu/topk.h"
#include "cpu/topk_kernels.h"

#define FCT_TOPK_DOUBLES 8

namespace fct::cpu::avx512 {
namespace {

// Bytes are widened to 16 bits (even and odd ones apart), since _mm512_maddubs_epi16 saturates.
inline __m512i dot4(__m512i sum, __m512i bytes, __m512i word) {
    const __m512i even = _mm512_and_si512(bytes, _mm512_set1_epi16(0xff)), odd = _mm512_srli_epi16(bytes, 8);
    const __m512i y_even = _mm512_srai_epi16(_mm512_slli_epi16(word, 8), 8), y_odd = _mm512_srai_epi16(word, 8);
    return _mm512_add_epi32(sum, _mm512_add_epi32(_mm512_madd_epi16(even, y_even), _mm512_madd_epi16(odd, y_odd)));
}

#include "cpu/topk_avx512_scan.inl"
#include "cpu/topk_kernels.inl"

}  // namespace
const TopkKernels& topk_kernels() {
    static const TopkKernels table = make_table();
    return table;
}
}  // namespace fct::cpu::avx512
