// Exact search over rows of embeddings, and exact ranks for the metrics. No pybind11: pointers, sizes, strides.
//
// Scores are summed in float64, dimension after dimension, and rounded to float32 once; rows stand in the order of
// (score, index). The same score comes from every path here, so an answer does not depend on blocking or threads.
//
// Shadow: the gallery in 8 bits, in tiles of 64 rows. A tile is steps x 64 x 4 bytes (steps = ceil(d / 4)): for each
// four dimensions the 64 rows' four values side by side, stored + 128. Row x stands as x' = scale * q, q in
// [-127, 127], after the shift by a fixed vector (a mean of the gallery; for cosine after division by its norm).
// Its float32 facts follow the tiles in arrays of kMeta per tile: scale[64], half[64] (|x|^2 / 2 for l2, else 0),
// error[64] (|x - x'|, rounded up), norm[64] (|x'|, rounded up), then the tile's largest error, norm and half.
//
// Bound. For the key of a pair, <q, x> - half, and the scanned <q', x'> - half:
//   |<q, x> - <q', x'>| = |<q, x - x'> + <q - q', x'>| <= |q| |x - x'| + |q - q'| |x'|   (Cauchy-Schwarz),
// to which kSlack times the magnitudes adds all float32 rounding, the final one of the score included. The k-th best
// lower bound is below the k-th best key, so a row whose upper bound is below it cannot be among the k best.
//
// In halves: tiles hold the high four bits of each value and `low` the other four, so that a few queries read half as
// much. A word has the high bits of two steps: (even & 0xf0) | (odd >> 4), in `low` (even & 0x0f) | (odd << 4); the
// steps are even in number, the last ones zeros. What is scanned first is x'' = scale * (16 * high + 8 - 128), by the
// same bound with |x - x''| (high_error: of each row, rounded up) and |x''| <= |x'| + |x - x'| + |x - x''|. Many
// queries join the halves, tile by tile.
//
// With levels: rows are rotated, y = x - (x down) up, so that most of their length lies in the first `head` dimensions.
// Tiles then hold the heads alone, with a scale of their own; their facts are scale, half and tail[64] (|y's tail|,
// rounded up), then the tile's largest error and norm of the heads, largest half, and largest length of a row. The
// tails lie row by row: three floats (scale; |y - y'| and |y'| of the whole row, rounded up) and the bytes, + 128. By
// Cauchy-Schwarz a tail that was not read adds at most |q's tail| |y's tail|. `loss` times a length bounds what the
// rotation's own arithmetic and its distance from an orthogonal map change (docs/retrieval.md has the proof).
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

namespace fct::cpu {

enum class Metric : int { l2 = kMetricL2, ip = kMetricIP, cosine = kMetricCosine };

constexpr int kTile = 64;
constexpr int kMeta = 4 * kTile + 4;
constexpr int kHeadMeta = 3 * kTile + 4;
constexpr int64_t kShadowMaxDim = 32768;  // keeps the int32 sums: 383 * 127 * d < 2^31

// n rows of d values, row_stride elements apart. int8 rows: value * scale[i * scale_row + j * scale_column].
struct RowSource {
    const void* data;
    DType dtype;
    int64_t n, d, row_stride;
    const float* scale;
    int64_t scale_row, scale_column;

    // Whether rows are float32 that can be read where they lie: an odd address cannot be a float's.
    bool in_place() const { return dtype == DType::f32 && reinterpret_cast<uintptr_t>(data) % sizeof(float) == 0; }
    // Row i as float32: in place, or brought into scratch (d floats).
    const float* row(int64_t i, float* scratch) const;
};

struct TailFacts {
    float scale, error, norm;
};

struct Levels {
    int64_t head = 0;                            // a multiple of 4; 0: whole rows lie in tiles
    const float *down = nullptr, *up = nullptr;  // (d, head), (head, d)
    double loss = 0;
    const uint8_t* tails = nullptr;
};

struct Shadow {
    const uint8_t* tiles = nullptr;  // null: no shadow, scan the rows
    const float* meta = nullptr;
    const float* shift = nullptr;  // d
    Levels levels = {};
    const uint8_t* low = nullptr;       // null: tiles hold whole bytes
    const float* high_error = nullptr;  // kTile of each tile
};

// Words of four dimensions in a tile; in halves two of them share a word.
inline int64_t steps_of(int64_t d, bool halves) { return halves ? (d + 7) / 8 * 2 : (d + 3) / 4; }

inline int64_t facts_of_tile(const Levels& levels) { return levels.head > 0 ? kHeadMeta : kMeta; }
// Of one row's tail: its facts and bytes, whole words.
inline int64_t record_bytes(const Levels& levels, int64_t d) {
    return static_cast<int64_t>(sizeof(TailFacts)) + (d - levels.head + 3) / 4 * 4;
}

struct SearchCounts {
    int64_t rescored = 0;   // candidates scored in float64 after the scan
    int64_t tails = 0;      // rows that their heads left over
    int64_t exhausted = 0;  // queries with too many rows inside the bound, which went through every row
};

// Packs rows [first, first + count) of the gallery, first a multiple of kTile, into tiles/meta of that part; in halves
// where low and high_error are not null.
void shadow_pack(const RowSource& gallery, Metric metric, int64_t first, int64_t count, const float* shift,
                 uint8_t* tiles, float* meta, uint8_t* low, float* high_error, int threads, Isa isa);
// The same with levels; tails: of that part (levels.tails is not read).
void shadow_pack_levels(const RowSource& gallery, Metric metric, int64_t first, int64_t count, const float* shift,
                        const Levels& levels, uint8_t* tiles, float* meta, uint8_t* tails, int threads, Isa isa);

// distances, indices: (queries.n, k), nearest first. self >= 0: query i's own row self + i is left out.
// Returns false when keep_going said stop.
bool topk(const RowSource& queries, const RowSource& gallery, const Shadow& shadow, Metric metric, int64_t k,
          int64_t self, float* distances, int64_t* indices, int threads, Isa isa, KeepGoing keep_going,
          SearchCounts* counts);

// Per query: rows ranked before its first match (-1: none) and average precision with tied rows retrieved together
// (NaN: none). Class c of the gallery is members[starts[c]], ..., ascending; codes: the queries' classes.
bool ranks(const RowSource& queries, const RowSource& gallery, const int64_t* codes, const int64_t* starts,
           const int64_t* members, Metric metric, int64_t self, int64_t* first, double* precision, int threads, Isa isa,
           KeepGoing keep_going);

}  // namespace fct::cpu
