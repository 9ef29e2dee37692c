#include "cpu/transform.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/convert.h"
#include "cpu/peaks.h"

namespace fct::cpu {
namespace {

constexpr int64_t kLine = 64;
// Activations read and written by a block's widest layer. Measured: from 2 to 12 tiles the speed differs by 3 %; many
// spare the weights' way from L3 or memory, few keep the activations in L2.
constexpr int64_t kBlockBytes = 2 << 20;
constexpr int64_t kMaxBlockTiles = 8;
constexpr int64_t kMostPanels = 4;  // that one call of a micro-kernel takes
constexpr int64_t kRowsApart = 4;
constexpr int64_t kMaxInt8Inputs = 66311;  // 255 * 127 * 66311 < 2^31

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int64_t per_unit(Precision p) { return p == Precision::fp32 ? 1 : p == Precision::bf16 ? 2 : 4; }
int64_t per_chunk(Precision p) { return 16 * per_unit(p); }
Store store_of(Precision p) { return static_cast<Store>(p); }

}  // namespace

Kernels kernels_of(Isa isa) {
    Kernels kernels;
    add_portable_kernels(kernels);
#if defined(__x86_64__)
    if (isa >= Isa::avx2) add_avx2_kernels(kernels);
    if (isa >= Isa::avx512) add_avx512_kernels(kernels);
    if (isa >= Isa::avx512_vnni) add_avx512_vnni_kernels(kernels);
    if (isa >= Isa::avx512_bf16) add_avx512_bf16_kernels(kernels);
#else
    (void)isa;
#endif
    return kernels;
}

Block::Block(size_t bytes) : bytes_(bytes) {
    constexpr int64_t kHuge = int64_t{2} << 20;
    const bool huge = static_cast<int64_t>(bytes) >= kHuge / 4;
    const int64_t align = huge ? kHuge : kLine;
    const size_t whole = static_cast<size_t>(round_up(std::max(static_cast<int64_t>(bytes), align), align));
    void* p = std::aligned_alloc(static_cast<size_t>(align), whole);
    if (p == nullptr) throw std::bad_alloc();
#ifdef __linux__
    if (huge) madvise(p, whole, MADV_HUGEPAGE);  // advice: refused is fine
#endif
    std::memset(p, 0, bytes);
    data_.reset(static_cast<uint8_t*>(p));
}

void Block::Free::operator()(uint8_t* p) const { std::free(p); }

struct PackedTransform::Call {
    RowsView old, side, out;
};

// input_slots[k]: the column of the input tile that holds input k. next: the layer that reads the output, its inputs
// from next_offset on; null for the last.
void PackedTransform::pack_layer(Chain& chain, const LayerSpec& spec, const LayerSpec* next, int64_t next_offset,
                                 Store store, int64_t first_column, const std::vector<int64_t>& input_slots) {
    const int64_t unit = per_unit(spec.precision), chunk = per_chunk(spec.precision);
    const int64_t size = spec.precision == Precision::fp32 ? 4 : spec.precision == Precision::bf16 ? 2 : 1;
    const int64_t out_chunk = store == Store::f32 ? 16 : store == Store::bf16 ? 32 : 64;
    const int64_t columns = round_up(spec.d_out, std::max<int64_t>(kernels_.cols, out_chunk));
    if (spec.precision == Precision::int8 && spec.d_in > kMaxInt8Inputs)
        throw std::invalid_argument("int8: expected at most " + std::to_string(kMaxInt8Inputs) +
                                    " inputs a layer, whose products fit int32, got " + std::to_string(spec.d_in));
    Packed layer;
    layer.chunks = (input_slots.back() + chunk) / chunk;
    layer.panels = columns / kernels_.cols;
    layer.panel_bytes = layer.chunks * 16 * kernels_.cols * 4;
    layer.first_column = first_column;
    layer.weights = Block(static_cast<size_t>(layer.panels * layer.panel_bytes));
    weight_bytes_ += layer.panels * layer.panel_bytes;
    for (int64_t n = 0; n < spec.d_out; ++n) {
        uint8_t* panel = layer.weights.data() + n / kernels_.cols * layer.panel_bytes + n % kernels_.cols * 4;
        for (int64_t k = 0; k < spec.d_in; ++k) {
            const int64_t slot = input_slots[static_cast<size_t>(k)];
            uint8_t* to = panel + slot / unit * kernels_.cols * 4 + slot % unit * size;
            const int64_t from = n * spec.d_in + k;
            if (spec.precision == Precision::fp32) {
                std::memcpy(to, static_cast<const float*>(spec.weight) + from, 4);
            } else if (spec.precision == Precision::bf16) {
                const uint16_t w = to_bf16(static_cast<const float*>(spec.weight)[from]);
                std::memcpy(to, &w, 2);
            } else {
                *to = static_cast<uint8_t>(static_cast<const int8_t*>(spec.weight)[from]);
            }
        }
    }
    // v = sum * scale + bias, and for a next layer in int8 at once its input v * mul + add: relu(v) * mul equals
    // relu(v * mul), since mul > 0, and a layer behind a ReLU has add = 0.
    layer.scale.assign(static_cast<size_t>(columns), 1.0f);
    layer.bias.assign(static_cast<size_t>(columns), 0.0f);
    for (int64_t n = 0; n < spec.d_out; ++n) {
        const double scale = spec.scale ? spec.scale[n] : 1.0;
        const double mul = store == Store::u8 ? next->in_mul[next_offset + n] : 1.0;
        const double add = store == Store::u8 ? next->in_add[next_offset + n] : 0.0;
        layer.scale[static_cast<size_t>(n)] = static_cast<float>(scale * mul);
        layer.bias[static_cast<size_t>(n)] = static_cast<float>(spec.bias[n] * mul + add);
    }
    layer.lowest = spec.relu || store == Store::u8 ? 0.0f : -std::numeric_limits<float>::infinity();
    layer.tile = kernels_.tile[static_cast<int>(spec.precision)][static_cast<int>(store)];
    layer.wide = kernels_.wide[static_cast<int>(spec.precision)][static_cast<int>(store)];
    const int64_t written = (first_column + columns + out_chunk - 1) / out_chunk * kernels_.rows * kLine;
    tile_bytes_ = std::max(tile_bytes_, written);
    chain.layers.push_back(std::move(layer));
}

PackedTransform::PackedTransform(const std::vector<LayerSpec>& old, const std::vector<LayerSpec>& side,
                                 const std::vector<LayerSpec>& mixer, bool normalise, Isa isa)
    : kernels_(kernels_of(isa)), normalise_(normalise) {
    if (old.empty() || side.empty() || mixer.empty()) throw std::invalid_argument("layers: expected one per chain");
    const auto straight = [](int64_t d) {
        std::vector<int64_t> slots(static_cast<size_t>(d));
        for (int64_t k = 0; k < d; ++k) slots[static_cast<size_t>(k)] = k;
        return slots;
    };
    const auto pack_chain = [&](Chain& chain, const std::vector<LayerSpec>& specs, const LayerSpec* after,
                                int64_t after_offset, int64_t after_column, std::vector<int64_t> slots) {
        const LayerSpec& head = specs.front();
        chain.input = store_of(head.precision);
        chain.padded = round_up(head.d_in, per_chunk(head.precision));
        chain.scale.assign(static_cast<size_t>(chain.padded), 0.0f);
        chain.bias.assign(static_cast<size_t>(chain.padded), 0.0f);
        if (head.precision == Precision::int8) {
            std::copy(head.in_mul, head.in_mul + head.d_in, chain.scale.begin());
            std::copy(head.in_add, head.in_add + head.d_in, chain.bias.begin());
        }
        tile_bytes_ = std::max(tile_bytes_, chain.padded / per_chunk(head.precision) * kernels_.rows * kLine);
        scratch_floats_ = std::max(scratch_floats_, chain.padded);
        for (size_t i = 0; i < specs.size(); ++i) {
            const bool last = i + 1 == specs.size();
            const LayerSpec* next = last ? after : &specs[i + 1];
            const Store store = next ? store_of(next->precision) : Store::f32;
            pack_layer(chain, specs[i], next, last ? after_offset : 0, store, last ? after_column : 0, slots);
            slots = straight(specs[i].d_out);
        }
    };
    const LayerSpec& join = mixer.front();
    const int64_t d_a = old.back().d_out, d_b = side.back().d_out;
    const int64_t step = std::max<int64_t>(kernels_.cols, per_chunk(join.precision));
    const int64_t offset = round_up(d_a, step);
    pack_chain(old_, old, &join, 0, 0, straight(old.front().d_in));
    pack_chain(side_, side, &join, d_a, offset, straight(side.front().d_in));
    joined_bytes_ = (offset + round_up(d_b, step)) / per_chunk(join.precision) * kernels_.rows * kLine;
    std::vector<int64_t> slots = straight(d_a);
    for (int64_t k = 0; k < d_b; ++k) slots.push_back(offset + k);
    pack_chain(mixer_, mixer, nullptr, 0, 0, slots);
    d_new_ = mixer.back().d_out;
    scratch_floats_ = std::max(scratch_floats_, d_new_) + 64;
    block_tiles_ = std::min(kMaxBlockTiles, std::max<int64_t>(1, kBlockBytes / (2 * tile_bytes_)));
}

std::unique_ptr<PackedTransform::Workspace> PackedTransform::take() const {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!idle_.empty()) {
            std::unique_ptr<Workspace> w = std::move(idle_.back());
            idle_.pop_back();
            return w;
        }
    }
    auto w = std::make_unique<Workspace>();
    // One piece, since a piece large enough for huge pages is up to 5 % faster in fp32 (measured).
    const int64_t activations = block_tiles_ * tile_bytes_;
    w->all = Block(static_cast<size_t>(2 * activations + block_tiles_ * joined_bytes_ + scratch_floats_ * 4));
    w->a = w->all.data();
    w->b = w->a + activations;
    w->joined = w->b + activations;
    w->scratch = reinterpret_cast<float*>(w->joined + block_tiles_ * joined_bytes_);
    w->phases = std::vector<Shared>(static_cast<size_t>(phases()));
    return w;
}

