// Certified-exact top-k: a tensor-core scan of a low-precision shadow proposes candidates, exact scores decide.
//
//   shadow    every row -> bf16 or int8 shadow, and four floats that bound what the rounding did to it
//   scan      shadow x shadow by mma.sync, selection in registers: each thread keeps the R best upper bounds u of its
//             own columns, the four threads that share a query merge theirs and write the 2 R best of the 4 R. What a
//             full thread's worst kept u and the merge's best dropped u come to, no row that was left out exceeds
//   select    sorts candidates in shared memory, keeps the best; in several passes where they do not fit
//   rescore   exact scores of the kept candidates, from the original rows: float64 sums, rounded to fp32 once
//   finish    sorts them; the query is certified when the k-th exact score beats every u that was dropped
//   exact_scan, finish_exact   the same over the whole gallery, for the queries that were not (near-ties, duplicates)
//
// The bound. With q = q~ + dq and g = g~ + dg:  |q.g - q~.g~| <= |q| |dg| + |dq| |g~|  (Cauchy-Schwarz). |dg| and |dq|
// are measured, not assumed, when the shadow is made. The rounding of every fp32 sum on either side is covered by
// slack(d) * |q| |g|, slack(d) = (d + 64) 2^-21, four times what a truncating accumulator can lose over d + 64 terms.
// Scores are "higher is better": q.g, cosine, and for l2 the negative squared distance; the scan works on
// u = q.g - |g|^2 / 2 there. Sort keys are 64-bit: descending score, then ascending row, so that ties go to the lower
// id.
#pragma once
#include <utility>

#include "rows.cuh"

namespace fct::cuda {

enum Metric : int { kL2 = 0, kIP = 1, kCosine = 2 };
enum Shadow : int { kShadowBF16 = 0, kShadowI8 = 1 };

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

// ---- scan ----
struct ScanArgs {
    const unsigned char* queries;
    const float4* query_meta;
    int n_queries;
    const unsigned char* gallery;
    const float4* gallery_meta;
    int n;                  // gallery rows, below 2^31: larger galleries are scanned in parts
    int pitch;              // bytes of a shadow row, a multiple of kChunkBytes
    bool queries_resident;  // all chunks of the block's queries stay in shared memory
    uint64_t* keys;         // (n_queries, splits * lists * kListKeys), each list's in no order
    float* bounds;          // (n_queries, splits * lists): no row that a list left out has a higher u
};

// Of the four warps, WarpsM lie along the queries, the others along the gallery's rows. Mma: 16-query fragments per
// warp. Keep: candidates a thread keeps per query. TileRows: gallery rows per tile.
template <int WarpsM, int Mma, int Keep, int Stages, int TileRows>
struct ScanShape {
    static constexpr int kWarpsM = WarpsM, kMma = Mma, kKeep = Keep, kStages = Stages, kTileRows = TileRows;
    static constexpr int kQueries = 16 * kWarpsM * kMma;
    static constexpr int kWarpsN = 4 / kWarpsM;
    static constexpr int kTilesN = kTileRows / 8 / kWarpsN;  // 8-column fragments per warp
    static constexpr int kLists = kWarpsN;                   // lists per query and split, one per quad of threads
    static constexpr int kListKeys = 2 * kKeep;
    static size_t smem(int pitch, bool resident) {
        const size_t queries = resident ? static_cast<size_t>(kQueries) * (pitch + 16)
                                        : static_cast<size_t>(kStages) * kQueries * kChunkPitch;
        return queries + static_cast<size_t>(kStages) * kTileRows * (kChunkPitch + sizeof(float4));
    }
};

// The best kKeep of what one thread saw for one query, best first, in registers.
template <int kKeep>
struct KeepList {
    float u[kKeep];
    uint32_t row[kKeep];
    GPU_INLINE void clear() {
#pragma unroll
        for (int j = 0; j < kKeep; ++j) {
            u[j] = -INFINITY;
            row[j] = 0xffffffffu;
        }
    }
    // Rows come in ascending order and an equal u stays behind: what is dropped never exceeds u[kKeep - 1].
    GPU_INLINE void push(float value, uint32_t id) {
        if (!(value > u[kKeep - 1])) return;
#pragma unroll
        for (int j = kKeep - 1; j > 0; --j) {
            const bool before = value > u[j - 1], here = value > u[j];
            row[j] = before ? row[j - 1] : here ? id : row[j];
            u[j] = before ? u[j - 1] : here ? value : u[j];
        }
        if (value > u[0]) {
            u[0] = value;
            row[0] = id;
        }
    }
};

// ---- the four lists of a quad become one ----
// This lane and its partner, lane ^ partner, hold a list in ascending order each: one is left with the n best keys of
// both, the other with the n worst, in bitonic order.
template <int n>
GPU_INLINE void keep_half(uint64_t (&keys)[n], int partner, bool best) {
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
        const uint64_t a = keys[i], b = keys[n - 1 - i];
        const uint64_t other_a = __shfl_xor_sync(0xffffffffu, a, partner);
        const uint64_t other_b = __shfl_xor_sync(0xffffffffu, b, partner);
        keys[i] = (a < other_b) == best ? a : other_b;
        keys[n - 1 - i] = (b < other_a) == best ? b : other_a;
    }
}

