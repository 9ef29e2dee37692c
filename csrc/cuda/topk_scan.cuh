// The tensor-core scan of the shadow, with its selection in registers; see topk.cuh.
#pragma once
#include "topk_shadow.cuh"

namespace fct::cuda {

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

}  // namespace fct::cuda
