// What every part of the top-k shares: metrics, sizes, and the sort keys by which ties go to the lower row.
#pragma once
#include "rows.cuh"

namespace fct::cuda {

enum Metric : int { kL2 = kMetricL2, kIP = kMetricIP, kCosine = kMetricCosine };
enum Shadow : int { kShadowBF16 = kBf16Shadow, kShadowI8 = kInt8Shadow };

constexpr int kChunkBytes = 128;       // of a shadow row, per pipeline stage; shadow rows are padded to it
constexpr int kChunkPitch = 128 + 16;  // in shared memory: 16 bytes of padding make ldmatrix free of conflicts
constexpr int kScanThreads = 128;
constexpr int kSortMax = 8192;  // keys that one block sorts in 64 KiB of shared memory
constexpr int kSortThreads = 256;
constexpr int kMaxK = 2048;
constexpr uint64_t kNoKey = ~uint64_t{0};

GPU_INLINE float slack(int64_t d) { return static_cast<float>(d + 64) * (1.0f / 2097152.0f); }

// ---- sort keys ----
GPU_INLINE uint64_t make_key(float score, uint32_t row) {
    const float s = score == score ? score + 0.0f : -INFINITY;  // -0 counts as 0, an overflow's NaN as the worst
    const uint32_t bits = __float_as_uint(s);
    const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(~ascending) << 32 | row;
}
GPU_INLINE float key_score(uint64_t key) {
    const uint32_t ascending = ~static_cast<uint32_t>(key >> 32);
    return __uint_as_float(ascending & 0x80000000u ? ascending & 0x7fffffffu : ~ascending);
}
GPU_INLINE uint32_t key_row(uint64_t key) { return static_cast<uint32_t>(key); }

// Sorts size (a power of two) keys ascending; the whole block takes part. Ends behind a barrier.
GPU_INLINE void sort_keys(uint64_t* keys, int size) {
    for (int run = 2; run <= size; run *= 2) {
        for (int step = run / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
                const int lo = 2 * pair - (pair & (step - 1)), hi = lo + step;
                const bool ascending = (lo & run) == 0;
                const uint64_t a = keys[lo], b = keys[hi];
                if ((a > b) == ascending) {
                    keys[lo] = b;
                    keys[hi] = a;
                }
            }
        }
    }
    __syncthreads();
}

}  // namespace fct::cuda