// n (a power of two) keys in bitonic order -> ascending.
template <int n>
GPU_INLINE void sort_bitonic(uint64_t (&keys)[n]) {
#pragma unroll
    for (int step = n / 2; step > 0; step /= 2)
#pragma unroll
        for (int i = 0; i < n; ++i) {
            if (i & step) continue;
            const uint64_t a = keys[i], b = keys[i + step];
            keys[i] = a < b ? a : b;
            keys[i + step] = a < b ? b : a;
        }
}

// Four lists of n, each in ascending order, in the lanes of a quad: the best 2 n keys come to its first two lanes, in
// no order; what the others are left with is dropped. Returns the largest u that this lane drops. The whole warp takes
// part.
template <int n>
GPU_INLINE float merge_quad(uint64_t (&keys)[n]) {
    const int lane = threadIdx.x % 4;
    keep_half(keys, 1, lane % 2 == 0);
    sort_bitonic(keys);            // each pair of lanes holds its 2 n in ascending order, lane by lane
    keep_half(keys, 3, lane < 2);  // the i-th of one pair meets the i-th last of the other
    uint64_t first = keys[0];
#pragma unroll
    for (int i = 1; i < n; ++i) first = keys[i] < first ? keys[i] : first;
    return lane < 2 || first == kNoKey ? -INFINITY : key_score(first);
}

template <Shadow kKind>
struct Accumulator {
    float v[4];
    GPU_INLINE void mma(const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_bf16_16816(v, a, b0, b1); }
};
template <>
struct Accumulator<kShadowI8> {
    int v[4];
    GPU_INLINE void mma(const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_s8_16832(v, a, b0, b1); }
};

// Grid: (query blocks, splits). Split s takes the tiles s, s + splits, ...: neighbouring rows, which are often alike,
// spread over all lists. The bytes of a 16x32 int8 fragment lie as those of a 16x16 bf16 one, so only the mma differs.
template <Shadow kKind, class Shape>
__global__ void __launch_bounds__(kScanThreads, 2) scan(const ScanArgs args) {
    constexpr int kWarpsM = Shape::kWarpsM, kMma = Shape::kMma, kKeep = Shape::kKeep, kStages = Shape::kStages;
    constexpr int kTileRows = Shape::kTileRows;
    GPU_DYN_SMEM(smem);
    SmemCarver carve(smem);
    const int query_pitch = args.queries_resident ? args.pitch + 16 : kChunkPitch;
    unsigned char* queries =
        carve.take<unsigned char>((args.queries_resident ? 1 : kStages) * Shape::kQueries * query_pitch);
    unsigned char* tiles = carve.take<unsigned char>(kStages * kTileRows * kChunkPitch);
    float4* metas = carve.take<float4>(kStages * kTileRows);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_m = warp % kWarpsM, warp_n = warp / kWarpsM;
    const int query0 = blockIdx.x * Shape::kQueries;
    const int split = blockIdx.y, splits = gridDim.y;
    const int chunks = args.pitch / kChunkBytes;
    const int n_tiles = (args.n - 1) / kTileRows + 1;
    const int my_tiles = split < n_tiles ? (n_tiles - split - 1) / splits + 1 : 0;
    const int64_t steps = static_cast<int64_t>(my_tiles) * chunks;

    auto load_queries = [&](unsigned char* dst, int chunk0, int n_chunks) {
        const int per_row = n_chunks * (kChunkBytes / 16);
        for (int i = threadIdx.x; i < Shape::kQueries * per_row; i += kScanThreads) {
            const int r = i / per_row, offset = i % per_row * 16, row = query0 + r;
            const bool real = row < args.n_queries;
            cp_async16(dst + r * query_pitch + offset,
                       args.queries + static_cast<int64_t>(real ? row : 0) * args.pitch + chunk0 * kChunkBytes + offset,
                       real ? 16 : 0);
        }
    };
    int load_tile = split, load_chunk = 0, load_stage = 0;  // of the next stage to be loaded
    auto load_next = [&]() {
        const int64_t row0 = static_cast<int64_t>(load_tile) * kTileRows;
        for (int i = threadIdx.x; i < kTileRows * (kChunkBytes / 16); i += kScanThreads) {
            const int r = i / (kChunkBytes / 16), offset = i % (kChunkBytes / 16) * 16;
            const bool real = row0 + r < args.n;
            cp_async16(tiles + (load_stage * kTileRows + r) * kChunkPitch + offset,
                       args.gallery + (real ? row0 + r : 0) * args.pitch + load_chunk * kChunkBytes + offset,
                       real ? 16 : 0);
        }
        if (!args.queries_resident) load_queries(queries + load_stage * Shape::kQueries * kChunkPitch, load_chunk, 1);
        if (load_chunk == chunks - 1 && threadIdx.x < kTileRows) {
            const bool real = row0 + threadIdx.x < args.n;
            cp_async16(metas + load_stage * kTileRows + threadIdx.x,
                       args.gallery_meta + (real ? row0 + threadIdx.x : 0), real ? 16 : 0);
        }
        load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
        if (++load_chunk == chunks) {
            load_chunk = 0;
            load_tile += splits;
        }
    };

    float query_scale[2 * kMma], query_norm[2 * kMma], query_residual[2 * kMma];
    KeepList<kKeep> lists[2 * kMma];
#pragma unroll
    for (int i = 0; i < 2 * kMma; ++i) {
        const int row = query0 + (warp_m * kMma + i / 2) * 16 + i % 2 * 8 + lane / 4;
        const float4 meta = args.query_meta[row < args.n_queries ? row : 0];
        query_scale[i] = meta.x;
        query_norm[i] = meta.y;
        query_residual[i] = meta.z;
        lists[i].clear();
    }

    if (args.queries_resident) load_queries(queries, 0, chunks);
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
        if (s < steps) load_next();
        cp_async_commit();
    }
    Accumulator<kKind> acc[kMma][Shape::kTilesN];
    int tile = split, chunk = 0, stage = 0;
    for (int64_t step = 0; step < steps; ++step) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // this stage is there for all; the one that is loaded next has been read by all
        if (step + kStages - 1 < steps) load_next();
        cp_async_commit();
        if (chunk == 0) {
#pragma unroll
            for (int i = 0; i < kMma; ++i)
#pragma unroll
                for (int j = 0; j < Shape::kTilesN; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) acc[i][j].v[e] = 0;
        }
        const unsigned char* tile_smem = tiles + stage * kTileRows * kChunkPitch;
        const unsigned char* query_smem =
            queries + (args.queries_resident ? chunk * kChunkBytes : stage * Shape::kQueries * kChunkPitch);