void PackedTransform::give(std::unique_ptr<Workspace> w) const {
    std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(w));
}

void PackedTransform::pack_input(const Chain& chain, const RowsView& from, int64_t first, int64_t rows, uint8_t* to,
                                 float* scratch) const {
    for (int64_t done = 0; done < rows; done += kernels_.rows, to += tile_bytes_)
        kernels_.pack_tile(from, first + done, static_cast<int>(std::min<int64_t>(kernels_.rows, rows - done)),
                           chain.input, chain.padded, chain.scale.data(), chain.bias.data(), to, scratch);
}

// Panels outside, then runs of inputs, row tiles inside: a panel's weights of one run come from memory once per block
// and stay in the first-level cache while the tiles pass; the block's activations, read once per panel, stay in L2.
void PackedTransform::run_layer(const Packed& layer, const uint8_t* in, uint8_t* out, int64_t rows, int64_t from_panel,
                                int64_t to_panel) const {
    const int64_t in_stride = &layer == &mixer_.layers.front() ? joined_bytes_ : tile_bytes_;
    const bool joins = (&layer == &old_.layers.back() || &layer == &side_.layers.back());
    const int64_t out_stride = joins ? joined_bytes_ : tile_bytes_;
    const auto size_of = [&](int64_t m) {
        int best = kTileSizes - 1;
        for (int i = 0; i < kTileSizes; ++i)
            if (kernels_.size_rows[i] >= m && kernels_.size_rows[i] < kernels_.size_rows[best]) best = i;
        return best;
    };
    const int64_t tiles = (rows + kernels_.rows - 1) / kernels_.rows;
    const int last = size_of(rows - (tiles - 1) * kernels_.rows);
    const int64_t wide = tiles == 1 ? kernels_.size_panels[last] : 1;
    // One tile has nothing to keep weights for: it takes all its inputs in one call.
    const int64_t run = tiles == 1 ? layer.chunks : kRun;
    const int64_t chunk_bytes = kernels_.cols * 4 * 16;
    alignas(kLine) uint8_t sums[kMaxBlockTiles][kMostSums];
    TileArgs t;
    t.panel_bytes = layer.panel_bytes;
    t.lowest = layer.lowest;
    for (int64_t p = from_panel; p < to_panel;) {
        const bool several = p + wide <= to_panel;
        const int64_t step = several ? wide : 1;
        t.scale = layer.scale.data() + p * kernels_.cols;
        t.bias = layer.bias.data() + p * kernels_.cols;
        t.column = layer.first_column + p * kernels_.cols;
        for (int64_t chunk = 0; chunk < layer.chunks; chunk += run) {
            t.begins = chunk == 0;
            t.ends = chunk + run >= layer.chunks;
            t.chunks = t.ends ? layer.chunks - chunk : run;
            t.weights = layer.weights.data() + p * layer.panel_bytes + chunk * chunk_bytes;
            // The weights that follow come to L2 while these are at work: each tile fetches its part.
            const int64_t lines = t.chunks * chunk_bytes / kLine;
            const bool more = !t.ends || p + step < to_panel;
            t.ahead_lines = more ? (chunk_bytes / kLine + tiles - 1) / tiles : 0;
            for (int64_t i = 0; i < tiles; ++i) {
                t.act = in + i * in_stride + chunk * kernels_.rows * kLine;
                t.out = out + i * out_stride;
                t.sums = sums[i];
                const int64_t fetched = i * t.ahead_lines * t.chunks;
                if (fetched >= lines) t.ahead_lines = 0;
                t.ahead = t.weights + (lines + std::min(fetched, lines)) * kLine;
                const int size = i + 1 < tiles ? kTileSizes - 1 : last;
                (several && wide > 1 ? layer.wide : layer.tile)[size](t);
            }
        }
        p += step;
    }
}

