#include "cpu/topk.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "cpu/convert.h"
#include "cpu/topk_kernels.h"

namespace fct::cpu {
namespace {

constexpr double kSlack = 1.0 / (1 << 19);  // 32 float32 roundings: more than any score goes through
constexpr double kTiny = 1e-43;             // of a product below float32's normal numbers
constexpr double kLargest = 1e12;           // norms beyond, or scales below its inverse, are not scanned in 8 bits
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kInfinityF = std::numeric_limits<float>::infinity();
constexpr int64_t kBlockQueries = 192;
// Guessed thresholds (ScanBlock::scan) are for blocks of many queries, which are bound by arithmetic, not by memory.
constexpr int64_t kGuessQueries = 24;
constexpr int64_t kGuessTiles = 64;
// For progress, which counts tiles times queries: about how many rows are scanned while one is scored in float64.
constexpr int64_t kExactCost = 24;

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

// Shared by the workers of one call: whether to stop, and how much is done. Worker 0, on the calling thread, asks and
// tells every 100 ms.
class Control {
  public:
    explicit Control(KeepGoing keep_going) : keep_going_(keep_going), last_(Clock::now()) {}

    bool go(int worker) {
        if (worker == 0 && keep_going_.ask && Clock::now() - last_ > std::chrono::milliseconds(100)) {
            if (!keep_going_.ask(keep_going_.context, share())) stop_.store(true);
            last_ = Clock::now();
        }
        return !stop_.load(std::memory_order_relaxed);
    }

    // Work that was found, and work that was done, in any unit that does not change within a call.
    void expect(int64_t units) { expected_.fetch_add(units, std::memory_order_relaxed); }
    void did(int64_t units) { did_.fetch_add(units, std::memory_order_relaxed); }

    // fn(task, worker) for every task in [0, count); false when stopped.
    template <class Fn>
    bool tasks(int threads, int64_t count, Fn&& fn) {
        std::atomic<int64_t> next{0}, done{0};
        threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
        parallel(threads, Join::as_awake, [&](int worker) {
            for (int64_t task; go(worker) && (task = next.fetch_add(1)) < count;) {
                fn(task, worker);
                done.fetch_add(1);
            }
            if (worker != 0) return;
            // Stays to ask while the others finish: awake at first, since a single query takes less than a sleep does.
            const auto ready = [&] { return done.load() == count; };
            if (spin_until(ready, kAwake)) return;
            while (go(0) && !ready()) std::this_thread::sleep_for(std::chrono::microseconds(50));
        });
        return !stop_.load();
    }

  private:
    double share() const {
        const auto expected = static_cast<double>(expected_.load());
        return expected > 0 ? std::min(1.0, static_cast<double>(did_.load()) / expected) : 0.0;
    }

    using Clock = std::chrono::steady_clock;
    KeepGoing keep_going_;
    Clock::time_point last_;
    std::atomic<bool> stop_{false};
    std::atomic<int64_t> expected_{0}, did_{0};
};

// What an int32 sum of the scan holds besides a query's init and its products with unsigned bytes.
double room_beside(int64_t d) { return 2147483000 - 383.0 * 127 * static_cast<double>((d + 3) / 4 * 4); }

float round_up(double x) {
    const float y = static_cast<float>(x * (1 + 1e-9));
    return static_cast<double>(y) < x ? std::nextafterf(y, kInfinityF) : y;
}

// The vector that is scanned for a row: shifted for l2 and ip, divided by its norm (then shifted) for cosine.
void to_scanned(const float* x, int64_t d, Metric metric, const float* shift, double* v) {
    double divide = 1;
    if (metric == Metric::cosine) {
        double sum = 0;
        for (int64_t j = 0; j < d; ++j) sum += static_cast<double>(x[j]) * x[j];
        divide = sum > 0 ? std::sqrt(sum) : 1;
    }
    if (shift) {
        for (int64_t j = 0; j < d; ++j) v[j] = x[j] / divide - shift[j];
    } else {
        for (int64_t j = 0; j < d; ++j) v[j] = x[j] / divide;
    }
}

struct Quantised {
    float scale;
    double error, norm, length, largest;  // |v - v'|, |v'|, |v|, and the largest |v_j|
};

double largest_of(const double* v, int64_t d) {
    double largest = 0;
    for (int64_t j = 0; j < d; ++j) largest = std::max(largest, std::fabs(v[j]));
    return largest;
}

// `least`: of the scale.
Quantised quantise(const double* v, int64_t d, float least, int8_t* out, const TopkKernels& kernel) {
    double sum = 0;
    for (int64_t j = 0; j < d; ++j) sum += v[j] * v[j];
    const double largest = largest_of(v, d);
    Quantised q{std::max(least, static_cast<float>(largest / 127)), 0, 0, std::sqrt(sum), largest};
    double error, norm;
    kernel.quantise(v, d, q.scale, out, &error, &norm);
    q.error = std::sqrt(error);
    q.norm = std::sqrt(norm);
    return q;
}

struct Candidate {
    int64_t id;
    float low, high;  // of the key
};

// Not above key - margin, not below key + margin; float32's rounding is 2^-24, or below float32's least normal number.
Candidate candidate(int64_t id, double key, double margin) {
    constexpr double kLeast = std::numeric_limits<float>::min();
    const double wider = margin + (std::fabs(key) + margin) * 0x1p-22 + kLeast;
    return {id, static_cast<float>(key - wider), static_cast<float>(key + wider)};
}

struct Found {
    float cost;
    int64_t id;
    bool operator<(const Found& other) const { return cost != other.cost ? cost < other.cost : id < other.id; }
};

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

// Candidates of one query within one part of the gallery.
struct Candidates {
    std::vector<Candidate> rows;  // of those seen, every one whose key may reach `tau`
    double tau = -kInfinity;      // what a row has to reach: proven by k rows' keys, or guessed (see ScanBlock)
    std::vector<float> costs;     // scratch of shrink
    size_t room = 0;
    bool exhausted = false;

