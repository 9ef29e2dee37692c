// Search, ranks, shadows, row checks, conversions and checksums without Python: odd shapes, every level, metric and
// dtype, threads, against plain double loops; arrays end at a guard page. Built like transform_cases.cpp.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "cpu/checksum.h"
#include "cpu/convert.h"
#include "cpu/rows.h"
#include "cpu/topk.h"
#include "guarded.h"

using namespace fct::cpu;

namespace {

std::mt19937 rng(0);
int cases = 0, failures = 0;

void check(bool ok, const char* what, const char* where, int64_t a = 0, int64_t b = 0) {
    if (ok) return;
    ++failures;
    std::printf("FAILED: %s (%s, %lld, %lld)\n", what, where, static_cast<long long>(a), static_cast<long long>(b));
}

// Rows in one dtype that end `off` bytes before their memory does, with what they mean in float beside them.
struct Rows {
    Rows(int64_t n, int64_t d, DType dtype, float offset, bool ties, size_t off = 0)
        : values(static_cast<size_t>(n * d)), bytes(static_cast<size_t>(n * d) * size_of(dtype) + off), scale(1) {
        scale.data[0] = 0.03f;
        source = {bytes.data, dtype, n, d, d, dtype == DType::i8 ? scale.data : nullptr, 0, 0};
        std::normal_distribution<float> normal;
        const RowsView view{bytes.data, dtype, d, d, source.scale, 0, 0};
        std::vector<float> row(static_cast<size_t>(d));
        for (int64_t i = 0; i < n; ++i) {
            for (float& x : row) x = ties ? std::round(normal(rng)) : normal(rng) + offset;
            store_row(row.data(), view, i);
            load_row(view, i, values.data() + i * d);
        }
    }
    static size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2; }

    std::vector<float> values;
    Guarded<uint8_t> bytes;
    Guarded<float> scale;
    RowSource source;
};

double cost(const float* q, const float* g, int64_t d, Metric metric) {
    double dot = 0, qq = 0, gg = 0, distance = 0;
    for (int64_t j = 0; j < d; ++j) {
        const double a = q[j], b = g[j];
        dot += a * b;
        qq += a * a;
        gg += b * b;
        distance += (a - b) * (a - b);
    }
    if (metric == Metric::l2) return distance;
    if (metric == Metric::ip) return -dot;
    return qq > 0 && gg > 0 ? -dot / std::sqrt(qq * gg) : 0;
}

size_t tiles_of(int64_t n) { return static_cast<size_t>((n + kTile - 1) / kTile); }

struct Packed {
    Packed(const RowSource& gallery, Metric metric, const float* shift, int threads, Isa isa, int64_t split,
           bool halves = false)
        : tiles(tiles_of(gallery.n) * static_cast<size_t>(tile_bytes(gallery.d, halves))),
          meta(tiles_of(gallery.n) * kMeta),
          low(halves ? tiles_of(gallery.n) * static_cast<size_t>(tile_bytes(gallery.d, halves)) : 0),
          high_error(halves ? tiles_of(gallery.n) * kTile : 0) {
        const auto pack = [&](int64_t first, int64_t count) {
            const int64_t tile = first / kTile, bytes = tile * tile_bytes(gallery.d, halves);
            shadow_pack(gallery, metric, first, count, shift, tiles.data + bytes, meta.data + tile * kMeta,
                        halves ? low.data + bytes : nullptr, halves ? high_error.data + tile * kTile : nullptr, threads,
                        isa);
        };
        if (split > 0) pack(0, split);
        pack(split, gallery.n - split);
    }
    static int64_t tile_bytes(int64_t d, bool halves = false) {
        return steps_of(d, halves) * 4 * kTile / (halves ? 2 : 1);
    }
    Guarded<uint8_t> tiles;
    Guarded<float> meta;
    Guarded<uint8_t> low;
    Guarded<float> high_error;
};

