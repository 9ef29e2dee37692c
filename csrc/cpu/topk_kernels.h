// The inner loops of topk and ranks, one table per instruction set.
#pragma once
#include <cstdint>

#include "cpu/topk.h"

namespace fct::cpu {

constexpr int kPanel = 16;       // rows of one float64 panel, stored dimension by dimension
constexpr int kScanQueries = 6;  // queries of one scan group
constexpr int kExactQueries = 8;

// How a tile's values lie: whole bytes, high halves alone, high and low halves.
enum class Values { bytes, high, halves };

// One tile of the shadow, opened for the scan: 1 / scale and half / scale of each row besides. A row of scale 0 (it is
// all zeros) has the inverse of the largest scale, since any positive one is right for it.
struct ScanTile {
    const uint8_t *values, *low;
    const float* meta;   // scale[kTile], half[kTile], ...
    const float* tails;  // what a row may have besides its product: its tail's length, or its high half's error
    alignas(64) float inverse[kTile], half_inverse[kTile], tail_inverse[kTile];
    float most_error, most_norm, most_half;  // of a row
    float smallest;                          // scale that is not 0
    float room;                              // of a sum beside its init and products, see room_beside
    bool has_half;                           // any half other than 0
    bool has_tail;                           // these are heads, or high halves
    Values kind;
    const float* scale() const { return meta; }
    const float* half() const { return meta + kTile; }
};

// A block of queries, in groups of 1, 2, 4 or 6: group g's words are words[first * stride ...], stride x group of four
// int8 each. init: -128 times the sum of a query's values. A row counts where
//   product * scale - half * inverse + tail * per_tail >= threshold,
//   threshold = base - per_error * error - per_norm * norm - per_half * h
// with the tile's largest error, norm and half (tail: where tiles hold heads). limit, limit_inverse: threshold and
// inverse for a comparison in whole numbers, product >= (limit + half * limit_inverse) / scale, which never leaves out
// a row that counts: both are 0 but for the sign where that quotient may pass what an int32 holds.
struct ScanQueries {
    const int32_t *words, *init;
    int64_t stride;  // steps of a query's words, of which a scan may take the first
    const float *inverse, *base, *per_error, *per_norm, *per_half, *per_tail;
    float *threshold, *limit, *limit_inverse;
};

// Rows and matches of one query in the order of their buckets, each array padded by kPanel infinities. Bucket b's rows
// are ordered[rows_at[b - 1]] to ordered[rows_at[b]], its matches likewise; rows_before[b]: rows in better buckets.
struct RankBuckets {
    const float *ordered, *ordered_matches;
    const uint32_t *rows_before, *rows_at, *matches_at;
};

struct TopkKernels {
    // low, high_error: where the shadow is in halves and they are wanted, else null.
    void (*open_tile)(const uint8_t* values, const uint8_t* low, const float* meta, bool heads, const float* high_error,
                      float room, ScanTile* tile);
    // threshold, limit and limit_inverse of `count` queries for one tile.
    void (*aim)(const ScanTile& tile, const ScanQueries& queries, int64_t count);
    // One tile with the `group` queries from `first`. Returns whether any row counts; then masks[q] bit r says which,
    // and keys[q][r] is its product * scale[r] - half[r] * inverse[q].
    bool (*scan)(const ScanTile& tile, int64_t steps, const ScanQueries& queries, int64_t first, int group,
                 uint64_t* masks, float* keys);
    // Whole bytes of one tile, from its halves.
    void (*join)(const uint8_t* high, const uint8_t* low, int64_t steps, uint8_t* values);
    // rows: kPanel float32 rows (repeat one to fill up) to panel[d][kPanel].
    void (*pack)(const float* const* rows, int64_t d, double* panel);
    // out[q][r] for kExactQueries queries, values[d][kExactQueries] in float64: sum of squared differences, or of
    // products where `product`. norms (or null): the rows' sums of squares.
    void (*exact)(const double* panel, int64_t d, const double* values, bool product, double* out, double* norms);
    void (*exact_one)(const double* panel, int64_t d, const double* values, bool product, double* out, double* norms);
    // v (d float64) to int8 at scale: returns the sums of squared errors and of squared quantised values.
    void (*quantise)(const double* v, int64_t d, float scale, int8_t* out, double* error, double* norm);
    // out[i] = sum of the `bytes` unsigned bytes, behind its TailFacts, of record rows[i], times q's, which are padded
    // by zeros to 64. Records lie `size` bytes apart.
    void (*tails)(const uint8_t* records, int64_t size, const uint8_t* rows, int count, const int8_t* q, int64_t bytes,
                  int32_t* out);
    // The rows of a tile whose end is not below the threshold.
    uint64_t (*reaching)(const float* ends, float threshold);
    // y = x - (x down) up for one vector; work: head floats.
    void (*rotate_one)(const Levels& levels, const float* x, int64_t d, float* y, float* work);
    // The same for kPanel vectors, x and y[d][kPanel], in place; work[head][kPanel].
    void (*rotate)(const Levels& levels, float* y, int64_t d, float* work);
    // Of m rows of a panel: the largest magnitude of each lane.
    void (*largest)(const float* y, int64_t m, float* out);
    // ... and its 8-bit words at each lane's scale, words[ceil(m / 4)][kPanel], + 128 a byte. length, error and norm:
    // of y, what rounding lost, and of what is kept, in units of the scale.
    void (*quantise_panel)(const float* y, int64_t m, const float* scale, uint32_t* words, float* length, float* error,
                           float* norm);
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
