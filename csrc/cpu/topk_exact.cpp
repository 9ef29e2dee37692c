#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/topk_panel.h"
#include "cpu/topk_search.h"

namespace fct::cpu {

namespace {

// Ties: the lower row comes first.
struct Found {
    float cost;
    int64_t id;
    bool operator<(const Found& other) const { return cost != other.cost ? cost < other.cost : id < other.id; }
};

void write_answer(std::vector<Found>& found, int64_t k, Metric metric, float* distances, int64_t* indices) {
    if (static_cast<int64_t>(found.size()) > k) std::nth_element(found.begin(), found.begin() + (k - 1), found.end());
    std::sort(found.begin(), found.begin() + k);
    for (int64_t j = 0; j < k; ++j) {
        const float cost = found[static_cast<size_t>(j)].cost;
        distances[j] = metric == Metric::l2 ? cost : -cost + 0.0f;
        indices[j] = found[static_cast<size_t>(j)].id;
    }
}

// What to compare the `high` of query q's candidates with: a key that every row of a cost up to `cost` reaches, with
// `away` (its l2 distance from the shift squared, or its product with it) summed in float64.
double key_of(float cost, double away, double slop, Metric metric) {
    const double key = metric == Metric::l2 ? (away - cost) / 2 : -static_cast<double>(cost) - away;
    return key - std::ldexp(slop + std::fabs(key), -40);
}

// key_of for a query's k-th best cost.
double bar_of(const Search& s, const std::vector<double>& query, double q_norm, float cost) {
    double away = 0, size_of_away = 0;
    for (int64_t j = 0; j < s.gallery.d; ++j) {
        const double shift = s.shadow.shift[j], y = query[static_cast<size_t>(j)];
        const double term = s.metric == Metric::l2 ? (y - shift) * (y - shift) : y * shift;
        away += term;
        size_of_away += std::fabs(term);
    }
    const double divide = s.metric == Metric::cosine && q_norm > 0 ? q_norm : 1;
    return key_of(cost, away / divide, size_of_away / divide, s.metric);
}

}  // namespace

void rescore(const Search& s, int64_t q, std::vector<Candidate>& rows, float* distances, int64_t* indices) {
    const int64_t d = s.gallery.d;
    std::vector<float> scratch(static_cast<size_t>(d));
    const float* x = s.queries.row(q, scratch.data());
    const std::vector<double> values(x, x + d);
    const double q_norm = norm_of(x, d);
    Panel panel(s.gallery, s.kernel);
    std::vector<Found> found;
    found.reserve(rows.size());
    const int64_t size = s.gallery.dtype == DType::f32 ? 4 : s.gallery.dtype == DType::i8 ? 1 : 2;
    const auto fetch = [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            const char* row = static_cast<const char*>(s.gallery.data) +
                              rows[static_cast<size_t>(i)].id * s.gallery.row_stride * size;
            for (int64_t byte = 0; byte < std::min<int64_t>(d * size, 4096); byte += 64) __builtin_prefetch(row + byte);
        }
    };
    const auto score = [&](int64_t from, int64_t to) {
        double sums[kPanel], norms[kPanel] = {};
        for (int64_t start = from; start < to; start += kPanel) {
            fetch(std::min(to, start + kPanel), std::min(to, start + 2 * kPanel));
            const int64_t some = std::min<int64_t>(kPanel, to - start);
            panel.load(some, [&](int64_t r) { return rows[static_cast<size_t>(start + r)].id; });
            s.kernel.exact_one(panel.data(), d, values.data(), s.metric != Metric::l2, sums,
                               s.metric == Metric::cosine ? norms : nullptr);
            for (int64_t r = 0; r < some; ++r)
                found.push_back({cost_of(score_of(sums[r], q_norm, norms[r], s.metric), s.metric),
                                 rows[static_cast<size_t>(start + r)].id});
        }
    };
    const auto count = static_cast<int64_t>(rows.size());
    const int64_t head = std::min(count, (s.k + kPanel - 1) / kPanel * kPanel);
    score(0, head);
    if (count > head + kPanel) {
        std::nth_element(found.begin(), found.begin() + (s.k - 1), found.end());
        const double bar = bar_of(s, values, q_norm, found[static_cast<size_t>(s.k - 1)].cost);
        rows.erase(std::remove_if(rows.begin() + head, rows.end(), [&](const Candidate& c) { return c.high < bar; }),
                   rows.end());
    }
    score(head, static_cast<int64_t>(rows.size()));
    write_answer(found, s.k, s.metric, distances, indices);
}

