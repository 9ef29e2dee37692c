#include "cpu/topk.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu/convert.h"
#include "cpu/topk_scan.h"

namespace fct::cpu {

namespace {

// Queries that pass over a tile while it is in the first-level cache: the more, the fewer times it is fetched and its
// halves put together; but their own bytes, which a tile's passes read in order, have to stay in a second-level cache.
constexpr int64_t kMostQueries = 504, kLeastQueries = 192, kQueryBytes = 192 << 10;
constexpr int64_t kGuessQueries = 24;
constexpr int64_t kGuessTiles = 64;
// For progress, which counts tiles times queries: about how many rows are scanned while one is scored in float64.

}  // namespace

const TopkKernels& kernels(Isa isa) {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::portable:
            return portable::topk_kernels();
        case Isa::avx2:
            return avx2::topk_kernels();
        case Isa::avx512:
            return avx512::topk_kernels();
        default:
            return avx512_vnni::topk_kernels();
    }
#else
    (void)isa;
    return portable::topk_kernels();
#endif
}

const float* RowSource::row(int64_t i, float* scratch) const {
    const int64_t at = i * row_stride;
    switch (dtype) {
        case DType::f32:
            if (in_place()) return static_cast<const float*>(data) + at;
            std::memcpy(scratch, static_cast<const char*>(data) + at * 4, static_cast<size_t>(d) * 4);
            break;
        case DType::f16:
            for (int64_t j = 0; j < d; ++j) scratch[j] = from_f16(load_u16(data, at + j));
            break;
        case DType::bf16:
            for (int64_t j = 0; j < d; ++j) scratch[j] = from_bf16(load_u16(data, at + j));
            break;
        case DType::i8: {
            const int8_t* from = static_cast<const int8_t*>(data) + at;
            const float* factor = scale + i * scale_row;
            if (scale_column) {
                for (int64_t j = 0; j < d; ++j) scratch[j] = static_cast<float>(from[j]) * factor[j];
            } else {
                const float one = *factor;
                for (int64_t j = 0; j < d; ++j) scratch[j] = static_cast<float>(from[j]) * one;
            }
            break;
        }
    }
    return scratch;
}