void search(int64_t n, int64_t d, int64_t nq, int64_t k, Metric metric, DType dtype, Isa isa, bool ties,
            size_t off = 0) {
    ++cases;
    const char* where = isa_name(isa);
    const Rows g(n, d, dtype, 0.5f, ties, off), q(nq, d, dtype, 0, ties, off);
    std::vector<float> shift(static_cast<size_t>(d), 0.25f);
    const Packed packed(g.source, metric, shift.data(), 2, isa, 0);
    const int64_t split = n / 2 / kTile * kTile;
    const Packed parts(g.source, metric, shift.data(), 1, isa, split);
    const Packed halves(g.source, metric, shift.data(), 2, isa, split, true);
    const size_t tiles = static_cast<size_t>((n + kTile - 1) / kTile);
    check(std::memcmp(packed.tiles.data, parts.tiles.data, tiles * static_cast<size_t>(Packed::tile_bytes(d))) == 0 &&
              std::memcmp(packed.meta.data, parts.meta.data, tiles * kMeta * 4) == 0,
          "a shadow packed in parts is another", where, n, d);
    // With levels: a rotation that turns the first coordinates round, so that it is orthogonal to the bit.
    const int64_t head = d >= 12 ? 8 : 0, size = record_bytes({head, nullptr, nullptr, 0, nullptr}, d);
    const Guarded<float> down(static_cast<size_t>(d * head)), up(static_cast<size_t>(d * head));
    for (int64_t j = 0; j < head; ++j) down.data[j * head + j] = 2, up.data[j * d + j] = 1;
    Levels levels{head, down.data, up.data, 1e-5, nullptr};
    const Guarded<uint8_t> heads(tiles_of(n) * static_cast<size_t>(head * kTile)), tails(static_cast<size_t>(n * size));
    const Guarded<float> head_meta(tiles_of(n) * kHeadMeta);
    if (head > 0)
        shadow_pack_levels(g.source, metric, 0, n, shift.data(), levels, heads.data, head_meta.data, tails.data, 2,
                           isa);
    levels.tails = tails.data;
    std::vector<float> first_distances;
    std::vector<int64_t> first_indices;
    for (const int shadow : {3, 2, 1, 0})
        for (const int threads : {1, 3}) {
            if (shadow == 2 && head == 0) continue;
            const Guarded<float> distances(static_cast<size_t>(nq * k));
            const Guarded<int64_t> indices(static_cast<size_t>(nq * k));
            const Shadow scanned =
                shadow == 3   ? Shadow{halves.tiles.data, halves.meta.data,      shift.data(), {},
                                       halves.low.data,   halves.high_error.data}
                : shadow == 2 ? Shadow{heads.data, head_meta.data, shift.data(), levels}
                              : Shadow{shadow ? packed.tiles.data : nullptr, packed.meta.data, shift.data(), {}};
            SearchCounts counts;
            topk(q.source, g.source, scanned, metric, k, -1, distances.data, indices.data, threads, isa, {}, &counts);
            if (first_distances.empty()) {
                first_distances.assign(distances.data, distances.data + nq * k);
                first_indices.assign(indices.data, indices.data + nq * k);
            }
            check(std::memcmp(first_distances.data(), distances.data, static_cast<size_t>(nq * k) * 4) == 0 &&
                      std::equal(first_indices.begin(), first_indices.end(), indices.data),
                  "the answer depends on shadow or threads", where, n, d);
        }
    std::vector<std::pair<float, int64_t>> order(static_cast<size_t>(n));
    for (int64_t i = 0; i < nq; ++i) {
        for (int64_t r = 0; r < n; ++r)
            order[static_cast<size_t>(r)] = {
                static_cast<float>(cost(q.values.data() + i * d, g.values.data() + r * d, d, metric)), r};
        std::sort(order.begin(), order.end());
        for (int64_t j = 0; j < k; ++j) {
            const size_t at = static_cast<size_t>(i * k + j);
            const float sign = metric == Metric::l2 ? 1.0f : -1.0f, want = order[static_cast<size_t>(j)].first;
            const float got = sign * first_distances[at], near = 3e-7f * std::fabs(want) + 1e-12f;
            check(std::fabs(got - want) <= near, "another distance than the reference", where, n, d);
            const int64_t row = first_indices[at];
            check(row >= 0 && row < n, "an index outside the gallery", where, row, n);
            if (row < 0 || row >= n) continue;
            const double own = cost(q.values.data() + i * d, g.values.data() + row * d, d, metric);
            check(std::fabs(own - static_cast<double>(want)) <= static_cast<double>(near), "another row", where, n, d);
        }
    }
}