#pragma unroll
        for (int k = 0; k < kChunkBytes; k += 32) {
            uint32_t a[kMma][4];
#pragma unroll
            for (int i = 0; i < kMma; ++i)
                ldmatrix_x4(a[i],
                            query_smem + ((warp_m * kMma + i) * 16 + lane % 16) * query_pitch + k + lane / 16 * 16);
#pragma unroll
            for (int j = 0; j < Shape::kTilesN; j += 2) {
                uint32_t b[4];
                ldmatrix_x4(b, tile_smem +
                                   ((warp_n * Shape::kTilesN + j) * 8 + lane % 8 + lane / 16 * 8) * kChunkPitch + k +
                                   lane / 8 % 2 * 16);
#pragma unroll
                for (int i = 0; i < kMma; ++i) {
                    acc[i][j].mma(a[i], b[0], b[1]);
                    acc[i][j + 1].mma(a[i], b[2], b[3]);
                }
            }
        }
        if (chunk == chunks - 1) {
            const int tile_row0 = warp_n * Shape::kTilesN * 8 + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < Shape::kTilesN; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int r = tile_row0 + j * 8 + e;
                    const uint32_t row = static_cast<uint32_t>(tile) * kTileRows + r;
                    const float4 meta = metas[stage * kTileRows + r];
                    if (row < static_cast<uint32_t>(args.n)) {
#pragma unroll
                        for (int i = 0; i < 2 * kMma; ++i) {
                            const float product = static_cast<float>(acc[i / 2][j].v[i % 2 * 2 + e]);
                            float u = fmaf(product, kKind == kShadowI8 ? meta.x * query_scale[i] : meta.x, meta.y);
                            u += fmaf(query_norm[i], meta.z, query_residual[i] * meta.w);
                            lists[i].push(u == u ? u : INFINITY, row);
                        }
                    }
                }
        }
        stage = stage + 1 == kStages ? 0 : stage + 1;
        if (++chunk == chunks) {
            chunk = 0;
            tile += splits;
        }
    }
    cp_async_wait<0>();

#pragma unroll
    for (int i = 0; i < 2 * kMma; ++i) {
        uint64_t keys[kKeep];
#pragma unroll
        for (int j = 0; j < kKeep; ++j)
            keys[j] = lists[i].row[j] == 0xffffffffu ? kNoKey : make_key(lists[i].u[j], lists[i].row[j]);
        float bound = merge_quad(keys);
        if (lists[i].row[kKeep - 1] != 0xffffffffu) bound = fmaxf(bound, lists[i].u[kKeep - 1]);
        bound = fmaxf(bound, __shfl_xor_sync(0xffffffffu, bound, 1));
        bound = fmaxf(bound, __shfl_xor_sync(0xffffffffu, bound, 2));
        const int row = query0 + (warp_m * kMma + i / 2) * 16 + i % 2 * 8 + lane / 4;
        if (row < args.n_queries && lane % 4 < 2) {
            const int64_t list = (static_cast<int64_t>(row) * splits + split) * Shape::kLists + warp_n;
            uint64_t* out = args.keys + list * Shape::kListKeys + lane % 4 * kKeep;
#pragma unroll
            for (int j = 0; j < kKeep; ++j) out[j] = keys[j];
            if (lane % 4 == 0) args.bounds[list] = bound;
        }
    }
}