// How the work inside a block is divided: not at all, or among workers that each take panels of a layer and wait for
// each other after it. Which way makes no difference to a bit of the result.
struct PackedTransform::Alone {
    template <class Fn>
    void operator()(int64_t count, int64_t, Fn&& fn) {
        fn(0, count);
    }
};

struct PackedTransform::Together {
    Shared* phase;  // one for every step of run_block; each worker walks along them
    int workers;

    template <class Fn>
    void operator()(int64_t count, int64_t step, Fn&& fn) {
        (phase++)->run(count, step, workers, fn);
    }
};

int64_t PackedTransform::phases() const {
    return static_cast<int64_t>(old_.layers.size() + side_.layers.size() + mixer_.layers.size()) + 3;
}

// One block through every layer. `own` is w, or a workspace that no other worker sees: then the branches are not
// divided inside, but each is one worker's.
template <class Divide>
void PackedTransform::run_block(Workspace& own, Workspace& w, const Call& call, int64_t first, int64_t rows,
                                Divide& divide) const {
    const auto layer = [&](auto& divide_layer, const Packed& l, const uint8_t* in, uint8_t* out) {
        divide_layer(l.panels, kMostPanels, [&](int64_t from, int64_t to) { run_layer(l, in, out, rows, from, to); });
    };
    const auto branch = [&](auto& divide_branch, const Chain& chain, const RowsView& from) {
        divide_branch(1, 1, [&](int64_t, int64_t) { pack_input(chain, from, first, rows, own.a, own.scratch); });
        uint8_t *in = own.a, *out = own.b;
        for (size_t i = 0; i + 1 < chain.layers.size(); ++i, std::swap(in, out))
            layer(divide_branch, chain.layers[i], in, out);
        layer(divide_branch, chain.layers.back(), in, w.joined);
    };
    if (&own == &w) {
        branch(divide, old_, call.old);
        branch(divide, side_, call.side);
    } else {
        divide(2, 1, [&](int64_t from, int64_t to) {
            Alone alone;
            if (from == 0) branch(alone, old_, call.old);
            if (to == 2) branch(alone, side_, call.side);
        });
    }
    const uint8_t* in = w.joined;
    uint8_t *out = w.a, *other = w.b;
    for (const Packed& l : mixer_.layers) {
        layer(divide, l, in, out);
        in = out;
        std::swap(out, other);
    }
    divide(1, 1, [&](int64_t, int64_t) {
        for (int64_t done = 0; done < rows; done += kernels_.rows, in += tile_bytes_)
            kernels_.finish_tile(in, call.out, first + done,
                                 static_cast<int>(std::min<int64_t>(kernels_.rows, rows - done)), normalise_,
                                 w.scratch);
    });
}