bool topk(const RowSource& queries, const RowSource& gallery, const Shadow& shadow, Metric metric, int64_t k,
          int64_t self, float* distances, int64_t* indices, int threads, Isa isa, KeepGoing keep_going,
          SearchCounts* counts) {
    Control control(keep_going);
    const Search s{queries, gallery,
                   shadow,  metric,
                   k,       self,
                   threads, kernels(isa),
                   control, shadow.tiles && metric != Metric::l2 ? norm_of(shadow.shift, gallery.d) : 0.0};
    std::vector<int64_t> all;
    if (!shadow.tiles) {
        for (int64_t q = 0; q < queries.n; ++q) all.push_back(q);
        return search_all(s, all, distances, indices);
    }
    const int64_t tiles = (gallery.n + kTile - 1) / kTile;
    // Blocks fill the caches and, where there are enough queries, come out even over the threads.
    const int64_t most = std::min(kMostQueries, std::max(kLeastQueries, kQueryBytes / std::max<int64_t>(gallery.d, 1)));
    const int64_t rounds = (queries.n + most * threads - 1) / (most * threads);
    int64_t block = (queries.n + rounds * threads - 1) / (rounds * threads);
    block =
        std::min<int64_t>(queries.n, std::max<int64_t>(12, (block + kScanQueries - 1) / kScanQueries * kScanQueries));
    const int64_t blocks = (queries.n + block - 1) / block;
    const int64_t splits = std::max<int64_t>(1, blocks >= threads ? 1 : std::min<int64_t>(tiles / 32, 2 * threads));
    std::vector<Candidates> found(static_cast<size_t>(blocks * splits * block));
    std::vector<uint8_t> through_all(static_cast<size_t>(queries.n), 0);
    const int64_t rescoring = k * 4 * kExactCost / kTile;  // of a query: a guess of what the scan will leave
    control.expect(queries.n * (tiles + rescoring));
    const bool levelled = shadow.levels.head > 0;
    std::atomic<bool> guess{!levelled && block >= kGuessQueries && tiles / splits >= kGuessTiles};
    // Queries of several parts are quantised once, and what one part proves helps the others.
    std::atomic<int64_t> tails{0};
    std::vector<std::unique_ptr<ScanBlock>> ready(static_cast<size_t>(splits > 1 ? blocks : 0));
    std::vector<Proven> best(static_cast<size_t>(splits > 1 && !guess ? queries.n : 0));
    const auto block_of = [&](int64_t b) {
        std::vector<int64_t> ids(static_cast<size_t>(std::min(block, queries.n - b * block)));
        std::iota(ids.begin(), ids.end(), b * block);
        return std::make_unique<ScanBlock>(s, std::move(ids));
    };
    for (size_t b = 0; b < ready.size(); ++b) ready[b] = block_of(static_cast<int64_t>(b));
    bool finished = control.tasks(threads, blocks * splits, [&](int64_t task, int worker) {
        const int64_t b = task / splits, part = task % splits;
        const int64_t first = b * block, count = std::min(block, queries.n - first);
        const int64_t from = tiles * part / splits, to = tiles * (part + 1) / splits;
        Candidates* const lists = found.data() + task * block;
        const auto scan = ready.empty() ? block_of(b) : std::make_unique<ScanBlock>(*ready[static_cast<size_t>(b)]);
        if (levelled && count >= kGuessQueries) {  // a sharp threshold is worth a look ahead
            std::vector<std::vector<Likely>> likely(static_cast<size_t>(count));
            scan->foresee(s, from, to, likely.data(), worker);
            for (int64_t q = 0; q < count; ++q) lists[q].tau = scan->reached_by(s, q, likely[static_cast<size_t>(q)]);
        }
        const std::vector<int64_t> failed =
            scan->scan(s, from, to, guess.load(), lists, worker, best.empty() ? nullptr : best.data() + first);
        tails.fetch_add(scan->tails());
        if (!failed.empty()) {
            if (static_cast<int64_t>(failed.size()) * 50 > count) guess.store(false);  // no gallery to guess about
            control.expect(static_cast<int64_t>(failed.size()) * (to - from));
            std::vector<Candidates> again(failed.size());
            std::vector<int64_t> wanted;
            for (int64_t q : failed) wanted.push_back(first + q);
            ScanBlock(s, wanted, true).scan(s, from, to, false, again.data(), worker, nullptr);
            for (size_t i = 0; i < failed.size(); ++i) lists[failed[i]] = std::move(again[i]);
        }
        if (part == 0)
            for (int64_t q = 0; q < count; ++q) through_all[static_cast<size_t>(first + q)] = !scan->usable(q);
    });
    if (!finished) return false;
    std::atomic<int64_t> rescored{0};
    finished = control.tasks(threads, queries.n, [&](int64_t q, int) {
        control.did(rescoring);
        if (through_all[static_cast<size_t>(q)]) return;
        Candidates merged;
        for (int64_t part = 0; part < splits; ++part) {
            Candidates& some = found[static_cast<size_t>(((q / block) * splits + part) * block + q % block)];
            merged.exhausted |= some.exhausted;
            merged.rows.insert(merged.rows.end(), some.rows.begin(), some.rows.end());
            std::vector<Candidate>().swap(some.rows);
        }
        if (!merged.exhausted) {
            merged.shrink(k, s.kernel);
            std::partition(merged.rows.begin(), merged.rows.end(),
                           [&](const Candidate& c) { return c.low >= merged.tau; });
        }
        if (merged.exhausted || static_cast<int64_t>(merged.rows.size()) < k) {
            through_all[static_cast<size_t>(q)] = 1;
            return;
        }
        rescore(s, q, merged.rows, distances + q * k, indices + q * k);
        rescored.fetch_add(static_cast<int64_t>(merged.rows.size()));
    });
    if (!finished) return false;
    for (int64_t q = 0; q < queries.n; ++q)
        if (through_all[static_cast<size_t>(q)]) all.push_back(q);
    if (counts) *counts = {rescored.load(), tails.load(), static_cast<int64_t>(all.size())};
    return all.empty() || search_all(s, all, distances, indices);
}

}  // namespace fct::cpu
