// Rows of embeddings as they lie in the user's memory: any row stride, four dtypes, int8 with a scale.
#pragma once
#include "../codes.h"
#include "gpu_api.h"

namespace fct::cuda {

enum DType : int { kF32 = kFloat32, kF16 = kFloat16, kBF16 = kBFloat16, kI8 = kInt8 };

// n rows of d elements; stride in elements. scale: null, or one value per row and/or per dimension, addressed as
// scale[row * scale_row + dim * scale_dim].
struct Rows {
    void* data;
    int dtype;
    int64_t n, d, stride;
    const float* scale;
    int64_t scale_row, scale_dim;
};

GPU_INLINE float load_element(const Rows& rows, int64_t row, int64_t dim) {
    const int64_t at = row * rows.stride + dim;
    switch (rows.dtype) {
        case kF32:
            return static_cast<const float*>(rows.data)[at];
        case kF16:
            return half_to_float(static_cast<const uint16_t*>(rows.data)[at]);
        case kBF16:
            return bf16_to_float(static_cast<const bf16*>(rows.data)[at]);
        default: {
            const float scale = rows.scale ? rows.scale[row * rows.scale_row + dim * rows.scale_dim] : 1.0f;
            return static_cast<float>(static_cast<const int8_t*>(rows.data)[at]) * scale;
        }
    }
}

GPU_INLINE void store_element(const Rows& rows, int64_t row, int64_t dim, float value) {
    const int64_t at = row * rows.stride + dim;
    switch (rows.dtype) {
        case kF32:
            static_cast<float*>(rows.data)[at] = value;
            break;
        case kF16:
            static_cast<uint16_t*>(rows.data)[at] = float_to_half(value);
            break;
        case kBF16:
            static_cast<bf16*>(rows.data)[at] = float_to_bf16(value);
            break;
        default: {
            const float scale = rows.scale ? rows.scale[row * rows.scale_row + dim * rows.scale_dim] : 1.0f;
            const float steps = rintf(value / scale);
            static_cast<int8_t*>(rows.data)[at] = static_cast<int8_t>(fminf(fmaxf(steps, -127.0f), 127.0f));
        }
    }
}

template <class T>
GPU_INLINE T warp_sum(T x) {
#pragma unroll
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

GPU_INLINE float warp_max(float x) {
#pragma unroll
    for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
}

}  // namespace fct::cuda
