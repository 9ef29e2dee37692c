#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/convert.h"
#include "cpu/topk_panel.h"
#include "cpu/topk_search.h"

namespace fct::cpu {

namespace {

constexpr int64_t kComparedMatches = 48;  // up to which a pass over all costs for every four is quicker than buckets

// The own row stands at infinity, where a row whose score overflows float32 may stand too.
int64_t own_within(int64_t own, float limit) { return own >= 0 && limit == kInfinityF ? 1 : 0; }

uint32_t ordered_bits(float x) {
    const uint32_t bits = bits_of(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Ascending; counting passes over the bytes, since these lists are sorted once per query.
void sort_floats(std::vector<float>& values, std::vector<float>& spare) {
    if (values.size() < 256) {
        std::sort(values.begin(), values.end());
        return;
    }
    spare.resize(values.size());
    size_t counts[4][256] = {};
    for (float x : values) {
        const uint32_t bits = ordered_bits(x);
        for (int b = 0; b < 4; ++b) ++counts[b][(bits >> (8 * b)) & 255];
    }
    for (int b = 0; b < 4; ++b) {
        if (counts[b][(ordered_bits(values[0]) >> (8 * b)) & 255] == values.size()) continue;
        size_t at = 0;
        for (size_t& c : counts[b]) {
            const size_t here = c;
            c = at;
            at += here;
        }
        for (float x : values) spare[counts[b][(ordered_bits(x) >> (8 * b)) & 255]++] = x;
        values.swap(spare);
    }
}

struct RankScratch {
    std::vector<float> matches, sorted, spare;
    std::vector<int32_t> match_places, places;
    std::vector<uint64_t> counts;
    std::vector<uint32_t> rows_before, rows_at, matches_at;
};

// Each of these: the sum over the matches of (matches at least as good) / (rows but the own at least as good).

double precision_by_comparing(const float* costs, int64_t n, int64_t own, const TopkKernels& kernel, RankScratch& s) {
    auto& t = s.matches;
    std::sort(t.begin(), t.end());
    const size_t m = t.size();
    double sum = 0;
    for (size_t j = 0; j < m; j += 4) {
        float limits[4];
        int64_t counts[4];
        for (size_t i = 0; i < 4; ++i) limits[i] = t[std::min(j + i, m - 1)];
        kernel.count4(costs, n, limits, counts);
        for (size_t i = 0; i < 4 && j + i < m; ++i) {
            const auto upto = std::upper_bound(t.begin(), t.end(), limits[i]) - t.begin();
            sum += static_cast<double>(upto) / static_cast<double>(counts[i] - own_within(own, limits[i]));
        }
    }
    return sum;
}

double precision_by_sorting(const float* costs, int64_t n, int64_t own, RankScratch& s) {
    auto& t = s.matches;
    sort_floats(t, s.spare);
    s.sorted.assign(costs, costs + n);
    sort_floats(s.sorted, s.spare);
    double sum = 0;
    size_t at = 0;
    for (size_t j = 0; j < t.size();) {
        size_t end = j + 1;
        while (end < t.size() && t[end] == t[j]) ++end;
        while (at < s.sorted.size() && s.sorted[at] <= t[j]) ++at;
        const auto rows = static_cast<double>(static_cast<int64_t>(at) - own_within(own, t[j]));
        sum += static_cast<double>(end - j) * static_cast<double>(end) / rows;
        j = end;
    }
    return sum;
}

// Buckets are monotone in cost, so only rows that share a bucket with a match need a comparison; the others are
// counted. No step of the loop over rows depends on where a row falls, which no branch predictor could know.
// best, worst: of the matches' costs.
double precision_by_buckets(const float* costs, int64_t n, int64_t own, float best, float worst,
                            const TopkKernels& kernel, RankScratch& s) {
    const auto& t = s.matches;
    const auto m = static_cast<int64_t>(t.size());
    int32_t buckets = 512;
    while (buckets < 65536 && buckets < n / 4) buckets *= 2;
    const float inverse = static_cast<float>(buckets - 1) / (worst - best);
    if (!(inverse > 0) || std::isinf(inverse))  // no spread, or more than float32 holds
        return precision_by_sorting(costs, n, own, s);
    const int32_t last = buckets + 1;  // bucket 0: better than every match; last: worse than every match
    constexpr uint64_t kMatch = uint64_t{1} << 32;
    const auto size = static_cast<size_t>(last) + 1;
    s.counts.assign(size, 0);  // rows in the low half, matches in the high half
    s.match_places.resize(static_cast<size_t>(m));
    s.places.resize(static_cast<size_t>(n));
    s.spare.resize(static_cast<size_t>(n));
    uint64_t* const counts = s.counts.data();
    int32_t* const places = s.places.data();
    float* const kept_costs = s.spare.data();
    kernel.bucket(t.data(), m, best, inverse, last, s.match_places.data());
    for (int64_t j = 0; j < m; ++j) counts[s.match_places[static_cast<size_t>(j)]] += kMatch;
    kernel.bucket(costs, n, best, inverse, last, places);
    int64_t kept = 0;  // rows that share a bucket with a match
    for (int64_t i = 0; i < n; ++i) {
        const int32_t b = places[i];
        const uint64_t count = counts[b];
        counts[b] = count + 1;
        places[kept] = b;
        kept_costs[kept] = costs[i];
        kept += count >= kMatch;
    }
    for (auto* part : {&s.rows_before, &s.rows_at, &s.matches_at}) part->resize(size);
    uint32_t *const rows_before = s.rows_before.data(), *const rows_at = s.rows_at.data();
    uint32_t* const matches_at = s.matches_at.data();
    uint64_t rows = 0, matches = 0, kept_rows = 0, comparisons = 0;
    for (size_t b = 0; b < size; ++b) {
        const uint64_t here = counts[b] & (kMatch - 1), matched = counts[b] >> 32;
        rows_before[b] = static_cast<uint32_t>(rows);
        rows_at[b] = static_cast<uint32_t>(kept_rows);
        matches_at[b] = static_cast<uint32_t>(matches);
        rows += here;
        matches += matched;
        kept_rows += matched ? here : 0;
        comparisons += here * matched;
    }
    if (comparisons > 64 * static_cast<uint64_t>(n)) return precision_by_sorting(costs, n, own, s);
    // Rows and matches in the order of their buckets; what was a bucket's begin becomes its end, the next one's begin.
    const auto padded = static_cast<size_t>(kept + m) + 2 * kPanel;
    s.sorted.resize(padded);
    float *const ordered = s.sorted.data(), *const ordered_matches = ordered + kept + kPanel;
    for (int64_t i = 0; i < kept; ++i) ordered[rows_at[places[i]]++] = kept_costs[i];
    for (int64_t j = 0; j < m; ++j) ordered_matches[matches_at[s.match_places[static_cast<size_t>(j)]]++] = t[j];
    std::fill(ordered + kept, ordered_matches, kInfinityF);
    std::fill(ordered_matches + m, ordered + padded, kInfinityF);
    return kernel.bucket_precision({ordered, ordered_matches, rows_before, rows_at, matches_at}, t.data(),
                                   s.match_places.data(), m);
}

void query_ranks(const float* costs, int64_t n, const int64_t* members, int64_t count, int64_t own,
                 const TopkKernels& kernel, RankScratch& s, int64_t* first, double* precision) {
    *first = -1;
    *precision = std::numeric_limits<double>::quiet_NaN();
    s.matches.resize(static_cast<size_t>(count));
    int64_t m = 0, best = -1;
    float cost = kInfinityF, worst = -kInfinityF;
    for (int64_t i = 0; i < count; ++i) {
        if (members[i] == own) continue;
        const float match = costs[members[i]];
        s.matches[static_cast<size_t>(m++)] = match;
        if (best < 0 || match < cost) best = members[i], cost = match;  // ascending ids: ties keep the lower
        if (match > worst) worst = match;
    }
    if (best < 0) return;
    s.matches.resize(static_cast<size_t>(m));
    const float below = std::nextafterf(cost, -kInfinityF);
    const float limits[4] = {cost, below, cost, below};
    int64_t head[4], tail[4];
    kernel.count4(costs, best, limits, head);
    kernel.count4(costs + best, n - best, limits, tail);
    *first = head[0] + tail[1] - (own < best ? own_within(own, cost) : 0);
    const double sum = m <= kComparedMatches ? precision_by_comparing(costs, n, own, kernel, s)
                                             : precision_by_buckets(costs, n, own, cost, worst, kernel, s);
    *precision = sum / static_cast<double>(m);
}

}  // namespace

bool ranks(const RowSource& queries, const RowSource& gallery, const int64_t* codes, const int64_t* starts,
           const int64_t* members, Metric metric, int64_t self, int64_t* first, double* precision, int threads, Isa isa,
           KeepGoing keep_going) {
    const TopkKernels& kernel = kernels(isa);
    Control control(keep_going);
    const int64_t d = gallery.d, n = gallery.n, panels = (n + kPanel - 1) / kPanel, padded = panels * kPanel;
    // Costs of a block: at most 64 MB a worker, and enough blocks for every worker.
    int64_t block = std::max<int64_t>(1, std::min<int64_t>(192, (int64_t{16} << 20) / padded));
    block = std::max<int64_t>(1, std::min(block, queries.n / (2 * threads)));
    block = block < kExactQueries ? block : block / kExactQueries * kExactQueries;
    const int64_t blocks = (queries.n + block - 1) / block;
    const int64_t groups = (block + kExactQueries - 1) / kExactQueries;
    struct Worker {
        std::vector<float> costs;
        std::vector<double> values;
        RankScratch scratch;
    };
    std::vector<Worker> workers(static_cast<size_t>(std::max(1, threads)));
    control.expect(blocks);
    return control.tasks(threads, blocks, [&](int64_t b, int worker) {
        Worker& w = workers[static_cast<size_t>(worker)];
        const int64_t start = b * block, some = std::min(block, queries.n - start);
        w.costs.resize(static_cast<size_t>(groups * kExactQueries * padded));
        w.values.assign(static_cast<size_t>(groups * kExactQueries * d), 0);
        std::vector<double> q_norms(static_cast<size_t>(groups * kExactQueries), 0);
        std::vector<float> scratch(static_cast<size_t>(d));
        for (int64_t q = 0; q < some; ++q) {
            const float* x = queries.row(start + q, scratch.data());
            double* values = w.values.data() + (q / kExactQueries) * kExactQueries * d + q % kExactQueries;
            for (int64_t j = 0; j < d; ++j) values[j * kExactQueries] = x[j];
            q_norms[static_cast<size_t>(q)] = norm_of(x, d);
        }
        Panel panel(gallery, kernel);
        double sums[kExactQueries * kPanel], norms[kPanel] = {};
        for (int64_t p = 0; p < panels; ++p) {
            if ((p & 63) == 0 && !control.go(worker)) return;
            panel.load(std::min<int64_t>(kPanel, n - p * kPanel), [&](int64_t r) { return p * kPanel + r; });
            for (int64_t g = 0; g * kExactQueries < some; ++g) {
                kernel.exact(panel.data(), d, w.values.data() + g * kExactQueries * d, metric != Metric::l2, sums,
                             metric == Metric::cosine ? norms : nullptr);
                for (int64_t j = 0; j < kExactQueries; ++j) {
                    float* out = w.costs.data() + (g * kExactQueries + j) * padded + p * kPanel;
                    const double* in = sums + j * kPanel;
                    const double q_norm = q_norms[static_cast<size_t>(g * kExactQueries + j)];
                    if (metric == Metric::l2) {
                        for (int r = 0; r < kPanel; ++r) out[r] = static_cast<float>(in[r]);
                    } else if (metric == Metric::ip) {
                        for (int r = 0; r < kPanel; ++r) out[r] = -static_cast<float>(in[r]) + 0.0f;
                    } else {
                        for (int r = 0; r < kPanel; ++r)
                            out[r] = cost_of(score_of(in[r], q_norm, norms[r], metric), metric);
                    }
                }
            }
        }
        for (int64_t q = 0; q < some; ++q) {
            if ((q & 7) == 0 && !control.go(worker)) return;
            float* costs = w.costs.data() + q * padded;
            const int64_t own = self < 0 ? -1 : self + start + q;
            if (own >= 0) costs[own] = kInfinityF;
            const int64_t code = codes[start + q];
            query_ranks(costs, n, members + starts[code], starts[code + 1] - starts[code], own, kernel, w.scratch,
                        first + start + q, precision + start + q);
        }
        control.did(1);
    });
}

}  // namespace fct::cpu
