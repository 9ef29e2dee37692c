// The low-precision shadow of the rows and the four floats a row that bound its rounding; see topk.cuh.
#pragma once
#include "topk_keys.cuh"

namespace fct::cuda {

// ---- shadow ----
struct ShadowArgs {
    Rows rows;
    int metric, kind;
    bool is_query;
    unsigned char* shadow;  // (n, pitch) bytes
    int pitch;
    // gallery: scale, bias, |dg| + slack |g|, |g~|      query: scale, |q|, |dq|, |q|^2
    float4* meta;
};

// One warp per row.
__global__ void __launch_bounds__(256, 4) make_shadow(const ShadowArgs args) {
    const int lane = threadIdx.x % 32;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
    if (row >= args.rows.n) return;  // the whole warp leaves
    const int d = static_cast<int>(args.rows.d);
    float largest = 0.0f;
    for (int j = lane; j < d; j += 32) largest = fmaxf(largest, fabsf(load_element(args.rows, row, j)));
    largest = warp_max(largest);
    float sum = 0.0f;  // of squares relative to the largest, so that tiny and huge rows neither vanish nor overflow
    for (int j = lane; j < d; j += 32) {
        const float x = largest > 0.0f ? load_element(args.rows, row, j) / largest : 0.0f;
        sum = fmaf(x, x, sum);
    }
    sum = warp_sum(sum);
    float norm = largest * sqrtf(sum), unit = 1.0f;
    // Subnormal and overflowing norms have no useful bound: such a row is always a candidate.
    const bool bounded = largest == 0.0f || (norm > 1e-15f && norm < 1e15f);
    if (args.metric == kCosine && norm > 0.0f) {
        unit = bounded ? 1.0f / norm : 0.0f;
        norm = 1.0f;
        largest *= unit;
    }
    const float scale = args.kind == kShadowI8 ? (largest > 0.0f ? largest / 127.0f : 1.0f) : 1.0f;
    unsigned char* out = args.shadow + row * args.pitch;
    float lost = 0.0f;
    const int padded = args.kind == kShadowI8 ? args.pitch : args.pitch / 2;
    for (int j = lane; j < padded; j += 32) {
        const float x = j < d ? load_element(args.rows, row, j) * unit : 0.0f;
        float kept;
        if (args.kind == kShadowI8) {
            const float steps = fminf(fmaxf(rintf(x / scale), -127.0f), 127.0f);
            reinterpret_cast<int8_t*>(out)[j] = static_cast<int8_t>(steps);
            kept = steps * scale;
        } else {
            const bf16 rounded = float_to_bf16(x);
            reinterpret_cast<bf16*>(out)[j] = rounded;
            kept = bf16_to_float(rounded);
        }
        const float error = largest > 0.0f ? (x - kept) / largest : 0.0f;
        lost = fmaf(error, error, lost);
    }
    lost = warp_sum(lost);
    if (lane) return;
    const float square = norm * norm;
    norm *= 1.001f;  // as a bound, it must not be rounded down
    const float residual = bounded ? largest * sqrtf(lost) * 1.001f : INFINITY;
    const float tiny = static_cast<float>(d) * 4.7e-38f;  // products that fp32 or the tensor core flushed to zero
    if (args.is_query) {
        args.meta[row] = make_float4(scale, norm, residual, square);
    } else {
        const float bias = args.metric == kL2 ? fmaf(slack(d), square, -0.5f * square) : 0.0f;
        args.meta[row] = make_float4(scale, bias + tiny, residual + slack(d) * norm, norm + residual);
    }
}

}  // namespace fct::cuda
