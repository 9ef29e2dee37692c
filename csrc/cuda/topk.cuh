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

#include "topk_exact.cuh"
#include "topk_scan.cuh"
#include "topk_shadow.cuh"

namespace fct::cuda {

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
