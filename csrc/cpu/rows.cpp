#include "cpu/rows.h"

#include <cstring>

#include "cpu/isa.h"

namespace fct::cpu {
namespace {

// A float is non-finite exactly when its exponent bits are all ones; integer compares vectorise on every target.
// Read as bytes, since the caller's values may lie at any address. Inlined into a function for each vector width.
template <class Bits, Bits kExponent>
inline __attribute__((always_inline)) bool row_is_finite(const void* data, int64_t offset, int64_t d) {
    const char* row = static_cast<const char*>(data) + offset * static_cast<int64_t>(sizeof(Bits));
    Bits bad = 0;
    for (int64_t j = 0; j < d; ++j) {
        Bits bits;
        std::memcpy(&bits, row + j * static_cast<int64_t>(sizeof bits), sizeof bits);
        bad |= static_cast<Bits>((bits & kExponent) == kExponent);
    }
    return bad == 0;
}

inline __attribute__((always_inline)) bool is_finite(const void* data, DType dtype, int64_t offset, int64_t d) {
    switch (dtype) {
        case DType::f32:
            return row_is_finite<uint32_t, 0x7f800000u>(data, offset, d);
        case DType::f16:
            return row_is_finite<uint16_t, 0x7c00u>(data, offset, d);
        case DType::bf16:
            return row_is_finite<uint16_t, 0x7f80u>(data, offset, d);
        case DType::i8:
            return true;
    }
    return true;
}

// flags: of every row, where they are wanted; else the first such row ends the search. Returns that row or -1, or how
// many there are.
inline __attribute__((always_inline)) int64_t search_rows(const void* data, DType dtype, int64_t n, int64_t d,
                                                          int64_t row_stride, uint8_t* flags) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        const bool bad = !is_finite(data, dtype, i * row_stride, d);
        if (flags == nullptr && bad) return i;
        if (flags != nullptr) flags[i] = bad;
        count += bad;
    }
    return flags == nullptr ? -1 : count;
}

int64_t search_plain(const void* data, DType dtype, int64_t n, int64_t d, int64_t row_stride, uint8_t* flags) {
    return search_rows(data, dtype, n, d, row_stride, flags);
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bw,avx512vl"))) int64_t search_avx512(const void* data, DType dtype, int64_t n,
                                                                           int64_t d, int64_t row_stride,
                                                                           uint8_t* flags) {
    return search_rows(data, dtype, n, d, row_stride, flags);
}

__attribute__((target("avx2"))) int64_t search_avx2(const void* data, DType dtype, int64_t n, int64_t d,
                                                    int64_t row_stride, uint8_t* flags) {
    return search_rows(data, dtype, n, d, row_stride, flags);
}
#endif

int64_t search(const void* data, DType dtype, int64_t n, int64_t d, int64_t row_stride, uint8_t* flags) {
#if defined(__x86_64__)
    static const auto best = detected_isa() >= Isa::avx512 ? search_avx512
                             : detected_isa() >= Isa::avx2 ? search_avx2
                                                           : search_plain;
    return best(data, dtype, n, d, row_stride, flags);
#else
    return search_plain(data, dtype, n, d, row_stride, flags);
#endif
}

}  // namespace

int64_t first_nonfinite_row(const void* data, DType dtype, int64_t n, int64_t d, int64_t row_stride) {
    return search(data, dtype, n, d, row_stride, nullptr);
}

int64_t nonfinite_rows(const void* data, DType dtype, int64_t n, int64_t d, int64_t row_stride, uint8_t* flags) {
    return search(data, dtype, n, d, row_stride, flags);
}

int64_t scan_rows(const void* data, DType dtype, int64_t n, int64_t d, uint8_t* flags, Xxh64& checksum) {
    constexpr int64_t kTile = 8192;  // bytes: a fraction of any first-level cache
    const int64_t row = d * (dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2);
    const int64_t step = row > 0 && row < kTile ? kTile / row : 1;
    const auto* bytes = static_cast<const unsigned char*>(data);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += step) {
        const int64_t rows = n - i < step ? n - i : step;
        checksum.update(bytes + i * row, static_cast<size_t>(rows * row));
        count += nonfinite_rows(bytes + i * row, dtype, rows, d, d, flags + i);
    }
    return count;
}

}  // namespace fct::cpu