// ---- select ----
struct SelectArgs {
    const uint64_t* keys;  // (rows, count)
    int64_t count;
    const float* bounds;  // (rows, n_bounds)
    int64_t n_bounds;
    int keep;           // per group
    uint64_t* out;      // (rows, groups * keep)
    float* out_bounds;  // (rows, groups)
};

GPU_INLINE int power_of_two_from(int n) {
    int size = 2;
    while (size < n) size *= 2;
    return size;
}

// Grid: (groups, rows). Each group sorts up to kSortMax keys, keeps the best, and bounds what it dropped.
__global__ void __launch_bounds__(kSortThreads, 2) select_keys(const SelectArgs args) {
    const int group = blockIdx.x, groups = gridDim.x;
    const int64_t row = blockIdx.y, first = static_cast<int64_t>(group) * kSortMax;
    const int count = static_cast<int>(args.count - first < kSortMax ? args.count - first : kSortMax);
    const int size = power_of_two_from(count);
    GPU_DYN_SMEM(smem);
    SmemCarver carve(smem);
    uint64_t* keys = carve.take<uint64_t>(size);
    float* largest = carve.take<float>(kSortThreads / 32);
    for (int i = threadIdx.x; i < size; i += kSortThreads)
        keys[i] = i < count ? args.keys[row * args.count + first + i] : kNoKey;
    float bound = -INFINITY;
    for (int64_t i = group * kSortThreads + threadIdx.x; i < args.n_bounds; i += groups * kSortThreads)
        bound = fmaxf(bound, args.bounds[row * args.n_bounds + i]);
    bound = warp_max(bound);
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = bound;
    sort_keys(keys, size);
    for (int i = threadIdx.x; i < args.keep; i += kSortThreads)
        args.out[(row * groups + group) * args.keep + i] = i < size ? keys[i] : kNoKey;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kSortThreads / 32; ++i) bound = fmaxf(bound, largest[i]);
        if (args.keep < size && keys[args.keep] != kNoKey) bound = fmaxf(bound, key_score(keys[args.keep]));
        args.out_bounds[row * groups + group] = bound;
    }
}

// ---- exact scores ----
struct ExactArgs {
    Rows queries, gallery;
    int metric;
};

// The score of one pair, by one warp: summed in double and rounded to float once, as the CPU path does, in an order
// that depends on d alone, so that every kernel gets the same bits.
GPU_INLINE float exact_score(const ExactArgs& args, int64_t query, int64_t row) {
    const int lane = threadIdx.x % 32;
    const int d = static_cast<int>(args.gallery.d);
    double sum = 0.0, query_square = 0.0, row_square = 0.0;
    for (int j = lane; j < d; j += 32) {
        const double a = load_element(args.queries, query, j), b = load_element(args.gallery, row, j);
        if (args.metric == kL2) {
            sum = fma(a - b, a - b, sum);
        } else {
            sum = fma(a, b, sum);
            if (args.metric == kCosine) {
                query_square = fma(a, a, query_square);
                row_square = fma(b, b, row_square);
            }
        }
    }
    sum = warp_sum(sum);
    if (args.metric == kL2) return -static_cast<float>(sum);
    if (args.metric == kCosine) {
        const double norms = sqrt(warp_sum(query_square)) * sqrt(warp_sum(row_square));
        sum = norms > 0.0 ? sum / norms : 0.0;  // a row without a direction scores 0
    }
    return static_cast<float>(sum);
}

// Grid: (candidates / 8, queries); one warp per candidate.
__global__ void __launch_bounds__(256, 4)
    rescore(const ExactArgs exact, const uint64_t* __restrict__ candidates, int count, uint64_t* __restrict__ out) {
    const int i = blockIdx.x * 8 + threadIdx.x / 32;
    if (i >= count) return;  // the whole warp leaves
    const int64_t query = blockIdx.y;
    const uint64_t key = candidates[query * count + i];
    uint64_t rescored = kNoKey;
    if (key != kNoKey) rescored = make_key(exact_score(exact, query, key_row(key)), key_row(key));
    if (threadIdx.x % 32 == 0) out[query * count + i] = rescored;
}

// ---- finish ----
struct OutArgs {
    float* distances;  // (n_queries, k)
    int64_t* indices;  // (n_queries, k); -1 where the gallery has fewer rows
    int k;
    int64_t base;  // of this part's rows in the whole gallery
    int metric;
};

GPU_INLINE void write_result(const OutArgs& out, int64_t query, int j, uint64_t key) {
    const bool real = key != kNoKey;
    const float score = real ? key_score(key) : -INFINITY;
    out.distances[query * out.k + j] = out.metric == kL2 ? 0.0f - score : score;
    out.indices[query * out.k + j] = real ? out.base + key_row(key) : -1;
}

