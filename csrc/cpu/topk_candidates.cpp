#include "cpu/topk_candidates.h"

#include <algorithm>
#include <cmath>

namespace fct::cpu {

namespace {

// A limit that at least `rank` of the n costs do not exceed, hardly above the rank-th least: the range is cut in five
// again and again, without the branches of a selection, which no predictor could know.
float limit_of(const float* costs, int64_t n, int64_t rank, const TopkKernels& kernel) {
    constexpr int kLanes = 8;
    float least[kLanes], largest[kLanes];
    std::fill(least, least + kLanes, costs[0]);
    std::fill(largest, largest + kLanes, costs[0]);
    for (int64_t i = 0; i + kLanes <= n; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) {
            const float cost = costs[i + lane];
            least[lane] = cost < least[lane] ? cost : least[lane];
            largest[lane] = cost > largest[lane] ? cost : largest[lane];
        }
    for (int64_t i = n / kLanes * kLanes; i < n; ++i) {
        least[0] = std::min(least[0], costs[i]);
        largest[0] = std::max(largest[0], costs[i]);
    }
    float below = *std::min_element(least, least + kLanes), limit = *std::max_element(largest, largest + kLanes);
    for (int round = 0; round < 8; ++round) {
        float cuts[4];
        int64_t counts[4];
        for (int i = 0; i < 4; ++i) cuts[i] = below + (limit - below) * (0.2f * static_cast<float>(i + 1));
        if (!(cuts[0] > below && cuts[3] < limit)) break;  // no room, or no numbers
        kernel.count4(costs, n, cuts, counts);
        int cut = 0;
        while (cut < 4 && counts[cut] < rank) ++cut;
        if (cut > 0) below = cuts[cut - 1];
        if (cut < 4) limit = cuts[cut];
        if (cut < 4 && counts[cut] == rank) break;
    }
    return limit;
}

}  // namespace

Candidate candidate(int64_t id, double key, double margin) {
    constexpr double kLeast = std::numeric_limits<float>::min();
    const double wider = margin + (std::fabs(key) + margin) * 0x1p-22 + kLeast;
    return {id, static_cast<float>(key - wider), static_cast<float>(key + wider)};
}

void Candidates::shrink(int64_t rank, const TopkKernels& kernel, float trust) {
    const auto n = static_cast<int64_t>(rows.size());
    if (n >= rank) {
        costs.resize(rows.size());
        for (size_t i = 0; i < rows.size(); ++i) costs[i] = -rows[i].low - trust * (rows[i].high - rows[i].low);
        tau = std::max<double>(tau, -limit_of(costs.data(), n, rank, kernel));
    }
    size_t kept = 0;
    for (const Candidate& c : rows) {  // without a branch, since about every other one goes
        rows[kept] = c;
        kept += !(c.high < tau);
    }
    rows.resize(kept);
}

bool Candidates::proven(int64_t k) const {
    return std::count_if(rows.begin(), rows.end(), [&](const Candidate& c) { return c.low >= tau; }) >= k;
}

}  // namespace fct::cpu