void rank(int64_t n, int64_t d, int64_t classes, Metric metric, Isa isa) {
    ++cases;
    const Rows g(n, d, DType::f32, 0.5f, true);
    std::vector<int64_t> codes(static_cast<size_t>(n)), starts(static_cast<size_t>(classes) + 1), members;
    for (int64_t& code : codes) code = static_cast<int64_t>(rng() % static_cast<uint32_t>(classes));
    for (int64_t c = 0; c < classes; ++c) {
        for (int64_t i = 0; i < n; ++i)
            if (codes[static_cast<size_t>(i)] == c) members.push_back(i);
        starts[static_cast<size_t>(c) + 1] = static_cast<int64_t>(members.size());
    }
    for (const int threads : {1, 3}) {
        const Guarded<int64_t> first(static_cast<size_t>(n));
        const Guarded<double> precision(static_cast<size_t>(n));
        ranks(g.source, g.source, codes.data(), starts.data(), members.data(), metric, 0, first.data, precision.data,
              threads, isa, {});
        for (int64_t i = 0; i < n; i += 7) {
            std::vector<std::pair<float, int64_t>> order;
            for (int64_t r = 0; r < n; ++r)
                if (r != i)
                    order.push_back(
                        {static_cast<float>(cost(g.values.data() + i * d, g.values.data() + r * d, d, metric)), r});
            std::sort(order.begin(), order.end());
            int64_t before = -1, matches = 0;
            double sum = 0;
            for (size_t j = 0; j < order.size(); ++j) {
                if (codes[static_cast<size_t>(order[j].second)] != codes[static_cast<size_t>(i)]) continue;
                if (before < 0) before = static_cast<int64_t>(j);
                size_t within = j, inside = 0;  // all rows tied with this one come together
                while (within < order.size() && order[within].first <= order[j].first) ++within;
                for (size_t t = 0; t < within; ++t)
                    inside += codes[static_cast<size_t>(order[t].second)] == codes[static_cast<size_t>(i)];
                sum += static_cast<double>(inside) / static_cast<double>(within);
                ++matches;
            }
            check(first.data[i] == before, "another first match", isa_name(isa), first.data[i], before);
            const double want = matches ? sum / static_cast<double>(matches) : 0;
            check(matches ? std::fabs(precision.data[i] - want) < 1e-12 : std::isnan(precision.data[i]),
                  "another average precision", isa_name(isa), n, i);
        }
    }
}

void row_checks() {
    for (const int64_t d : {1, 7, 16, 33, 130}) {
        ++cases;
        const int64_t n = 37;
        const Guarded<float> x(static_cast<size_t>(n * d));
        const Guarded<uint16_t> half(static_cast<size_t>(n * d));
        std::fill(x.data, x.data + n * d, 1.0f);
        std::fill(half.data, half.data + n * d, uint16_t{0x3c00});
        check(first_nonfinite_row(x.data, DType::f32, n, d, d) == -1, "finite rows refused", "rows", n, d);
        check(first_nonfinite_row(half.data, DType::f16, n, d, d) == -1, "finite rows refused", "rows", n, d);
        x.data[(n - 1) * d + d - 1] = std::numeric_limits<float>::quiet_NaN();
        x.data[20 * d] = -std::numeric_limits<float>::infinity();
        half.data[n * d - 1] = 0x7c00;
        check(first_nonfinite_row(x.data, DType::f32, n, d, d) == 20, "an infinity missed", "rows", n, d);
        check(first_nonfinite_row(half.data, DType::f16, n, d, d) == n - 1, "an infinity missed", "rows", n, d);
        const Guarded<uint8_t> flags(static_cast<size_t>(n));
        check(nonfinite_rows(x.data, DType::f32, n, d, d, flags.data) == 2, "another count", "rows", n, d);
        for (int64_t i = 0; i < n; ++i) check(flags.data[i] == (i == 20 || i == n - 1), "another flag", "rows", i, d);
    }
}

