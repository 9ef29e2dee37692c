// Packs a shadow with levels: rows are rotated in panels, one row a lane, then heads and tails become 8 bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/topk_quantise.h"
#include "cpu/topk_search.h"

namespace fct::cpu {
namespace {

constexpr int kPanels = kTile / kPanel;
constexpr float kLeastScale = 1e-32f;  // smaller ones are nothing, and their rows' values all lost

// One tile on its way into the shadow.
class TilePacker {
  public:
    TilePacker(const RowSource& gallery, Metric metric, const float* shift, const Levels& levels,
               const TopkKernels& kernel)
        : gallery_(gallery), metric_(metric), shift_(shift), levels_(levels), kernel_(kernel) {
        const auto d = static_cast<size_t>(gallery.d);
        scratch_.resize(d);
        v_.resize(d);
        panels_.resize(d * kTile);
        work_.resize(static_cast<size_t>(levels.head) * kPanel);
        words_.resize((d + 3) / 4 * kPanel);
    }

    // Rows [first, first + count), count <= kTile.
    void pack(int64_t first, int64_t count, uint8_t* tile, float* facts, uint8_t* tails) {
        const int64_t d = gallery_.d, head = levels_.head;
        std::fill(facts, facts + kHeadMeta, 0.0f);
        float most = 0, largest[kTile];
        for (int p = 0; p < kPanels; ++p) {
            load(first, count, p);
            float* const panel = panels_.data() + p * d * kPanel;
            kernel_.rotate(levels_, panel, d, work_.data());
            kernel_.largest(panel, head, largest + p * kPanel);
            for (int r = 0; r < kPanel; ++r) most = std::max(most, largest[p * kPanel + r]);
        }
        // As in a shadow without levels: a coarser scale for a row of next to nothing.
        const double ratio = 127.0 * 127 * static_cast<double>(head) / room_beside(head);
        const auto least = static_cast<float>(static_cast<double>(most) / 127 * ratio);
        for (int p = 0; p < kPanels && p * kPanel < count; ++p)
            pack_panel(p, count, largest + p * kPanel, least, tile, facts, tails);
    }

  private:
    // Panel p of the tile: its rows as they are scanned, in float32, and their lengths; zeros past the last.
    void load(int64_t first, int64_t count, int p) {
        const int64_t d = gallery_.d;
        float* const panel = panels_.data() + p * d * kPanel;
        for (int r = 0; r < kPanel; ++r) {
            const int64_t row = p * kPanel + r;
            lengths_[row] = 0;
            if (row >= count) {
                for (int64_t j = 0; j < d; ++j) panel[j * kPanel + r] = 0;
                continue;
            }
            to_scanned(gallery_.row(first + row, scratch_.data()), d, metric_, shift_, v_.data());
            double sums[8] = {};
            int64_t j = 0;
            for (; j + 8 <= d; j += 8)
                for (int i = 0; i < 8; ++i) sums[i] += v_[static_cast<size_t>(j + i)] * v_[static_cast<size_t>(j + i)];
            for (; j < d; ++j) sums[0] += v_[static_cast<size_t>(j)] * v_[static_cast<size_t>(j)];
            for (int i = 1; i < 8; ++i) sums[0] += sums[i];
            lengths_[row] = std::sqrt(sums[0]);
            for (j = 0; j < d; ++j) panel[j * kPanel + r] = static_cast<float>(v_[static_cast<size_t>(j)]);
        }
    }

    // One part of a panel in 8 bits; `lost` gets a bound of what rounding lost of each lane.
    struct Part {
        float scale[kPanel], length[kPanel], error[kPanel], norm[kPanel];
        double lost[kPanel];
    };

    void quantise(const float* y, int64_t m, const float* largest, float least, Part* part) {
        for (int r = 0; r < kPanel; ++r) {
            part->scale[r] = std::max(least, largest[r] / 127);
            if (!(part->scale[r] >= kLeastScale)) part->scale[r] = 0;
        }
        kernel_.quantise_panel(y, m, part->scale, words_.data(), part->length, part->error, part->norm);
        // Float32 sums of m squares, and the quotients that were rounded before they were compared.
        const double wider = 1 + static_cast<double>(m + 16) * 0x1p-23, scaled = std::sqrt(static_cast<double>(m));
        for (int r = 0; r < kPanel; ++r) {
            const double scale = part->scale[r], length = scale > 0 ? scale * part->length[r] * wider
                                                                    : scaled * static_cast<double>(largest[r]);
            part->lost[r] = scale > 0 ? scale * part->error[r] * wider + length * 0x1p-21 : length;
            part->length[r] = round_up(length);
            part->norm[r] = round_up(scale * part->norm[r] * wider);
        }
    }