struct FinishArgs {
    const uint64_t* keys;  // (n_queries, count), exact
    int count;
    const float* bounds;  // (n_queries,): no row outside keys has a higher u
    const float4* query_meta;
    int64_t d;
    unsigned* failed;        // failed[0]: how many queries are not certified
    unsigned* failed_query;  // which
};

// One block per query.
__global__ void __launch_bounds__(kSortThreads, 2) finish(const FinishArgs args, const OutArgs out) {
    const int64_t query = blockIdx.x;
    const int size = power_of_two_from(args.count > out.k ? args.count : out.k);
    GPU_DYN_SMEM(smem);
    SmemCarver carve(smem);
    uint64_t* keys = carve.take<uint64_t>(size);
    for (int i = threadIdx.x; i < size; i += kSortThreads)
        keys[i] = i < args.count ? args.keys[query * args.count + i] : kNoKey;
    sort_keys(keys, size);
    float bound = args.bounds[query];
    if (out.metric == kL2) {
        const float square = args.query_meta[query].w;
        bound = 2.0f * bound - square * (1.0f - 2.0f * slack(args.d));
    }
    const uint64_t last = keys[out.k - 1];
    // Nothing dropped, or the k-th is strictly better than all that was. A NaN in either fails, as it must.
    const bool certified = bound == -INFINITY || (last != kNoKey && bound < key_score(last));
    if (certified) {
        for (int j = threadIdx.x; j < out.k; j += kSortThreads) write_result(out, query, j, keys[j]);
    } else if (threadIdx.x == 0) {
        args.failed_query[atomicAdd(args.failed, 1u)] = static_cast<unsigned>(query);
    }
}

// ---- the exact way ----
struct ExactScanArgs {
    const unsigned* failed;
    const unsigned* failed_query;
    int k;
    uint64_t* keys;  // (n_queries, splits, k)
};

constexpr int kExactRound = 128;  // rows a block scores between two looks at its buffer

GPU_INLINE int exact_buffer(int k) { return power_of_two_from(k + 2 * kExactRound); }

// Grid: (splits, slots). A slot takes the failed queries slot, slot + slots, ...; mostly there are none.
__global__ void __launch_bounds__(256, 4) exact_scan(const ExactArgs exact, const ExactScanArgs args) {
    const int size = exact_buffer(args.k);
    GPU_DYN_SMEM(smem);
    SmemCarver carve(smem);
    uint64_t* keys = carve.take<uint64_t>(size);
    int* filled = carve.take<int>(1);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int splits = gridDim.x;
    const unsigned n_failed = *args.failed;
    for (unsigned slot = blockIdx.y; slot < n_failed; slot += gridDim.y) {
        const int64_t query = args.failed_query[slot];
        for (int i = threadIdx.x; i < size; i += blockDim.x) keys[i] = kNoKey;
        if (threadIdx.x == 0) *filled = 0;
        __syncthreads();
        for (int64_t round = blockIdx.x; round * kExactRound < exact.gallery.n; round += splits) {
            const uint64_t worst = keys[args.k - 1];
            __syncthreads();  // nobody adds a key before all have read the threshold
            for (int r = warp; r < kExactRound; r += 8) {
                const int64_t row = round * kExactRound + r;
                if (row >= exact.gallery.n) break;
                const uint64_t key = make_key(exact_score(exact, query, row), static_cast<uint32_t>(row));
                if (lane == 0 && key < worst) keys[args.k + atomicAdd(filled, 1)] = key;
            }
            __syncthreads();
            const bool full = *filled > kExactRound || round + splits > (exact.gallery.n - 1) / kExactRound;
            if (full) {
                sort_keys(keys, size);
                for (int i = args.k + threadIdx.x; i < size; i += blockDim.x) keys[i] = kNoKey;
                if (threadIdx.x == 0) *filled = 0;
                __syncthreads();
            }
        }
        for (int i = threadIdx.x; i < args.k; i += blockDim.x)
            args.keys[(static_cast<int64_t>(slot) * splits + blockIdx.x) * args.k + i] = keys[i];
        __syncthreads();
    }
}

// Grid: slots. Merges the splits of each failed query.
__global__ void __launch_bounds__(kSortThreads, 2)
    finish_exact(const ExactScanArgs args, int splits, const OutArgs out) {
    const int count = splits * args.k, size = power_of_two_from(count);
    GPU_DYN_SMEM(smem);
    SmemCarver carve(smem);
    uint64_t* keys = carve.take<uint64_t>(size);
    const unsigned n_failed = *args.failed;
    for (unsigned slot = blockIdx.x; slot < n_failed; slot += gridDim.x) {
        for (int i = threadIdx.x; i < size; i += kSortThreads)
            keys[i] = i < count ? args.keys[static_cast<int64_t>(slot) * count + i] : kNoKey;
        sort_keys(keys, size);
        for (int j = threadIdx.x; j < out.k; j += kSortThreads) write_result(out, args.failed_query[slot], j, keys[j]);
        __syncthreads();
    }
}