    // Raises tau to what the lower bounds of `rank` rows reach and drops what cannot. rank = k is a proof.
    void shrink(int64_t rank, const TopkKernels& kernel) {
        const auto n = static_cast<int64_t>(rows.size());
        if (n >= rank) {
            costs.resize(rows.size());
            for (size_t i = 0; i < rows.size(); ++i) costs[i] = -rows[i].low;
            tau = std::max<double>(tau, -limit_of(costs.data(), n, rank, kernel));
        }
        size_t kept = 0;
        for (const Candidate& c : rows) {  // without a branch, since about every other one goes
            rows[kept] = c;
            kept += !(c.high < tau);
        }
        rows.resize(kept);
    }

    bool proven(int64_t k) const {
        return std::count_if(rows.begin(), rows.end(), [&](const Candidate& c) { return c.low >= tau; }) >= k;
    }
};

float score_of(double sum, double q_norm, double x_sum, Metric metric) {
    if (metric != Metric::cosine) return static_cast<float>(sum);
    const double norms = q_norm * std::sqrt(x_sum);
    return norms > 0 ? static_cast<float>(sum / norms) : 0.0f;
}

// The smallest cost is best; + 0 so that there is one zero.
float cost_of(float score, Metric metric) { return metric == Metric::l2 ? score : -score + 0.0f; }

double norm_of(const float* x, int64_t d) {
    double sum = 0;
    for (int64_t j = 0; j < d; ++j) sum += static_cast<double>(x[j]) * x[j];
    return std::sqrt(sum);
}

// Sixteen gallery rows at a time, as a panel.
class Panel {
  public:
    Panel(const RowSource& gallery, const TopkKernels& kernel)
        : gallery_(gallery), kernel_(kernel), values_(static_cast<size_t>(gallery.d * kPanel) + kLine) {
        void* start = values_.data();
        size_t room = values_.size() * sizeof(double);
        panel_ = static_cast<double*>(std::align(kLine * sizeof(double), sizeof(double), start, room));
        if (!gallery.in_place()) scratch_.resize(static_cast<size_t>(gallery.d * kPanel));
    }

    template <class Id>
    void load(int64_t count, Id&& id) {
        const float* rows[kPanel];
        for (int r = 0; r < kPanel; ++r) {
            if (r < count) {
                rows[r] = gallery_.row(id(r), scratch_.empty() ? nullptr : scratch_.data() + r * gallery_.d);
            } else {
                rows[r] = rows[r - 1];
            }
        }
        kernel_.pack(rows, gallery_.d, panel_);
    }

    Panel(const Panel&) = delete;

    const double* data() const { return panel_; }

