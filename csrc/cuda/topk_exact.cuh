// From candidates to the answer: select, rescore, finish, and the exact way for queries that are not certified.
#pragma once
#include "topk_keys.cuh"

namespace fct::cuda {

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

}  // namespace fct::cuda
