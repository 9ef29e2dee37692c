#include "convert.h"
#include "cuda_ops.h"
#include "topk.cuh"

namespace fct::cuda {

int shadow_row_bytes(int64_t d, int kind) { return shadow_pitch(d, kind); }

void make_shadow_rows(const RowsAt& rows, int metric, int kind, bool is_query, uintptr_t shadow, uintptr_t meta,
                      const Where& where) {
    refuse_after_fork();
    gpu::DeviceGuard guard(where.device);
    const ShadowArgs args = {
        to_rows(rows), metric, kind, is_query, at<unsigned char>(shadow), shadow_pitch(rows.d, kind), at<float4>(meta)};
    run_shadow(args, to_stream(where));
}

static SearchShape shape_of(const Search& s) {
    return {s.queries.n, s.gallery.n, s.gallery.d, s.k, s.kind, s.multiprocessors, s.shared_memory};
}

SearchSize search_size(const Search& s) {
    const SearchPlan plan = plan_search(shape_of(s));
    return {plan.total,
            plan.failed,
            plan.splits,
            static_cast<int>(plan.candidates),
            plan.select,
            plan.tile_rows,
            plan.blocks_per_multiprocessor};
}

int64_t search_queries(int64_t d, int kind, int k, int multiprocessors, size_t shared_memory) {
    return queries_at_once({1, 1, d, k, kind, multiprocessors, shared_memory});
}

void search(const Search& s, const Where& where) {
    refuse_after_fork();
    gpu::DeviceGuard guard(where.device);
    SearchArgs args = {};
    args.exact = {to_rows(s.queries), to_rows(s.gallery), s.metric};
    args.query_shadow = at<unsigned char>(s.query_shadow);
    args.query_meta = at<float4>(s.query_meta);
    args.gallery_shadow = at<unsigned char>(s.gallery_shadow);
    args.gallery_meta = at<float4>(s.gallery_meta);
    args.out = {at<float>(s.distances), at<int64_t>(s.indices), s.k, s.base, s.metric};
    args.scratch = at<unsigned char>(s.scratch);
    run_search(shape_of(s), args, to_stream(where));
}

void merge_part_results(uintptr_t distances, uintptr_t indices, int parts, int64_t n_queries, int k, int metric,
                        uintptr_t out_distances, uintptr_t out_indices, const Where& where) {
    refuse_after_fork();
    gpu::DeviceGuard guard(where.device);
    const OutArgs out = {at<float>(out_distances), at<int64_t>(out_indices), k, 0, metric};
    run_merge_parts(at<float>(distances), at<int64_t>(indices), parts, n_queries, out, to_stream(where));
}

}  // namespace fct::cuda