  private:
    static constexpr size_t kLine = 8;  // float64 in a cache line
    const RowSource& gallery_;
    const TopkKernels& kernel_;
    std::vector<double> values_;
    double* panel_;
    std::vector<float> scratch_;
};

struct Search {
    const RowSource& queries;
    const RowSource& gallery;
    const Shadow& shadow;
    Metric metric;
    int64_t k, self;
    int threads;
    const TopkKernels& kernel;
    Control& control;

    int64_t self_of(int64_t q) const { return self < 0 ? -1 : self + q; }
};

// ---- the scan of the shadow ----

// One block of queries, quantised and laid out for the scan.
class ScanBlock {
  public:
    ScanBlock(const Search& s, std::vector<int64_t> queries)
        : queries_(std::move(queries)), count_(static_cast<int64_t>(queries_.size())) {
        const int64_t count = count_;
        const int64_t d = s.gallery.d, steps = (d + 3) / 4;
        steps_ = steps;
        for (int64_t at = 0; at < count;) {
            const int64_t left = count - at;
            const int group = left >= 4 ? (left == 4 ? 4 : 6) : left == 3 ? 4 : static_cast<int>(left);
            groups_.push_back({at, group});
            at += group;
        }
        const auto padded = static_cast<size_t>(groups_.back().first + groups_.back().second);
        words_.assign(padded * static_cast<size_t>(steps), 0);
        init_.assign(padded, 0);
        for (auto* part : {&inverse_, &base_, &per_error_, &per_norm_, &per_half_}) part->assign(padded, 0);
        for (auto* part : {&threshold_, &limit_, &limit_inverse_}) part->assign(padded, 0);
        facts_.resize(padded);
        std::vector<double> v(static_cast<size_t>(d));
        std::vector<float> scratch(static_cast<size_t>(d));
        std::vector<int8_t> bytes(static_cast<size_t>(4 * steps));
        const double shift = s.metric == Metric::l2 ? 0 : norm_of(s.shadow.shift, d);
        for (const auto& [start, group] : groups_) {
            int32_t* words = words_.data() + start * steps;
            for (int j = 0; j < group; ++j) {
                const auto i = static_cast<size_t>(start + j);
                facts_[i].usable = false;
                base_[i] = kInfinityF;  // padding never hits
                if (start + j >= count) continue;
                to_scanned(s.queries.row(queries_[i], scratch.data()), d, s.metric,
                           s.metric == Metric::l2 ? s.shadow.shift : nullptr, v.data());
                std::fill(bytes.begin(), bytes.end(), int8_t{0});
                const Quantised q = quantise(v.data(), d, 0, bytes.data(), s.kernel);
                Facts& f = facts_[i];
                f.scale = q.scale;
                f.length = q.length * (1 + 1e-9);
                f.error = q.error * (1 + 1e-9);
                f.constant = s.metric == Metric::l2 ? f.length * f.length / 2 : f.length * shift;
                f.usable = q.scale >= 1 / kLargest && q.length <= kLargest && f.constant <= kLargest * kLargest;
                if (!f.usable) continue;
                const double inverse = 1.0 / f.scale;
                inverse_[i] = static_cast<float>(inverse);
                per_error_[i] = static_cast<float>((f.length + kSlack * f.length) * inverse * (1 + kSlack));
                per_norm_[i] = static_cast<float>((f.error + kSlack * f.length) * inverse * (1 + kSlack));
                per_half_[i] = static_cast<float>(kSlack * inverse * (1 + kSlack));
                set_base(static_cast<int64_t>(i), -kInfinity);
                int32_t sum = 0;
                for (int8_t b : bytes) sum += b;
                init_[i] = -128 * sum;
                for (int64_t step = 0; step < steps; ++step)
                    std::memcpy(words + step * group + j, bytes.data() + 4 * step, 4);
            }
        }
    }

    bool usable(int64_t q) const { return facts_[static_cast<size_t>(q)].usable; }