// One block per query: merges the results of parts of a gallery, given in ascending order of their rows.
__global__ void __launch_bounds__(kSortThreads, 2)
    merge_parts(const float* __restrict__ distances, const int64_t* __restrict__ indices, int parts, int64_t n_queries,
                const OutArgs out) {
    const int64_t query = blockIdx.x;
    const int count = parts * out.k, size = power_of_two_from(count);
    GPU_DYN_SMEM(smem);
    SmemCarver carve(smem);
    uint64_t* keys = carve.take<uint64_t>(size);
    auto at = [&](int i) { return (static_cast<int64_t>(i / out.k) * n_queries + query) * out.k + i % out.k; };
    for (int i = threadIdx.x; i < size; i += kSortThreads) {
        keys[i] = kNoKey;
        if (i < count && indices[at(i)] >= 0) {
            const float value = distances[at(i)];
            keys[i] = make_key(out.metric == kL2 ? -value : value, static_cast<uint32_t>(i));
        }
    }
    sort_keys(keys, size);
    for (int j = threadIdx.x; j < out.k; j += kSortThreads) {
        const bool real = keys[j] != kNoKey;
        const float score = real ? key_score(keys[j]) : -INFINITY;
        out.distances[query * out.k + j] = out.metric == kL2 ? 0.0f - score : score;
        out.indices[query * out.k + j] = real ? indices[at(static_cast<int>(key_row(keys[j])))] : -1;
    }
}

// ---- host ----
inline int shadow_pitch(int64_t d, int kind) {
    const int64_t bytes = d * (kind == kShadowI8 ? 1 : 2);
    return static_cast<int>((bytes + kChunkBytes - 1) / kChunkBytes * kChunkBytes);
}

inline void run_shadow(const ShadowArgs& args, cudaStream_t stream) {
    if (args.rows.n == 0) return;
    const int64_t blocks = (args.rows.n + 7) / 8;
    if (blocks > 0x7fffffff) throw std::invalid_argument("make_shadow: more than 2^34 rows in one call");
    GPU_LAUNCH(dim3(static_cast<unsigned>(blocks)), 256, 0, stream, make_shadow, args);
}

struct SearchShape {
    int64_t n_queries, n, d;
    int k, kind;
    int multiprocessors;
    size_t smem_limit;  // per block, what the device allows on request
};

// The shapes of the scan that are built: for up to 16 queries; for more; the same in less shared memory; for a large k.
using ScanFew = ScanShape<1, 1, 4, 6, 64>;
using ScanWide = ScanShape<4, 2, 8, 3, 64>;
using ScanNarrow = ScanShape<4, 2, 8, 3, 32>;
using ScanDeep = ScanShape<4, 1, 16, 3, 64>;

// Which scan runs, over how many splits, and where its scratch lies. One for a launch and its allocation.
struct SearchPlan {
    enum Scan { kFew, kWide, kNarrow, kDeep } scan;
    int splits, lists, list_keys, queries_per_block, tile_rows;
    int blocks_per_multiprocessor;  // of the scan
    int64_t slots;                  // blocks of the scan that run at once
    int select;                     // candidates that are rescored
    int exact_splits, exact_slots;
    bool resident;
    int64_t candidates;                                               // per query, out of the scan
    size_t keys_a, keys_b, bounds_a, bounds_b, exact, failed, total;  // offsets into scratch, bytes
};

constexpr size_t kReserved = 1024;  // shared memory that a block is charged besides its own

// The launch bounds hold registers to two blocks a multiprocessor; its shared memory is what one block may have, and
// what that block is charged besides.
inline bool two_fit(const SearchShape& shape, size_t smem) {
    return 2 * (smem + kReserved) <= shape.smem_limit + kReserved;
}

template <class Shape>
void take_scan(SearchPlan& plan, SearchPlan::Scan scan, const SearchShape& shape) {
    const int pitch = shadow_pitch(shape.d, shape.kind);
    plan.scan = scan;
    plan.lists = Shape::kLists, plan.list_keys = Shape::kListKeys;
    plan.queries_per_block = Shape::kQueries, plan.tile_rows = Shape::kTileRows;
    plan.resident = Shape::smem(pitch, true) <= (shape.smem_limit < 99 * 1024 ? shape.smem_limit : 99 * 1024);
    plan.blocks_per_multiprocessor = two_fit(shape, Shape::smem(pitch, plan.resident)) ? 2 : 1;
    plan.slots = static_cast<int64_t>(shape.multiprocessors) * plan.blocks_per_multiprocessor;
}

// Which scan: the first part of a plan, of which only the device, d, k, the kind and whether there are few queries
// count.
inline SearchPlan pick_scan(const SearchShape& shape) {
    SearchPlan plan = {};
    if (shape.k > 512) {
        take_scan<ScanDeep>(plan, SearchPlan::kDeep, shape);
    } else if (shape.n_queries <= 16 && shape.k <= 256) {
        take_scan<ScanFew>(plan, SearchPlan::kFew, shape);
    } else {
        SearchPlan narrow = {};
        take_scan<ScanWide>(plan, SearchPlan::kWide, shape);
        take_scan<ScanNarrow>(narrow, SearchPlan::kNarrow, shape);
        if (narrow.slots > plan.slots) plan = narrow;
    }
    return plan;
}

