#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/topk_quantise.h"
#include "cpu/topk_search.h"

namespace fct::cpu {

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

}  // namespace fct::cpu