    // Tiles [from, to); candidates of query q into found[q]. Returns the places of the queries whose guess failed.
    //
    // A threshold proven by k rows of the tiles seen so far is low at first, and every row above it costs: k log(n / k)
    // rows come and go before the last k stand. With `guess`, tiles are visited in a scattered order, so that those
    // seen are a sample of all, and the threshold is the key of a rank in the sample that the k-th best row of all
    // will, very probably, not be below: after a share t of the tiles the k t-th and 4.5 standard deviations more. At
    // the end k rows must reach it, which proves it; where they do not (rows in the order of their clusters are no
    // fair sample), the query has to be scanned again without a guess.
    std::vector<int64_t> scan(const Search& s, int64_t from, int64_t to, bool guess, Candidates* found, int worker) {
        const size_t room = static_cast<size_t>(2 * s.k + 64);
        const size_t most = static_cast<size_t>(std::max<int64_t>(4 * s.k + 2048, s.gallery.n / 32));
        for (int64_t q = 0; q < count_; ++q) {
            found[q].room = room;
            if (usable(q)) set_base(q, found[q].tau);
        }
        uint64_t masks[kScanQueries];
        alignas(64) float keys[kScanQueries * kTile];
        const ScanQueries queries{words_.data(),     init_.data(),         inverse_.data(),  base_.data(),
                                  per_error_.data(), per_norm_.data(),     per_half_.data(), threshold_.data(),
                                  limit_.data(),     limit_inverse_.data()};
        const auto largest = static_cast<float>(room_beside(s.gallery.d));
        ScanTile tile;
        const int64_t padded = static_cast<int64_t>(base_.size());
        const int64_t tile_bytes = steps_ * 4 * kTile, tiles = to - from;
        const int64_t parts = static_cast<int64_t>(groups_.size());
        const int64_t share = parts < 8 ? 0 : (tile_bytes / 64 + parts - 1) / parts * 64;  // few: memory is the bound
        const int64_t stride = guess ? scattered(tiles) : 1;
        for (int64_t seen = 0, t = 0; seen < tiles; ++seen) {
            if ((seen & 63) == 0) {
                s.control.did(count_ * std::min<int64_t>(seen, 64));
                if (!s.control.go(worker)) return {};
            }
            const double sampled =
                static_cast<double>(s.k) * static_cast<double>(seen + 1) / static_cast<double>(tiles);
            rank_ = guess ? std::min(s.k, static_cast<int64_t>(sampled + 4.5 * std::sqrt(sampled)) + 4) : s.k;
            const float* meta = s.shadow.meta + (from + t) * kMeta;
            s.kernel.open_tile(s.shadow.tiles + (from + t) * tile_bytes, meta, &tile);
            s.kernel.aim(tile, queries, padded, largest);
            // The next tile comes to L2 while this one is at work, a few lines with each group of queries.
            const int64_t next = t + stride < tiles ? t + stride : t + stride - tiles;
            const uint8_t* ahead = s.shadow.tiles + (from + next) * tile_bytes;
            const uint8_t* const end = seen + 1 < tiles ? ahead + tile_bytes : ahead;
            if (share > 0)
                for (int64_t at = 0; at < kMeta; at += 16)
                    __builtin_prefetch(s.shadow.meta + (from + next) * kMeta + at);
            for (const auto& [start, group] : groups_) {
                for (const uint8_t* stop = std::min(ahead + share, end); ahead < stop; ahead += 64)
                    __builtin_prefetch(ahead, 0, 2);
                if (__builtin_expect(!s.kernel.scan(tile, steps_, queries, start, group, masks, keys), 1)) continue;
                for (int j = 0; j < group; ++j)
                    if (masks[j] != 0)
                        push(s, start + j, from + t, meta, masks[j], keys + j * kTile, found[start + j], most);
            }
            t = next;
        }
        s.control.did(tiles > 0 ? count_ * ((tiles - 1) % 64 + 1) : 0);
        std::vector<int64_t> failed;
        for (int64_t q = 0; guess && q < count_; ++q)
            if (usable(q) && !found[q].exhausted && !found[q].proven(s.k)) failed.push_back(q);
        return failed;
    }

  private:
    struct Facts {
        double scale, length, error, constant;
        bool usable;
    };

    // A step that visits every one of n places and leaves the visited ones evenly spread: near n / golden ratio.
    static int64_t scattered(int64_t n) {
        int64_t step = std::max<int64_t>(1, static_cast<int64_t>(0.6180339887498949 * static_cast<double>(n)));
        while (std::gcd(step, n) != 1) ++step;
        return step;
    }

    // The scan's threshold before a tile's own margins, in units of the query's scale, lowered past its rounding.
    void set_base(int64_t q, double tau) {
        const Facts& f = facts_[static_cast<size_t>(q)];
        const double base = (tau - kSlack * f.constant) / f.scale;
        base_[static_cast<size_t>(q)] = tau == -kInfinity
                                            ? -std::numeric_limits<float>::max()
                                            : static_cast<float>(base - std::fabs(base) * kSlack - 2 * kTiny);
    }

