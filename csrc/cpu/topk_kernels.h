// The inner loops of topk and ranks, one table per instruction set.
#pragma once
#include <cstdint>

#include "cpu/topk.h"

namespace fct::cpu {

constexpr int kPanel = 16;       // rows of one float64 panel, stored dimension by dimension
constexpr int kScanQueries = 6;  // queries of one scan group
constexpr int kExactQueries = 8;

// One tile of the shadow, opened for the scan: 1 / scale and half / scale of each row besides. A row of scale 0 (it is
// all zeros) has the inverse of the largest scale, since any positive one is right for it.
struct ScanTile {
    const uint8_t* values;
    const float* meta;  // scale[kTile], half[kTile], ...
    alignas(64) float inverse[kTile], half_inverse[kTile];
    float smallest;  // scale that is not 0
    bool has_half;   // any half other than 0
    const float* scale() const { return meta; }
    const float* half() const { return meta + kTile; }
};

// A block of queries, in groups of 1, 2, 4 or 6: group g's words are words[first * steps ...], steps x group of four
// int8 each. init: -128 times the sum of a query's values. A row counts where
//   product * scale - half * inverse >= threshold,  threshold = base - per_error * error - per_norm * norm - per_half *
//   h
// with the tile's largest error, norm and half. limit, limit_inverse: threshold and inverse for a comparison in whole
// numbers, product >= (limit + half * limit_inverse) / scale, which never leaves out a row that counts: both are 0 but
// for the sign where that quotient may pass what an int32 holds.
struct ScanQueries {
    const int32_t *words, *init;
    const float *inverse, *base, *per_error, *per_norm, *per_half;
    float *threshold, *limit, *limit_inverse;
};

// Rows and matches of one query in the order of their buckets, each array padded by kPanel infinities. Bucket b's rows
// are ordered[rows_at[b - 1]] to ordered[rows_at[b]], its matches likewise; rows_before[b]: rows in better buckets.
struct RankBuckets {
    const float *ordered, *ordered_matches;
    const uint32_t *rows_before, *rows_at, *matches_at;
};

struct TopkKernels {
    void (*open_tile)(const uint8_t* values, const float* meta, ScanTile* tile);
    // threshold, limit and limit_inverse of `count` queries for one tile. largest: of the sums that fit beside a
    // product.
    void (*aim)(const ScanTile& tile, const ScanQueries& queries, int64_t count, float largest);
    // One tile with the `group` queries from `first`. Returns whether any row counts; then masks[q] bit r says which,
    // and keys[q][r] is its product * scale[r] - half[r] * inverse[q].
    bool (*scan)(const ScanTile& tile, int64_t steps, const ScanQueries& queries, int64_t first, int group,
                 uint64_t* masks, float* keys);
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
