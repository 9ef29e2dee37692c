// Checks over rows of embeddings, one pass at memory speed. No torch, no pybind11: pointers, sizes, strides.
#pragma once
#include <cstdint>

#include "codes.h"
#include "cpu/checksum.h"

namespace fct::cpu {

enum class DType : int { f32 = kFloat32, f16 = kFloat16, bf16 = kBFloat16, i8 = kInt8 };

// Index of the first row in [0, n) that holds a NaN or an infinity, or -1.
// data: n rows of d elements, row_stride in elements; dtype f32, f16 or bf16.
int64_t first_nonfinite_row(const void* data, DType dtype, int64_t n, int64_t d, int64_t row_stride);

// flags[i] = 1 where row i holds a NaN or an infinity, else 0; returns how many.
int64_t nonfinite_rows(const void* data, DType dtype, int64_t n, int64_t d, int64_t row_stride, uint8_t* flags);

// The same, and adds the rows to a checksum, while each is in the nearest cache. The rows lie d elements apart.
int64_t scan_rows(const void* data, DType dtype, int64_t n, int64_t d, uint8_t* flags, Xxh64& checksum);

}  // namespace fct::cpu