constexpr int64_t kQueriesAtOnce = 4096;

// Queries of one call, half of kQueriesAtOnce to all: blocks of which a whole number of splits fills the slots best.
// Then the query blocks of a part of the gallery run together and read it once, and no block trails behind the others.
inline int64_t queries_at_once(const SearchShape& shape) {
    SearchShape many = shape;
    many.n_queries = kQueriesAtOnce;
    const SearchPlan plan = pick_scan(many);
    const int64_t most = kQueriesAtOnce / plan.queries_per_block;
    int64_t best = most;
    for (int64_t blocks = most; blocks >= most / 2; --blocks)
        if (plan.slots / blocks * blocks > plan.slots / best * best) best = blocks;
    return best * plan.queries_per_block;
}

inline SearchPlan plan_search(const SearchShape& shape) {
    if (shape.n < 1 || shape.n > 0x7fffffff - 64)
        throw std::invalid_argument("search: expected 1 to 2^31 - 65 gallery rows in one part, got " +
                                    std::to_string(shape.n));
    if (shape.k < 1 || shape.k > kMaxK)
        throw std::invalid_argument("search: expected k from 1 to 2048, got " + std::to_string(shape.k));
    if (shape.n_queries < 1 || shape.n_queries > 32768)
        throw std::invalid_argument("search: expected 1 to 32768 queries in one call, got " +
                                    std::to_string(shape.n_queries));
    SearchPlan plan = pick_scan(shape);
    // Of the k best, a list may be expected to hold fewer than so many: far below the 8, 16 or 32 that it keeps. Then
    // by chance (Poisson) a thread's list or the merge overflows, and the query goes the exact way: 1 in 1,200 at k =
    // 100, 190 at 512, 6,000 at 2,048; of few queries, whose lists are short, 1 in 26 at k = 100. Splits that fill the
    // device make it rarer.
    const int per_list = plan.scan == SearchPlan::kDeep ? 12 : 4;
    const int64_t blocks_m = (shape.n_queries + plan.queries_per_block - 1) / plan.queries_per_block;
    const int64_t tiles = (shape.n + plan.tile_rows - 1) / plan.tile_rows;
    const int64_t enough = shape.k / (plan.lists * per_list) + 1;
    // As many as run at once and no more; where k needs more lists, as many again.
    const int64_t together = plan.slots > blocks_m ? plan.slots / blocks_m : 1;
    int64_t splits = (enough + together - 1) / together * together;
    if (plan.scan == SearchPlan::kFew && splits < 4 * enough) splits = 4 * enough;
    if (splits > tiles) splits = tiles;
    if (splits > 65535) splits = 65535;
    plan.splits = static_cast<int>(splits);
    plan.candidates = splits * plan.lists * plan.list_keys;
    const int64_t wanted = 2 * static_cast<int64_t>(shape.k) + 64;
    plan.select = static_cast<int>(plan.candidates < wanted ? plan.candidates : wanted);
    const int exact_max = kSortMax / shape.k;
    const int64_t rounds = (shape.n + kExactRound - 1) / kExactRound;
    plan.exact_splits = static_cast<int>(rounds < exact_max ? rounds : exact_max);
    if (plan.exact_splits > 64) plan.exact_splits = 64;
    plan.exact_slots = static_cast<int>(shape.n_queries < 64 ? shape.n_queries : 64);
    size_t at = 0;
    auto take = [&](size_t bytes) {
        const size_t start = at;
        at += (bytes + 255) / 256 * 256;
        return start;
    };
    const size_t q = static_cast<size_t>(shape.n_queries);
    const size_t groups = static_cast<size_t>((plan.candidates + kSortMax - 1) / kSortMax);
    plan.keys_a = take(q * plan.candidates * 8);
    const size_t selected = groups * plan.select;
    plan.keys_b = take(q * (selected > static_cast<size_t>(plan.select) ? selected : plan.select) * 8);
    plan.bounds_a = take(q * plan.splits * plan.lists * 4);
    plan.bounds_b = take(q * groups * 4);
    plan.exact = take(q * plan.exact_splits * shape.k * 8);
    plan.failed = take((q + 1) * 4);
    plan.total = at;
    return plan;
}

struct SearchArgs {
    ExactArgs exact;
    const unsigned char* query_shadow;
    const float4* query_meta;
    const unsigned char* gallery_shadow;
    const float4* gallery_meta;
    OutArgs out;
    unsigned char* scratch;  // plan.total bytes
};

