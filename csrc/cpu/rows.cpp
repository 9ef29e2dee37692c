#include "cpu/rows.h"

#include <cstring>

namespace fct::cpu {
namespace {

// A float is non-finite exactly when its exponent bits are all ones; integer compares vectorise on every target.
// Read as bytes, since the caller's values may lie at any address.
template <class Bits, Bits kExponent>
bool row_is_finite(const void* data, int64_t offset, int64_t d) {
    const char* row = static_cast<const char*>(data) + offset * static_cast<int64_t>(sizeof(Bits));
    Bits bad = 0;
    for (int64_t j = 0; j < d; ++j) {
        Bits bits;
        std::memcpy(&bits, row + j * static_cast<int64_t>(sizeof bits), sizeof bits);
        bad |= static_cast<Bits>((bits & kExponent) == kExponent);
    }
    return bad == 0;
}

bool is_finite(const void* data, DType dtype, int64_t offset, int64_t d) {
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

}  // namespace

int64_t first_nonfinite_row(const void* data, DType dtype, int64_t n, int64_t d, int64_t row_stride) {
    for (int64_t i = 0; i < n; ++i)
        if (!is_finite(data, dtype, i * row_stride, d)) return i;
    return -1;
}

int64_t nonfinite_rows(const void* data, DType dtype, int64_t n, int64_t d, int64_t row_stride, uint8_t* flags) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        flags[i] = !is_finite(data, dtype, i * row_stride, d);
        count += flags[i];
    }
    return count;
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