    void push(const Search& s, int64_t q, int64_t t, const float* meta, uint64_t mask, const float* keys,
              Candidates& found, size_t most) {
        const Facts& f = facts_[static_cast<size_t>(q)];
        const int64_t own = s.self_of(queries_[static_cast<size_t>(q)]);
        for (; mask; mask &= mask - 1) {
            const int r = __builtin_ctzll(mask);
            const int64_t id = t * kTile + r;
            if (id >= s.gallery.n || id == own) continue;
            const double half = meta[kTile + r], error = meta[2 * kTile + r], norm = meta[3 * kTile + r];
            const double key = static_cast<double>(keys[r]) * f.scale;
            const double margin = f.length * error + f.error * norm +
                                  kSlack * (f.constant + half + f.length * (norm + error)) + f.scale * kTiny;
            if (key + margin < found.tau) continue;
            found.rows.push_back(candidate(id, key, margin));
            if (found.rows.size() < found.room) continue;
            found.shrink(rank_, s.kernel);
            // Often enough that the threshold is fresh, since a needless candidate costs more than its share of a pass.
            found.room = found.rows.size() + found.rows.size() / 2 + 32;
            if (found.rows.size() > most) {
                found.exhausted = true;
                found.rows.clear();
                base_[static_cast<size_t>(q)] = kInfinityF;  // this query will go through every row
                return;
            }
            set_base(q, found.tau);
        }
    }

