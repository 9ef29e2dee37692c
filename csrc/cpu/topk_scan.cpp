#include "cpu/topk_scan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "cpu/topk_quantise.h"

namespace fct::cpu {
namespace {

constexpr double kSlack = 1.0 / (1 << 19);  // 32 float32 roundings: more than any score goes through
constexpr double kTiny = 1e-43;             // of a product below float32's normal numbers
constexpr int64_t kWide = 48;               // queries, of which nearly every row's tail is wanted by one
constexpr int64_t kFew = 2;                 // queries, for which reading half of the shadow is the quicker way
constexpr int64_t kManyGroups = 5;          // of queries, for which halves are joined once
constexpr float kTrust = 0.3f;              // of an interval, above whose share a row's key is thought to lie
constexpr double kLargest = 1e12;           // norms beyond, or scales below its inverse, are not scanned in 8 bits

// A step that visits every one of n places and leaves the visited ones evenly spread: near n / golden ratio.
int64_t scattered(int64_t n) {
    int64_t step = std::max<int64_t>(1, static_cast<int64_t>(0.6180339887498949 * static_cast<double>(n)));
    while (std::gcd(step, n) != 1) ++step;
    return step;
}

}  // namespace

ScanBlock::ScanBlock(const Search& s, std::vector<int64_t> queries, bool whole)
    : queries_(std::move(queries)),
      count_(static_cast<int64_t>(queries_.size())),
      few_(s.shadow.low && !whole && count_ <= kFew) {
    lay_out(s);
    std::vector<double> v(static_cast<size_t>(s.gallery.d));
    for (const auto& [start, group] : groups_)
        for (int j = 0; j < group; ++j) {
            const auto i = static_cast<size_t>(start + j);
            base_[i] = kInfinityF;  // padding never hits
            if (start + j < count_) take(s, i, words_.data() + start * steps_, group, j, v.data());
        }
}

void ScanBlock::lay_out(const Search& s) {
    const Levels& levels = s.shadow.levels;
    steps_ = steps_of(levels.head > 0 ? levels.head : s.gallery.d, s.shadow.low != nullptr);
    for (int64_t at = 0; at < count_;) {
        const int64_t left = count_ - at;
        const int group = left >= 4 ? (left == 4 ? 4 : 6) : left == 3 ? 4 : static_cast<int>(left);
        groups_.push_back({at, group});
        at += group;
    }
    const auto padded = static_cast<size_t>(groups_.back().first + groups_.back().second);
    words_.assign(padded * static_cast<size_t>(steps_), 0);
    init_.assign(padded, 0);
    for (auto* part : {&inverse_, &base_, &per_error_, &per_norm_, &per_half_, &per_tail_}) part->assign(padded, 0);
    for (auto* part : {&threshold_, &limit_, &limit_inverse_}) part->assign(padded, 0);
    facts_.assign(padded, Facts{});
    if (levels.head > 0) {
        tail_stride_ = (s.gallery.d - levels.head + 63) / 64 * 64;
        tails_.assign(static_cast<size_t>(tail_stride_ * count_), 0);
    }
}

// Query i of the block, as number j of its group.
void ScanBlock::take(const Search& s, size_t i, int32_t* words, int group, int j, double* v) {
    const int64_t d = s.gallery.d;
    std::vector<float> scratch(static_cast<size_t>(d));
    std::vector<int8_t> bytes(static_cast<size_t>(4 * steps_), 0);
    to_scanned(s.queries.row(queries_[i], scratch.data()), d, s.metric,
               s.metric == Metric::l2 ? s.shadow.shift : nullptr, v);
    if (s.shadow.levels.head > 0) {
        take_levels(s, i, v, norm_of(v, d), bytes.data());
    } else {
        take_whole(s, i, v, bytes.data());
    }
    if (!facts_[i].usable) return;
    set_base(static_cast<int64_t>(i), -kInfinity);
    int32_t sum = 0;
    for (int8_t b : bytes) sum += b;
    init_[i] = -128 * sum;
    for (int64_t step = 0; step < steps_; ++step) std::memcpy(words + step * group + j, bytes.data() + 4 * step, 4);
}

void ScanBlock::take_whole(const Search& s, size_t i, const double* v, int8_t* bytes) {
    const Quantised q = quantise(v, s.gallery.d, 0, bytes, s.kernel);
    Facts& f = facts_[i];
    f.scale = q.scale;
    f.length = q.length * (1 + 1e-9);
    f.error = q.error * (1 + 1e-9);
    f.constant = s.metric == Metric::l2 ? f.length * f.length / 2 : f.length * s.shift_length;
    f.usable = q.scale >= 1 / kLargest && q.length <= kLargest && f.constant <= kLargest * kLargest;
    if (!f.usable) return;
    const double inverse = 1.0 / f.scale;
    inverse_[i] = static_cast<float>(inverse);
    per_error_[i] = static_cast<float>((f.length + kSlack * f.length) * inverse * (1 + kSlack));
    per_norm_[i] = static_cast<float>((f.error + kSlack * f.length) * inverse * (1 + kSlack));
    per_half_[i] = static_cast<float>(kSlack * inverse * (1 + kSlack));
}

// The same after the rotation, head and tail apart, each with a scale of its own. The head's is never so small that
// what the tail may add, in units of it, overflows.
void ScanBlock::take_levels(const Search& s, size_t i, const double* v, double length, int8_t* bytes) {
    const Levels& levels = s.shadow.levels;
    const int64_t d = s.gallery.d, head = levels.head;
    std::vector<double> y(static_cast<size_t>(d));
    rotate(levels, v, d, y.data(), s.kernel);
    int8_t* const tail_bytes = tails_.data() + static_cast<int64_t>(i) * tail_stride_;
    const Quantised first = quantise(y.data(), head, static_cast<float>(length * 0x1p-20), bytes, s.kernel);
    const Quantised rest = quantise(y.data() + head, d - head, 0, tail_bytes, s.kernel);
    const double lost = levels.loss * length + kLeastLoss;
    Facts& f = facts_[i];
    f.scale = first.scale;
    f.tail_scale = rest.scale;
    f.length = length * (1 + 1e-9);
    f.error = (std::sqrt(first.error * first.error + rest.error * rest.error) + lost) * (1 + 1e-9);
    f.constant = s.metric == Metric::l2 ? f.length * f.length / 2 : f.length * s.shift_length;
    f.usable = first.scale >= 1 / kLargest && length <= kLargest && f.constant <= kLargest * kLargest;
    if (!f.usable) return;
    for (int64_t j = 0; j < d - head; ++j) f.tail_init -= 128 * tail_bytes[j];
    f.by_error = f.length * (1 + kSlack);
    f.by_norm = f.error + kSlack * f.length;
    f.by_all = kSlack * f.constant + f.scale * kTiny;
    const double inverse = 1.0 / f.scale, wider = inverse * (1 + kSlack);
    inverse_[i] = static_cast<float>(inverse);
    per_error_[i] = static_cast<float>((first.length + lost + kSlack * f.length) * wider);
    per_norm_[i] = static_cast<float>((first.error + lost + kSlack * f.length) * wider);
    per_half_[i] = static_cast<float>(kSlack * wider);
    per_tail_[i] = static_cast<float>((rest.length + lost + kSlack * f.length) * wider);
}

std::vector<int64_t> ScanBlock::scan(const Search& s, int64_t from, int64_t to, bool guess, Candidates* found,
                                     int worker, Proven* best) {
    const Levels& levels = s.shadow.levels;
    const bool levelled = levels.head > 0;
    const size_t room = room_for(s, 0);
    most_ = static_cast<size_t>(std::max<int64_t>(4 * s.k + 2048, s.gallery.n / 32));
    for (int64_t q = 0; q < count_; ++q) {
        found[q].room = room;
        if (usable(q)) set_base(q, found[q].tau);
    }
    uint64_t masks[kScanQueries];
    alignas(64) float keys[kScanQueries * kTile];
    const ScanQueries queries{words_.data(),    init_.data(),      steps_,           inverse_.data(),
                              base_.data(),     per_error_.data(), per_norm_.data(), per_half_.data(),
                              per_tail_.data(), threshold_.data(), limit_.data(),    limit_inverse_.data()};
    const bool halves = s.shadow.low != nullptr;
    const bool few = few_;
    std::vector<int32_t> high_init;
    ScanQueries of_high = queries;
    if (few) {
        for (const int32_t init : init_) high_init.push_back(init / 128 * 120);  // their bytes stand for 8 more
        of_high.init = high_init.data();
        of_high.per_tail = per_error_.data();  // its own error a row, where whole bytes have their tile's largest
    }
    std::vector<uint8_t> joined(halves ? static_cast<size_t>(steps_ * 4 * kTile) : 0);
    const auto room_of_sums = static_cast<float>(room_beside(4 * steps_));
    ScanTile tile;
    const int64_t padded = static_cast<int64_t>(base_.size());
    const int64_t tile_bytes = steps_ * 4 * kTile / (halves ? 2 : 1), tiles = to - from, facts = facts_of_tile(levels);
    const int64_t parts = static_cast<int64_t>(groups_.size());
    const int64_t share = parts < 8 ? 0 : (tile_bytes / 64 + parts - 1) / parts * 64;  // few: memory is the bound
    const int64_t tail_bytes = levelled ? record_bytes(levels, s.gallery.d) : 0;
    const int64_t rest_share = halves ? share : (tail_bytes * kTile / 64 + parts - 1) / parts * 64;
    const int64_t stride = guess ? scattered(tiles) : 1;
    for (int64_t seen = 0, t = 0; seen < tiles; ++seen) {
        if ((seen & 63) == 0) {
            s.control.did(count_ * std::min<int64_t>(seen, 64));
            if (!s.control.go(worker)) return {};
            learn(s, found, best);
        }
        const double sampled = static_cast<double>(s.k) * static_cast<double>(seen + 1) / static_cast<double>(tiles);
        rank_ = guess ? std::min(s.k, static_cast<int64_t>(sampled + 4.5 * std::sqrt(sampled)) + 4) : s.k;
        const float* meta = s.shadow.meta + (from + t) * facts;
        const uint8_t* values = s.shadow.tiles + (from + t) * tile_bytes;
        const uint8_t* low = halves && !few ? s.shadow.low + (from + t) * tile_bytes : nullptr;
        if (low && parts >= kManyGroups) {  // else each group joins them on the way
            s.kernel.join(values, low, steps_, joined.data());
            values = joined.data();
            low = nullptr;
        }
        const float* const high_error = few ? s.shadow.high_error + (from + t) * kTile : nullptr;
        s.kernel.open_tile(values, low, meta, levelled, high_error, room_of_sums, &tile);
        s.kernel.aim(tile, queries, padded);
        // The next tile comes to L2 while this one is at work, a few lines with each group of queries.
        const int64_t next = t + stride < tiles ? t + stride : t + stride - tiles;
        const uint8_t* ahead = s.shadow.tiles + (from + next) * tile_bytes;
        const uint8_t* const end = seen + 1 < tiles ? ahead + tile_bytes : ahead;
        const uint8_t* rest =
            halves ? s.shadow.low + (from + next) * tile_bytes : levels.tails + (from + next) * kTile * tail_bytes;
        const uint8_t* rest_end = rest;
        if (seen + 1 < tiles && halves && share > 0) rest_end += tile_bytes;
        if (seen + 1 < tiles && levelled && count_ >= kWide)
            rest_end += std::min<int64_t>(kTile, s.gallery.n - (from + next) * kTile) * tail_bytes;
        if (share > 0)
            for (int64_t at = 0; at < facts; at += 16) __builtin_prefetch(s.shadow.meta + (from + next) * facts + at);
        for (const auto& [start, group] : groups_) {
            for (const uint8_t* stop = std::min(ahead + share, end); ahead < stop; ahead += 64)
                __builtin_prefetch(ahead, 0, 2);
            for (const uint8_t* stop = std::min(rest + rest_share, rest_end); rest < stop; rest += 64)
                __builtin_prefetch(rest, 0, 2);
            const ScanQueries& asked = few ? of_high : queries;
            if (__builtin_expect(!s.kernel.scan(tile, steps_, asked, start, group, masks, keys), 1)) continue;
            for (int j = 0; j < group; ++j) {
                if (masks[j] == 0) continue;
                if (levelled) {
                    settle(s, start + j, from + t, masks[j], keys + j * kTile, found[start + j]);
                } else {
                    push(s, start + j, from + t, tile, masks[j], keys + j * kTile, found[start + j]);
                }
            }
        }
        t = next;
    }
    learn(s, found, best);
    s.control.did(tiles > 0 ? count_ * ((tiles - 1) % 64 + 1) : 0);
    std::vector<int64_t> failed;
    for (int64_t q = 0; (guess || few) && q < count_; ++q) {
        if (!usable(q)) continue;
        if (few ? !settle_halves(s, q, found[q], best) : !found[q].exhausted && !found[q].proven(s.k))
            failed.push_back(q);
    }
    return failed;
}

// Proves, by the exact scores of the likeliest rows, the threshold that was thought to hold, and drops what it leaves
// out; false where it does not hold, or where too many rows were left over.
bool ScanBlock::settle_halves(const Search& s, int64_t q, Candidates& found, Proven* best) {
    if (found.exhausted) return false;
    const auto likely = std::min<size_t>(found.rows.size(), static_cast<size_t>(s.k + s.k / 4 + 6));
    const auto better = [](const Candidate& a, const Candidate& b) { return a.low > b.low; };
    std::nth_element(found.rows.begin(), found.rows.begin() + static_cast<int64_t>(likely), found.rows.end(), better);
    std::vector<int64_t> ids;
    for (size_t i = 0; i < likely; ++i) ids.push_back(found.rows[i].id);
    double bar = exact_bar(s, queries_[static_cast<size_t>(q)], ids);
    if (best) bar = best[q].exchange(bar);
    if (found.tau > bar) return false;
    found.tau = bar;
    found.rows.erase(
        std::remove_if(found.rows.begin(), found.rows.end(), [&](const Candidate& c) { return c.high < bar; }),
        found.rows.end());
    return true;
}

// The scan's threshold before a tile's own margins, in units of the query's scale, lowered past its rounding.
void ScanBlock::set_base(int64_t q, double tau) {
    const Facts& f = facts_[static_cast<size_t>(q)];
    const double base = (tau - kSlack * f.constant) / f.scale;
    base_[static_cast<size_t>(q)] = tau == -kInfinity ? -std::numeric_limits<float>::max()
                                                      : static_cast<float>(base - std::fabs(base) * kSlack - 2 * kTiny);
}

// Candidates after which the threshold is raised again. Often enough that it is fresh: a needless candidate costs more
// than its share of a pass, and with levels a stale threshold lets tails be read.
size_t ScanBlock::room_for(const Search& s, size_t kept) const {
    const auto k = static_cast<size_t>(s.k);
    if (tail_stride_ > 0) return kept == 0 ? k + 8 : kept + k / 4 + 4;
    return kept == 0 ? 2 * k + 64 : kept + kept / 2 + 32;
}

// What k rows of another part have proven holds here too; and the other way round.
void ScanBlock::learn(const Search&, Candidates* found, Proven* best) {
    if (best == nullptr) return;
    for (int64_t q = 0; q < count_; ++q) {
        if (!usable(q) || found[q].exhausted) continue;
        const double known = best[q].exchange(few_ ? -kInfinity : found[q].tau);
        if (known <= found[q].tau) continue;
        found[q].tau = known;
        set_base(q, known);
    }
}

void ScanBlock::push(const Search& s, int64_t q, int64_t t, const ScanTile& tile, uint64_t mask, const float* keys,
                     Candidates& found) {
    const Facts& f = facts_[static_cast<size_t>(q)];
    const int64_t own = s.self_of(queries_[static_cast<size_t>(q)]);
    for (; mask; mask &= mask - 1) {
        const int r = __builtin_ctzll(mask);
        const int64_t id = t * kTile + r;
        if (id >= s.gallery.n || id == own) continue;
        const double half = tile.has_half ? tile.half()[r] : 0;
        const double error = tile.kind == Values::high ? tile.tails[r] : tile.meta[2 * kTile + r];
        // A row's norm is not worth a visit to memory that the scan has not made.
        const double norm = tile.kind == Values::high ? tile.most_norm : tile.meta[3 * kTile + r];
        const double key = static_cast<double>(keys[r]) * f.scale;
        const double margin = f.length * error + f.error * norm +
                              kSlack * (f.constant + half + f.length * (norm + error)) + f.scale * kTiny;
        if (!consider(s, q, id, key, margin, found)) return;
    }
}

// Takes a row whose upper end reaches the threshold; false when the query has too many and goes through every row.
bool ScanBlock::consider(const Search& s, int64_t q, int64_t id, double key, double margin, Candidates& found) {
    if (key + margin < found.tau) return true;
    found.rows.push_back(candidate(id, key, margin));
    if (found.rows.size() < found.room) return true;
    found.shrink(rank_, s.kernel, few_ ? kTrust : 0);
    found.room = room_for(s, found.rows.size());
    if (found.rows.size() > most_) {
        found.exhausted = true;
        found.rows.clear();
        base_[static_cast<size_t>(q)] = kInfinityF;  // this query will go through every row
        per_tail_[static_cast<size_t>(q)] = 0;
        return false;
    }
    set_base(q, found.tau);
    return true;
}

// Rows of tile t that their heads leave over: adds the tails' products, which makes their intervals as narrow as 8 bits
// can.
void ScanBlock::settle(const Search& s, int64_t q, int64_t t, uint64_t mask, const float* keys, Candidates& found) {
    if (found.exhausted) return;
    const Levels& levels = s.shadow.levels;
    const int64_t first = t * kTile, own = s.self_of(queries_[static_cast<size_t>(q)]) - first;
    if (first + kTile > s.gallery.n) mask &= (uint64_t{1} << (s.gallery.n - first)) - 1;
    if (own >= 0 && own < kTile) mask &= ~(uint64_t{1} << own);
    uint8_t rows[kTile];
    int32_t products[kTile];
    int count = 0;
    for (; mask; mask &= mask - 1) rows[count++] = static_cast<uint8_t>(__builtin_ctzll(mask));
    const int64_t size = record_bytes(levels, s.gallery.d);
    const uint8_t* const records = levels.tails + first * size;
    const float* const half = s.shadow.meta + t * kHeadMeta + kTile;
    const Facts& f = facts_[static_cast<size_t>(q)];
    s.kernel.tails(records, size, rows, count, tails_.data() + q * tail_stride_, s.gallery.d - levels.head, products);
    tails_read_ += count;
    for (int i = 0; i < count; ++i) {
        TailFacts row;
        std::memcpy(&row, records + rows[i] * size, sizeof row);
        const double key = static_cast<double>(keys[rows[i]]) * f.scale +
                           static_cast<double>(products[i] + f.tail_init) * (row.scale * f.tail_scale);
        const double margin =
            f.by_error * row.error + f.by_norm * row.norm + kSlack * static_cast<double>(half[rows[i]]) + f.by_all;
        if (__builtin_expect(key + margin < found.tau, 1)) continue;
        if (!consider(s, q, first + rows[i], key, margin, found)) return;
    }
}

}  // namespace fct::cpu
