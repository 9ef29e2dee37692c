#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/topk_quantise.h"
#include "cpu/topk_search.h"

namespace fct::cpu {
namespace {

constexpr uint32_t kUpper = 0xf0f0f0f0u;
constexpr float kLeastScale = 1e-30f;

// |v - v''|, where v'' is what the high four bits of its bytes say.
double high_error(const double* v, int64_t d, float scale, const int8_t* bytes) {
    double sums[8] = {};
    const auto add = [&](int64_t j, int lane) {
        const double t = v[j] - static_cast<double>(scale) * ((bytes[j] & ~15) + 8);
        sums[lane] += t * t;
    };
    const int64_t whole = d & ~int64_t{7};
    for (int64_t j = 0; j < whole; j += 8)
        for (int lane = 0; lane < 8; ++lane) add(j + lane, lane);
    for (int64_t j = whole; j < d; ++j) add(j, 0);
    double sum = 0;
    for (const double some : sums) sum += some;
    return std::sqrt(sum) * (1 + 1e-9);
}

}  // namespace

void shadow_pack(const RowSource& gallery, Metric metric, int64_t first, int64_t count, const float* shift,
                 uint8_t* tiles, float* meta, uint8_t* low, float* high_errors, int threads, Isa isa) {
    const TopkKernels& kernel = kernels(isa);
    const bool halves = low != nullptr;
    const int64_t d = gallery.d, steps = steps_of(d, halves), total = (count + kTile - 1) / kTile;
    const int64_t tile_bytes = steps * 4 * kTile / (halves ? 2 : 1);
    constexpr int64_t kSome = 64;
    Control control{KeepGoing{}};
    control.tasks(threads, (total + kSome - 1) / kSome, [&](int64_t task, int) {
        std::vector<float> scratch(static_cast<size_t>(d));
        std::vector<double> v(static_cast<size_t>(d));
        std::vector<int8_t> bytes(static_cast<size_t>(4 * steps), 0);
        for (int64_t t = task * kSome; t < std::min(total, (task + 1) * kSome); ++t) {
            float* facts = meta + t * kMeta;
            uint8_t* tile = tiles + t * tile_bytes;
            std::fill(facts, facts + kMeta, 0.0f);
            if (halves) std::fill(high_errors + t * kTile, high_errors + (t + 1) * kTile, 0.0f);
            // A row of next to nothing beside the others is as well off with a coarser scale, see ScanQueries::limit.
            double largest = 0;
            for (int64_t row = t * kTile; row < std::min(count, (t + 1) * kTile); ++row) {
                to_scanned(gallery.row(first + row, scratch.data()), d, metric, shift, v.data());
                largest = std::max(largest, largest_of(v.data(), d));
            }
            auto least =
                static_cast<float>(largest / 127 * (127.0 * 127 * static_cast<double>(d)) / room_beside(4 * steps));
            if (halves) least = std::max(least, kLeastScale);  // 0 has no high half, so that no scale may be 0
            for (int64_t r = 0; r < kTile; ++r) {
                const int64_t row = t * kTile + r;
                if (row < count) {
                    to_scanned(gallery.row(first + row, scratch.data()), d, metric, shift, v.data());
                    const Quantised q = quantise(v.data(), d, least, bytes.data(), kernel);
                    facts[r] = q.scale;
                    facts[kTile + r] = metric == Metric::l2 ? static_cast<float>(q.length * q.length / 2) : 0.0f;
                    facts[2 * kTile + r] = round_up(q.error);
                    facts[3 * kTile + r] = round_up(q.norm);
                    if (halves) high_errors[t * kTile + r] = round_up(high_error(v.data(), d, q.scale, bytes.data()));
                    for (int j = 0; j < 3; ++j) {
                        const float value = facts[(j == 2 ? 1 : j + 2) * kTile + r];
                        facts[4 * kTile + j] = std::max(facts[4 * kTile + j], value);
                    }
                } else {
                    std::fill(bytes.begin(), bytes.end(), int8_t{0});
                }
                const auto word = [&](int64_t step) {
                    uint32_t four;
                    std::memcpy(&four, bytes.data() + 4 * step, 4);
                    return four ^ 0x80808080u;  // + 128
                };
                for (int64_t step = 0; step < steps; step += halves ? 2 : 1) {
                    uint32_t first_half = word(step);
                    const int64_t at = (halves ? step / 2 : step) * kTile + r;
                    if (halves) {
                        const uint32_t even = first_half, odd = word(step + 1);
                        first_half = (even & kUpper) | (odd >> 4 & ~kUpper);
                        const uint32_t second = (even & ~kUpper) | (odd << 4 & kUpper);
                        std::memcpy(low + t * tile_bytes + at * 4, &second, 4);
                    }
                    std::memcpy(tile + at * 4, &first_half, 4);
                }
            }
        }
    });
}

}  // namespace fct::cpu