    std::vector<int64_t> queries_;
    int64_t count_, steps_, rank_ = 0;
    std::vector<std::pair<int64_t, int>> groups_;
    std::vector<int32_t> words_, init_;
    std::vector<float> inverse_, base_, per_error_, per_norm_, per_half_, threshold_, limit_, limit_inverse_;
    std::vector<Facts> facts_;
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

// Scores the candidates of query q in float64 and writes the k best. `rows` begins with (nearly) the k largest lower
// bounds: once these are scored, the k-th best score is known more closely than by any bound, and many of the others
// need not be.
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
        double away = 0, size_of_away = 0;
        for (int64_t j = 0; j < d; ++j) {
            const double shift = s.shadow.shift[j], y = values[static_cast<size_t>(j)];
            const double term = s.metric == Metric::l2 ? (y - shift) * (y - shift) : y * shift;
            away += term;
            size_of_away += std::fabs(term);
        }
        const double divide = s.metric == Metric::cosine && q_norm > 0 ? q_norm : 1;
        const double bar =
            key_of(found[static_cast<size_t>(s.k - 1)].cost, away / divide, size_of_away / divide, s.metric);
        rows.erase(std::remove_if(rows.begin() + head, rows.end(), [&](const Candidate& c) { return c.high < bar; }),
                   rows.end());
    }
    score(head, static_cast<int64_t>(rows.size()));
    write_answer(found, s.k, s.metric, distances, indices);
}

// ---- every row, in float64 ----

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

// ---- ranks ----

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

void shadow_pack(const RowSource& gallery, Metric metric, int64_t first, int64_t count, const float* shift,
                 uint8_t* tiles, float* meta, int threads, Isa isa) {
    const TopkKernels& kernel = kernels(isa);
    const int64_t d = gallery.d, steps = (d + 3) / 4, total = (count + kTile - 1) / kTile;
    constexpr int64_t kSome = 64;
    Control control{KeepGoing{}};
    control.tasks(threads, (total + kSome - 1) / kSome, [&](int64_t task, int) {
        std::vector<float> scratch(static_cast<size_t>(d));
        std::vector<double> v(static_cast<size_t>(d));
        std::vector<int8_t> bytes(static_cast<size_t>(4 * steps), 0);
        for (int64_t t = task * kSome; t < std::min(total, (task + 1) * kSome); ++t) {
            float* facts = meta + t * kMeta;
            uint8_t* tile = tiles + t * steps * 4 * kTile;
            std::fill(facts, facts + kMeta, 0.0f);
            // A row of next to nothing beside the others is as well off with a coarser scale, see ScanQueries::limit.
            double largest = 0;
            for (int64_t row = t * kTile; row < std::min(count, (t + 1) * kTile); ++row) {
                to_scanned(gallery.row(first + row, scratch.data()), d, metric, shift, v.data());
                largest = std::max(largest, largest_of(v.data(), d));
            }
            const auto least =
                static_cast<float>(largest / 127 * (127.0 * 127 * static_cast<double>(d)) / room_beside(d));
            for (int64_t r = 0; r < kTile; ++r) {
                const int64_t row = t * kTile + r;
                if (row < count) {
                    to_scanned(gallery.row(first + row, scratch.data()), d, metric, shift, v.data());
                    const Quantised q = quantise(v.data(), d, least, bytes.data(), kernel);
                    facts[r] = q.scale;
                    facts[kTile + r] = metric == Metric::l2 ? static_cast<float>(q.length * q.length / 2) : 0.0f;
                    facts[2 * kTile + r] = round_up(q.error);
                    facts[3 * kTile + r] = round_up(q.norm);
                    for (int j = 0; j < 3; ++j) {
                        const float value = facts[(j == 2 ? 1 : j + 2) * kTile + r];
                        facts[4 * kTile + j] = std::max(facts[4 * kTile + j], value);
                    }
                } else {
                    std::fill(bytes.begin(), bytes.end(), int8_t{0});
                }
                for (int64_t step = 0; step < steps; ++step) {
                    uint32_t word;
                    std::memcpy(&word, bytes.data() + 4 * step, 4);
                    word ^= 0x80808080u;  // + 128
                    std::memcpy(tile + (step * kTile + r) * 4, &word, 4);
                }
            }
        }
    });
}

bool topk(const RowSource& queries, const RowSource& gallery, const Shadow& shadow, Metric metric, int64_t k,
          int64_t self, float* distances, int64_t* indices, int threads, Isa isa, KeepGoing keep_going,
          SearchCounts* counts) {
    Control control(keep_going);
    const Search s{queries, gallery, shadow, metric, k, self, threads, kernels(isa), control};
    std::vector<int64_t> all;
    if (!shadow.tiles) {
        for (int64_t q = 0; q < queries.n; ++q) all.push_back(q);
        return search_all(s, all, distances, indices);
    }
    const int64_t tiles = (gallery.n + kTile - 1) / kTile;
    // Blocks fill the caches and, where there are enough queries, come out even over the threads.
    const int64_t rounds = (queries.n + kBlockQueries * threads - 1) / (kBlockQueries * threads);
    int64_t block = (queries.n + rounds * threads - 1) / (rounds * threads);
    block =
        std::min<int64_t>(queries.n, std::max<int64_t>(12, (block + kScanQueries - 1) / kScanQueries * kScanQueries));
    const int64_t blocks = (queries.n + block - 1) / block;
    const int64_t splits = std::max<int64_t>(1, blocks >= threads ? 1 : std::min<int64_t>(tiles / 32, 2 * threads));
    std::vector<Candidates> found(static_cast<size_t>(blocks * splits * block));
    std::vector<uint8_t> through_all(static_cast<size_t>(queries.n), 0);
    const int64_t rescoring = k * 4 * kExactCost / kTile;  // of a query: a guess of what the scan will leave
    control.expect(queries.n * (tiles + rescoring));
    std::atomic<bool> guess{block >= kGuessQueries && tiles / splits >= kGuessTiles};
    bool finished = control.tasks(threads, blocks * splits, [&](int64_t task, int worker) {
        const int64_t b = task / splits, part = task % splits;
        const int64_t first = b * block, count = std::min(block, queries.n - first);
        const int64_t from = tiles * part / splits, to = tiles * (part + 1) / splits;
        std::vector<int64_t> ids(static_cast<size_t>(count));
        std::iota(ids.begin(), ids.end(), first);
        Candidates* const lists = found.data() + task * block;
        ScanBlock scan(s, ids);
        const std::vector<int64_t> failed = scan.scan(s, from, to, guess.load(), lists, worker);
        if (!failed.empty()) {
            if (static_cast<int64_t>(failed.size()) * 50 > count) guess.store(false);  // no gallery to guess about
            control.expect(static_cast<int64_t>(failed.size()) * (to - from));
            std::vector<Candidates> again(failed.size());
            std::vector<int64_t> wanted;
            for (int64_t q : failed) wanted.push_back(first + q);
            ScanBlock(s, wanted).scan(s, from, to, false, again.data(), worker);
            for (size_t i = 0; i < failed.size(); ++i) lists[failed[i]] = std::move(again[i]);
        }
        if (part == 0)
            for (int64_t q = 0; q < count; ++q) through_all[static_cast<size_t>(first + q)] = !scan.usable(q);
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
    if (counts) *counts = {rescored.load(), static_cast<int64_t>(all.size())};
    return all.empty() || search_all(s, all, distances, indices);
}

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