double exact_bar(const Search& s, int64_t q, const std::vector<int64_t>& ids) {
    const int64_t d = s.gallery.d, count = static_cast<int64_t>(ids.size());
    if (count < s.k) return -kInfinity;
    std::vector<float> scratch(static_cast<size_t>(d)), costs;
    const float* x = s.queries.row(q, scratch.data());
    const std::vector<double> values(x, x + d);
    const double q_norm = norm_of(x, d);
    Panel panel(s.gallery, s.kernel);
    double sums[kPanel], norms[kPanel] = {};
    for (int64_t start = 0; start < count; start += kPanel) {
        const int64_t some = std::min<int64_t>(kPanel, count - start);
        panel.load(some, [&](int64_t r) { return ids[static_cast<size_t>(start + r)]; });
        s.kernel.exact_one(panel.data(), d, values.data(), s.metric != Metric::l2, sums,
                           s.metric == Metric::cosine ? norms : nullptr);
        for (int64_t r = 0; r < some; ++r)
            costs.push_back(cost_of(score_of(sums[r], q_norm, norms[r], s.metric), s.metric));
    }
    std::nth_element(costs.begin(), costs.begin() + (s.k - 1), costs.end());
    return bar_of(s, values, q_norm, costs[static_cast<size_t>(s.k - 1)]);
}

bool search_all(const Search& s, const std::vector<int64_t>& wanted, float* distances, int64_t* indices) {
    const int64_t d = s.gallery.d, n = s.gallery.n, panels = (n + kPanel - 1) / kPanel;
    const int64_t groups = (static_cast<int64_t>(wanted.size()) + kExactQueries - 1) / kExactQueries;
    const int64_t splits =
        std::max<int64_t>(1, std::min<int64_t>(panels / 64, groups >= 2 * s.threads ? 1 : 2 * s.threads));
    std::vector<std::vector<Found>> lists(wanted.size() * static_cast<size_t>(splits));
    constexpr int64_t kPanelsATile = kTile / kPanel;
    s.control.expect(static_cast<int64_t>(wanted.size()) * panels * kExactCost / kPanelsATile);
    const bool finished = s.control.tasks(s.threads, groups * splits, [&](int64_t task, int worker) {
        const int64_t g = task / splits, part = task % splits;
        const int64_t from = panels * part / splits, to = panels * (part + 1) / splits;
        const int64_t first = g * kExactQueries;
        const int64_t some = std::min<int64_t>(kExactQueries, static_cast<int64_t>(wanted.size()) - first);
        const int64_t lanes = some == 1 ? 1 : kExactQueries;
        std::vector<double> values(static_cast<size_t>(d * lanes));
        std::vector<float> scratch(static_cast<size_t>(d));
        double q_norms[kExactQueries] = {};
        float worst[kExactQueries];
        for (int64_t j = 0; j < some; ++j) {
            const float* x = s.queries.row(wanted[static_cast<size_t>(first + j)], scratch.data());
            for (int64_t i = 0; i < d; ++i) values[static_cast<size_t>(i * lanes + j)] = x[i];
            q_norms[j] = norm_of(x, d);
            worst[j] = kInfinityF;
        }
        const auto room = static_cast<size_t>(2 * s.k + 256);
        bool full[kExactQueries] = {};
        Panel panel(s.gallery, s.kernel);
        double sums[kExactQueries * kPanel], norms[kPanel] = {};
        for (int64_t p = from; p < to; ++p) {
            if (p > from && (p - from) % 256 == 0) s.control.did(some * 256 * kExactCost / kPanelsATile);
            if ((p & 255) == 0 && !s.control.go(worker)) return;
            const int64_t rows = std::min<int64_t>(kPanel, n - p * kPanel);
            panel.load(rows, [&](int64_t r) { return p * kPanel + r; });
            (lanes == 1 ? s.kernel.exact_one : s.kernel.exact)(panel.data(), d, values.data(), s.metric != Metric::l2,
                                                               sums, s.metric == Metric::cosine ? norms : nullptr);
            for (int64_t j = 0; j < some; ++j) {
                std::vector<Found>& list = lists[static_cast<size_t>((first + j) * splits + part)];
                const int64_t own = s.self_of(wanted[static_cast<size_t>(first + j)]);
                for (int64_t r = 0; r < rows; ++r) {
                    const float cost =
                        cost_of(score_of(sums[j * kPanel + r], q_norms[j], norms[r], s.metric), s.metric);
                    // Rows come in order, so one that only ties with the k-th best so far has lost to it.
                    if ((full[j] && !(cost < worst[j])) || p * kPanel + r == own) continue;
                    list.push_back({cost, p * kPanel + r});
                    if (list.size() < room) continue;
                    std::nth_element(list.begin(), list.begin() + (s.k - 1), list.end());
                    list.resize(static_cast<size_t>(s.k));
                    worst[j] = list.back().cost;
                    full[j] = true;
                }
            }
        }
        if (to > from) s.control.did(some * ((to - from - 1) % 256 + 1) * kExactCost / kPanelsATile);
    });
    if (!finished) return false;
    for (size_t i = 0; i < wanted.size(); ++i) {
        std::vector<Found> found;
        for (int64_t part = 0; part < splits; ++part) {
            const auto& list = lists[i * static_cast<size_t>(splits) + static_cast<size_t>(part)];
            found.insert(found.end(), list.begin(), list.end());
        }
        write_answer(found, s.k, s.metric, distances + wanted[i] * s.k, indices + wanted[i] * s.k);
    }
    return true;
}

}  // namespace fct::cpu
