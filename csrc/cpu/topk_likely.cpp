// The look ahead of a search with levels: which rows are likely near, so that thresholds are sharp from the start.
#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/topk_quantise.h"
#include "cpu/topk_scan.h"

namespace fct::cpu {
namespace {

constexpr int64_t kMostLikely = 1024;  // k beyond which the running threshold is as good
constexpr float kShare = 0.5f;         // of what a tail may add, near rows are thought to have

// Keeps the `count` likeliest and returns what the others do not reach.
float keep(std::vector<Likely>& rows, size_t count) {
    if (rows.size() < count) return -std::numeric_limits<float>::max();
    const auto better = [](const Likely& a, const Likely& b) { return a.estimate > b.estimate; };
    std::nth_element(rows.begin(), rows.begin() + static_cast<int64_t>(count - 1), rows.end(), better);
    rows.resize(count);
    return rows.back().estimate;
}

}  // namespace

void ScanBlock::foresee(const Search& s, int64_t from, int64_t to, std::vector<Likely>* likely, int worker) const {
    const auto wanted = static_cast<size_t>(s.k + 22);
    if (s.k > kMostLikely || (to - from) * kTile < 8 * static_cast<int64_t>(wanted)) return;
    const int64_t steps = std::max<int64_t>(1, std::min(steps_, std::max<int64_t>(4, steps_ / 4)));
    const auto padded = base_.size();
    std::vector<float> bars(padded, kInfinityF), nothing(padded, 0), tail(padded), threshold(padded), limit(padded),
        limit_inverse(padded);
    std::vector<int32_t> init(padded, 0);
    for (const auto& [start, group] : groups_)
        for (int j = 0; j < group; ++j) {
            const auto i = static_cast<size_t>(start + j);
            tail[i] = kShare * per_tail_[i];
            if (static_cast<int64_t>(i) >= count_ || !facts_[i].usable) continue;
            bars[i] = -std::numeric_limits<float>::max();
            for (int64_t step = 0; step < steps; ++step) {
                int8_t bytes[4];
                std::memcpy(bytes, words_.data() + start * steps_ + step * group + j, 4);
                init[i] -= 128 * (bytes[0] + bytes[1] + bytes[2] + bytes[3]);
            }
        }
    const ScanQueries queries{words_.data(), init.data(),      steps_,         inverse_.data(),
                              bars.data(),   nothing.data(),   nothing.data(), nothing.data(),
                              tail.data(),   threshold.data(), limit.data(),   limit_inverse.data()};
    const auto room = static_cast<float>(room_beside(4 * steps_));
    uint64_t masks[kScanQueries];
    alignas(64) float keys[kScanQueries * kTile];
    ScanTile tile;
    for (int64_t t = from; t < to; ++t) {
        if (((t - from) & 255) == 0 && !s.control.go(worker)) return;
        s.kernel.open_tile(s.shadow.tiles + t * steps_ * 4 * kTile, nullptr, s.shadow.meta + t * kHeadMeta, true,
                           nullptr, room, &tile);
        s.kernel.aim(tile, queries, static_cast<int64_t>(padded));
        for (const auto& [start, group] : groups_) {
            if (__builtin_expect(!s.kernel.scan(tile, steps, queries, start, group, masks, keys), 1)) continue;
            for (int j = 0; j < group; ++j)
                for (uint64_t mask = masks[j]; mask; mask &= mask - 1) {
                    const int r = __builtin_ctzll(mask);
                    const auto q = static_cast<size_t>(start + j);
                    if (t * kTile + r >= s.gallery.n) break;
                    std::vector<Likely>& rows = likely[q];
                    rows.push_back({keys[j * kTile + r] + tail[q] * tile.tails[r], t * kTile + r});
                    if (rows.size() >= 2 * wanted) bars[q] = keep(rows, wanted);
                }
        }
    }
}

double ScanBlock::reached_by(const Search& s, int64_t q, std::vector<Likely>& likely) const {
    if (!usable(q)) return -kInfinity;
    keep(likely, static_cast<size_t>(s.k + 22));
    std::vector<int64_t> ids;
    const int64_t query = queries_[static_cast<size_t>(q)];
    for (const Likely& row : likely)
        if (row.id != s.self_of(query)) ids.push_back(row.id);
    return exact_bar(s, query, ids);
}

}  // namespace fct::cpu