// Every half and bfloat16 survives the way through float; rows of every length, scales by row and by column.
void conversions() {
    for (uint32_t u = 0; u < 0x10000u; ++u) {
        const uint16_t h = static_cast<uint16_t>(u);
        if ((u & 0x7c00u) != 0x7c00u || (u & 0x3ffu) == 0)
            check(to_f16(from_f16(h)) == h, "a half changes", "convert", u);
        if ((u & 0x7f80u) != 0x7f80u || (u & 0x7fu) == 0)
            check(to_bf16(from_bf16(h)) == h, "a bfloat16 changes", "convert", u);
    }
    for (const int64_t d : {1, 3, 15, 16, 17, 64, 97})
        for (const int64_t by_row : {0, 1}) {
            ++cases;
            const int64_t n = 5;
            const Guarded<int8_t> x(static_cast<size_t>(n * d));
            const Guarded<float> scale(static_cast<size_t>(by_row ? n : d)), back(static_cast<size_t>(d));
            for (int64_t i = 0; i < n * d; ++i) x.data[i] = static_cast<int8_t>(static_cast<int>(rng() % 255) - 127);
            for (int64_t i = 0; i < (by_row ? n : d); ++i) scale.data[i] = 0.01f * static_cast<float>(i + 1);
            const RowsView view{x.data, DType::i8, d, d, scale.data, by_row, 1 - by_row};
            for (int64_t i = 0; i < n; ++i) {
                const std::vector<int8_t> before(x.data + i * d, x.data + (i + 1) * d);
                load_row(view, i, back.data);
                store_row(back.data, view, i);
                check(std::equal(before.begin(), before.end(), x.data + i * d), "an int8 row changes", "convert", i, d);
                double sums[8] = {};
                add_squares(back.data, d, sums);
                for (int64_t j = 0; j < d; ++j) back.data[j] = static_cast<float>(back.data[j] * factor_to(1.0f, sums));
                double sum = 0;
                for (int64_t j = 0; j < d; ++j) sum += static_cast<double>(back.data[j]) * back.data[j];
                check(sum == 0 || std::fabs(sum - 1) < 1e-5, "not of unit length", "convert", i, d);
            }
        }
}

void checksums() {
    ++cases;
    const Xxh64 none;
    check(none.digest() == 0xef46db3751d8e999u, "the empty input's checksum", "xxh64");  // of the specification
    const size_t n = 1000;
    const Guarded<uint8_t> data(n);
    for (size_t i = 0; i < n; ++i) data.data[i] = static_cast<uint8_t>(rng());
    Xxh64 whole;
    whole.update(data.data, n);
    for (const size_t step : {size_t{1}, size_t{7}, size_t{31}, size_t{32}, size_t{33}, size_t{999}}) {
        Xxh64 parts;
        for (size_t at = 0; at < n; at += step) parts.update(data.data + at, std::min(step, n - at));
        check(parts.digest() == whole.digest(), "the checksum depends on the cut", "xxh64", static_cast<int64_t>(step));
    }
}

}  // namespace

int main() {
    constexpr Metric kMetrics[] = {Metric::l2, Metric::ip, Metric::cosine};
    for (int level = 0; level <= static_cast<int>(detected_isa()); ++level) {
        const Isa isa = static_cast<Isa>(level);
        for (const Metric metric : kMetrics) {
            search(1, 1, 1, 1, metric, DType::f32, isa, false);
            search(63, 3, 2, 63, metric, DType::f16, isa, false);
            search(65, 17, 3, 7, metric, DType::bf16, isa, false);
            search(700, 33, 13, 20, metric, DType::f32, isa, true);
            search(1500, 64, 7, 5, metric, DType::i8, isa, false);
            search(129, 130, 1, 40, metric, DType::f32, isa, false);
            search(3000, 40, 30, 6, metric, DType::f32, isa, false);         // enough for a look ahead
            for (const DType dtype : {DType::f32, DType::f16, DType::bf16})  // off their values' boundary
                search(200, 19, 8, 9, metric, dtype, isa, false, 1);
            rank(150, 5, 2, metric, isa);
            rank(150, 11, 90, metric, isa);
        }
    }
    row_checks();
    conversions();
    checksums();
    std::printf("%d cases, %d failures\n", cases, failures);
    return failures == 0 ? 0 : 1;
}
