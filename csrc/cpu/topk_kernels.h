// The inner loops of topk and ranks, one table per instruction set.
#pragma once
#include <cstdint>

namespace fct::cpu {

constexpr int kPanel = 16;       // rows of one float64 panel, stored dimension by dimension
constexpr int kScanQueries = 6;  // queries of one scan group
constexpr int kExactQueries = 8;

// Rows and matches of one query in the order of their buckets, each array padded by kPanel infinities. Bucket b's rows
// are ordered[rows_at[b - 1]] to ordered[rows_at[b]], its matches likewise; rows_before[b]: rows in better buckets.
struct RankBuckets {
    const float *ordered, *ordered_matches;
    const uint32_t *rows_before, *rows_at, *matches_at;
};

struct TopkKernels {
    // Products of one tile with `group` queries (1, 2, 4 or 6). words: steps x group, four int8 each; init: -128 times
    // the sum of each query's values. Writes keys[q][r] = product * scale[r] - half[r] * inverse[q] and
    // masks[q] bit r = keys[q][r] >= threshold[q].
    void (*scan)(const uint8_t* tile, const float* meta, int64_t steps, const int32_t* words, const int32_t* init,
                 const float* inverse, const float* threshold, int group, uint64_t* masks, float* keys);
    // rows: kPanel float32 rows (repeat one to fill up) to panel[d][kPanel].
    void (*pack)(const float* const* rows, int64_t d, double* panel);
    // out[q][r] for kExactQueries queries, values[d][kExactQueries] in float64: sum of squared differences, or of
    // products where `product`. norms (or null): the rows' sums of squares.
    void (*exact)(const double* panel, int64_t d, const double* values, bool product, double* out, double* norms);
    void (*exact_one)(const double* panel, int64_t d, const double* values, bool product, double* out, double* norms);
    // v (d float64) to int8 at scale: returns the sums of squared errors and of squared quantised values.
    void (*quantise)(const double* v, int64_t d, float scale, int8_t* out, double* error, double* norm);
    // How many of n costs are <= each of 4 limits.
    void (*count4)(const float* costs, int64_t n, const float* limits, int64_t* counts);
    // bucket[i] = clamp((costs[i] - low) * inverse + 1, 0, last), monotone in costs.
    void (*bucket)(const float* costs, int64_t n, float low, float inverse, int32_t last, int32_t* out);
    // Sum over m matches, places[j] >= 1 being their buckets, of (matches <= it) / (rows <= it).
    double (*bucket_precision)(const RankBuckets& buckets, const float* matches, const int32_t* places, int64_t m);
};

namespace portable {
const TopkKernels& topk_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const TopkKernels& topk_kernels();
}
namespace avx512 {
const TopkKernels& topk_kernels();
}
namespace avx512_vnni {
const TopkKernels& topk_kernels();
}
#endif

}  // namespace fct::cpu