template <Shadow kKind>
void launch_scan(const SearchPlan& plan, const ScanArgs& scan_args, dim3 grid, cudaStream_t stream) {
    const size_t pitch = scan_args.pitch;
    auto smem = [&](auto shape) { return decltype(shape)::smem(pitch, plan.resident); };
    switch (plan.scan) {
        case SearchPlan::kFew:
            GPU_LAUNCH(grid, kScanThreads, smem(ScanFew()), stream, (scan<kKind, ScanFew>), scan_args);
            break;
        case SearchPlan::kWide:
            GPU_LAUNCH(grid, kScanThreads, smem(ScanWide()), stream, (scan<kKind, ScanWide>), scan_args);
            break;
        case SearchPlan::kNarrow:
            GPU_LAUNCH(grid, kScanThreads, smem(ScanNarrow()), stream, (scan<kKind, ScanNarrow>), scan_args);
            break;
        case SearchPlan::kDeep:
            GPU_LAUNCH(grid, kScanThreads, smem(ScanDeep()), stream, (scan<kKind, ScanDeep>), scan_args);
            break;
    }
}

// k nearest rows of one gallery part for each query. Asynchronous on the stream; no synchronisation, no allocation.
inline void run_search(const SearchShape& shape, const SearchArgs& args, cudaStream_t stream) {
    const SearchPlan plan = plan_search(shape);
    auto keys_a = reinterpret_cast<uint64_t*>(args.scratch + plan.keys_a);
    auto keys_b = reinterpret_cast<uint64_t*>(args.scratch + plan.keys_b);
    auto bounds_a = reinterpret_cast<float*>(args.scratch + plan.bounds_a);
    auto bounds_b = reinterpret_cast<float*>(args.scratch + plan.bounds_b);
    auto exact_keys = reinterpret_cast<uint64_t*>(args.scratch + plan.exact);
    auto failed = reinterpret_cast<unsigned*>(args.scratch + plan.failed);
    const unsigned n_queries = static_cast<unsigned>(shape.n_queries);
    gpu::check(cudaMemsetAsync(failed, 0, sizeof(unsigned), stream), "search: clearing the count of failed queries");

    ScanArgs scan_args = {args.query_shadow,
                          args.query_meta,
                          static_cast<int>(n_queries),
                          args.gallery_shadow,
                          args.gallery_meta,
                          static_cast<int>(shape.n),
                          shadow_pitch(shape.d, shape.kind),
                          plan.resident,
                          keys_a,
                          bounds_a};
    const dim3 grid((n_queries + plan.queries_per_block - 1) / plan.queries_per_block, plan.splits);
    if (shape.kind == kShadowI8)
        launch_scan<kShadowI8>(plan, scan_args, grid, stream);
    else
        launch_scan<kShadowBF16>(plan, scan_args, grid, stream);

    int64_t count = plan.candidates, n_bounds = static_cast<int64_t>(plan.splits) * plan.lists;
    while (true) {  // until one group is left; the first pass leaves at most 52 % of the keys
        const unsigned groups = static_cast<unsigned>((count + kSortMax - 1) / kSortMax);
        SelectArgs select = {keys_a, count, bounds_a, n_bounds, plan.select, keys_b, bounds_b};
        int size = 2;
        while (size < (count < kSortMax ? count : kSortMax)) size *= 2;
        GPU_LAUNCH(dim3(groups, n_queries), kSortThreads, size * 8 + 32, stream, select_keys, select);
        std::swap(keys_a, keys_b);
        std::swap(bounds_a, bounds_b);
        count = static_cast<int64_t>(groups) * plan.select;
        n_bounds = groups;
        if (groups == 1) break;
    }
    GPU_LAUNCH(dim3((plan.select + 7) / 8, n_queries), 256, 0, stream, rescore, args.exact, keys_a, plan.select,
               keys_b);
    FinishArgs finish_args = {keys_b, plan.select, bounds_a, args.query_meta, shape.d, failed, failed + 1};
    int size = 2;
    while (size < (plan.select > shape.k ? plan.select : shape.k)) size *= 2;
    GPU_LAUNCH(dim3(n_queries), kSortThreads, size * 8, stream, finish, finish_args, args.out);

    ExactScanArgs exact_args = {failed, failed + 1, shape.k, exact_keys};
    size = 2;
    while (size < shape.k + 2 * kExactRound) size *= 2;
    GPU_LAUNCH(dim3(plan.exact_splits, plan.exact_slots), 256, size * 8 + 16, stream, exact_scan, args.exact,
               exact_args);
    size = 2;
    while (size < plan.exact_splits * shape.k) size *= 2;
    GPU_LAUNCH(dim3(plan.exact_slots), kSortThreads, size * 8, stream, finish_exact, exact_args, plan.exact_splits,
               args.out);
}

inline void run_merge_parts(const float* distances, const int64_t* indices, int parts, int64_t n_queries,
                            const OutArgs& out, cudaStream_t stream) {
    if (n_queries == 0) return;
    if (static_cast<int64_t>(parts) * out.k > kSortMax || parts < 1)
        throw std::invalid_argument("merge_parts: expected parts * k from 1 to 8192, got " + std::to_string(parts) +
                                    " * " + std::to_string(out.k));
    int size = 2;
    while (size < parts * out.k) size *= 2;
    GPU_LAUNCH(dim3(static_cast<unsigned>(n_queries)), kSortThreads, size * 8, stream, merge_parts, distances, indices,
               parts, n_queries, out);
}

}  // namespace fct::cuda