    void pack_panel(int p, int64_t count, const float* largest, float least, uint8_t* tile, float* facts,
                    uint8_t* tails) {
        const int64_t d = gallery_.d, head = levels_.head, size = record_bytes(levels_, d);
        const float* const panel = panels_.data() + p * d * kPanel;
        const int some = static_cast<int>(std::min<int64_t>(kPanel, count - p * kPanel));
        Part first, rest;
        quantise(panel, head, largest, least, &first);
        for (int64_t step = 0; step < head / 4; ++step)
            std::memcpy(tile + (step * kTile + p * kPanel) * 4, words_.data() + step * kPanel, kPanel * 4);
        float tail_largest[kPanel];
        kernel_.largest(panel + head * kPanel, d - head, tail_largest);
        quantise(panel + head * kPanel, d - head, tail_largest, 0, &rest);
        for (int r = 0; r < some; ++r) {
            const int row = p * kPanel + r;
            const double length = lengths_[row], lost = levels_.loss * length + kLeastLoss;
            facts[row] = first.scale[r];
            facts[kTile + row] = metric_ == Metric::l2 ? static_cast<float>(length * length / 2) : 0.0f;
            facts[2 * kTile + row] = round_up(rest.length[r] + lost);
            const double norm = std::hypot(static_cast<double>(first.norm[r]), static_cast<double>(rest.norm[r]));
            const TailFacts own{rest.scale[r], round_up(std::hypot(first.lost[r], rest.lost[r]) + lost),
                                round_up(norm)};
            uint8_t* const record = tails + row * size;
            std::memcpy(record, &own, sizeof own);
            for (int64_t step = 0; step < (d - head + 3) / 4; ++step)
                std::memcpy(record + sizeof own + 4 * step, words_.data() + step * kPanel + r, 4);
            // As floats that a NaN or an infinity reaches: such a gallery is not scanned.
            const float all[4] = {round_up(first.lost[r] + lost), first.norm[r], facts[kTile + row], round_up(length)};
            for (int j = 0; j < 4; ++j)
                facts[3 * kTile + j] = all[j] > facts[3 * kTile + j] ? all[j] : facts[3 * kTile + j];
            if (!std::isfinite(own.error) || !std::isfinite(own.norm)) facts[3 * kTile + 3] = kInfinityF;
        }
    }

    const RowSource& gallery_;
    const Metric metric_;
    const float* const shift_;
    const Levels& levels_;
    const TopkKernels& kernel_;
    std::vector<float> scratch_, panels_, work_;
    std::vector<double> v_;
    std::vector<uint32_t> words_;
    double lengths_[kTile];
};

}  // namespace

void shadow_pack_levels(const RowSource& gallery, Metric metric, int64_t first, int64_t count, const float* shift,
                        const Levels& levels, uint8_t* tiles, float* meta, uint8_t* tails, int threads, Isa isa) {
    const int64_t total = (count + kTile - 1) / kTile;
    constexpr int64_t kSome = 16;
    Control control{KeepGoing{}};
    control.tasks(threads, (total + kSome - 1) / kSome, [&](int64_t task, int) {
        TilePacker packer(gallery, metric, shift, levels, kernels(isa));
        for (int64_t t = task * kSome; t < std::min(total, (task + 1) * kSome); ++t) {
            uint8_t* const tile = tiles + t * levels.head * kTile;
            std::fill(tile, tile + levels.head * kTile, uint8_t{128});
            packer.pack(first + t * kTile, std::min<int64_t>(kTile, count - t * kTile), tile, meta + t * kHeadMeta,
                        tails + t * kTile * record_bytes(levels, gallery.d));
        }
    });
}

}  // namespace fct::cpu