bool PackedTransform::run(const RowsView& old, const RowsView& side, const RowsView& out, int64_t n, int threads,
                          const KeepGoing& keep_going) const {
    if (n <= 0) return true;
    const Call call{old, side, out};
    const int64_t most = block_tiles_ * kernels_.rows;
    threads = std::max(threads, 1);
    if (n <= most && threads > 1) {  // few rows: all workers on the one block
        int64_t panels = 1;
        for (const Chain* chain : {&old_, &side_, &mixer_})
            for (const Packed& layer : chain->layers) panels = std::max(panels, layer.panels);
        const int workers = static_cast<int>(std::min<int64_t>(threads, (panels + kMostPanels - 1) / kMostPanels));
        // With very few rows a branch costs less than meeting after each of its layers.
        const bool apart = n <= kRowsApart;
        std::vector<std::unique_ptr<Workspace>> spaces;
        for (int i = 0; i <= (apart ? workers : 0); ++i) spaces.push_back(take());
        Workspace& shared = *spaces.back();
        for (Shared& phase : shared.phases) phase.reset();
        parallel(workers, Join::as_awake, [&](int worker) {
            Together together{shared.phases.data(), workers};
            run_block(apart ? *spaces[static_cast<size_t>(worker)] : shared, shared, call, 0, n, together);
        });
        for (auto& w : spaces) give(std::move(w));
        return true;
    }
    // Whole tiles, in blocks that differ by one tile at most, as many for every worker.
    const int64_t tiles = (n + kernels_.rows - 1) / kernels_.rows;
    const int64_t rounds = (tiles + block_tiles_ * threads - 1) / (block_tiles_ * threads);
    const int64_t blocks = std::min(tiles, rounds * threads);
    const int workers = static_cast<int>(std::min<int64_t>(threads, blocks));
    std::vector<std::unique_ptr<Workspace>> spaces;
    for (int i = 0; i < workers; ++i) spaces.push_back(take());
    std::atomic<int64_t> next{0};
    std::atomic<bool> stop{false};
    parallel(workers, Join::as_awake, [&](int worker) {
        using Clock = std::chrono::steady_clock;
        Clock::time_point asked = Clock::now();
        for (;;) {
            const int64_t block = next.fetch_add(1);
            if (block >= blocks || stop.load(std::memory_order_relaxed)) break;
            const int64_t first = tiles * block / blocks * kernels_.rows;
            const int64_t end = std::min(n, tiles * (block + 1) / blocks * kernels_.rows);
            Workspace& own = *spaces[static_cast<size_t>(worker)];
            Alone alone;
            run_block(own, own, call, first, end - first, alone);
            if (worker == 0 && keep_going.ask != nullptr && Clock::now() - asked > std::chrono::milliseconds(100)) {
                const double share = static_cast<double>(std::min(next.load(), blocks)) / static_cast<double>(blocks);
                if (!keep_going.ask(keep_going.context, share)) stop.store(true);
                asked = Clock::now();
            }
        }
    });
    for (auto& w : spaces) give(std::move(w));
    return !stop.load();
}

uint64_t PackedTransform::read_weights(int threads) const {
    std::atomic<uint64_t> total{0};
    parallel(threads, Join::all, [&](int worker) {
        uint64_t sum = 0;
        for (const Chain* chain : {&old_, &side_, &mixer_})
            for (const Packed& layer : chain->layers) {
                const int64_t from = layer.panels * worker / threads, to = layer.panels * (worker + 1) / threads;
                sum += read_all(layer.weights.data() + from * layer.panel_bytes, (to - from) * layer.panel_bytes);
            }
        total += sum;
    });
    return total.load();
}

}  // namespace fct::cpu
