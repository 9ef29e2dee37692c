// Conversions between the caller's dtypes and float, written so that compilers vectorise them for the including
// file's instruction set (hence the unnamed namespace). All round to nearest, ties to even.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/transform_tiles.h"

namespace fct::cpu {
namespace {

inline uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}

inline float float_of(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

inline float from_bf16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

inline uint16_t to_bf16(float x) {
    const uint32_t u = bits_of(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

// The half's exponent and mantissa moved into a float's place, and the difference of the biases multiplied in,
// which is exact for subnormals too.
inline float from_f16(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t rest = static_cast<uint32_t>(h & 0x7fffu) << 13;
    const float finite = float_of(rest) * float_of(0x77800000u);  // 2^112
    return float_of(sign | (rest >= 0x0f800000u ? rest | 0x7f800000u : bits_of(finite)));
}

inline uint16_t to_f16(float x) {
    const uint32_t u = bits_of(x);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t a = u & 0x7fffffffu;
    const uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
    // Adding 0.5 leaves a subnormal half's bits, rounded, at the low end of the mantissa.
    const uint32_t subnormal = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
    uint32_t h = a < 0x38800000u ? subnormal : normal;
    h = a >= 0x477ff000u ? 0x7c00u : h;
    h = a > 0x7f800000u ? 0x7e00u : h;
    return static_cast<uint16_t>(sign | h);
}

// The caller's 16-bit values may lie at any address, which what a plain uint16_t* points to must not.
inline uint16_t load_u16(const void* from, int64_t i) {
    uint16_t h;
    std::memcpy(&h, static_cast<const char*>(from) + 2 * i, 2);
    return h;
}

inline void store_u16(void* to, int64_t i, uint16_t h) { std::memcpy(static_cast<char*>(to) + 2 * i, &h, 2); }

// Columns [column, column + count) of a row.
inline void load_part(const RowsView& from, int64_t row, int64_t column, int64_t count, float* to) {
    const int64_t offset = row * from.stride + column;
    const void* const data = from.data;
    switch (from.dtype) {
        case DType::f32:
            std::memcpy(to, static_cast<const float*>(data) + offset, static_cast<size_t>(count) * 4);
            break;
        case DType::f16:
            for (int64_t j = 0; j < count; ++j) to[j] = from_f16(load_u16(data, offset + j));
            break;
        case DType::bf16:
            for (int64_t j = 0; j < count; ++j) to[j] = from_bf16(load_u16(data, offset + j));
            break;
        case DType::i8: {
            const int8_t* x = static_cast<const int8_t*>(data) + offset;
            const int64_t step = from.scale_column;
            const float* scale = from.scale + row * from.scale_row + column * step;
            for (int64_t j = 0; j < count; ++j) to[j] = static_cast<float>(x[j]) * scale[j * step];
            if (from.offset != nullptr) {
                const int64_t next = from.offset_column;
                const float* offset = from.offset + row * from.offset_row + column * next;
                for (int64_t j = 0; j < count; ++j) to[j] += offset[j * next];
            }
            break;
        }
    }
}

inline void load_row(const RowsView& from, int64_t row, float* to) { load_part(from, row, 0, from.d, to); }

// The same back.
inline void store_part(const float* from, const RowsView& to, int64_t row, int64_t column, int64_t count) {
    const int64_t offset = row * to.stride + column;
    void* const data = to.data;  // copies, since a store through memcpy could change `to` for all the compiler knows
    switch (to.dtype) {
        case DType::f32:
            std::memcpy(static_cast<float*>(data) + offset, from, static_cast<size_t>(count) * 4);
            break;
        case DType::f16:
            for (int64_t j = 0; j < count; ++j) store_u16(data, offset + j, to_f16(from[j]));
            break;
        case DType::bf16:
            for (int64_t j = 0; j < count; ++j) store_u16(data, offset + j, to_bf16(from[j]));
            break;
        case DType::i8: {
            int8_t* y = static_cast<int8_t*>(data) + offset;
            const int64_t step = to.scale_column;
            const float* scale = to.scale + row * to.scale_row + column * step;
            const int64_t next = to.offset_column;
            const float* offset = to.offset ? to.offset + row * to.offset_row + column * next : nullptr;
            for (int64_t j = 0; j < count; ++j) {
                float v = (offset ? from[j] - offset[j * next] : from[j]) / scale[j * step];
                v = v > 127.0f ? 127.0f : v < -127.0f ? -127.0f : v;
                // 1.5 * 2^23: in its binade floats are whole numbers, so the sum is rounded to nearest even.
                y[j] = static_cast<int8_t>(static_cast<int32_t>(bits_of(v + 12582912.0f) - 0x4b400000u));
            }
            break;
        }
    }
}

inline void store_row(const float* from, const RowsView& to, int64_t row) { store_part(from, to, row, 0, to.d); }

// The squares of a row's values are summed in double, eight sums by column modulo eight: no overflow, no underflow.
// Called for pieces of a row, each but the last a multiple of eight long.
inline void add_squares(const float* x, int64_t count, double (&sums)[8]) {
    int64_t j = 0;
    for (; j + 8 <= count; j += 8)
        for (int i = 0; i < 8; ++i) sums[i] += static_cast<double>(x[j + i]) * x[j + i];
    for (int i = 0; j < count; ++j, ++i) sums[i] += static_cast<double>(x[j]) * x[j];
}

// What brings a row to the length; 1 for a row of zeros.
inline double factor_to(float length, const double (&sums)[8]) {
    const double total = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
    return total > 0.0 ? length / __builtin_sqrt(total) : 1.0;
}

}  // namespace
}  // namespace fct::cpu
