// Rows through the packed layers, on one thread or several.
#include "cpu/transform.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "cpu/peaks.h"

namespace fct::cpu {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kRowsApart = 4;
// Rows for which it pays that every worker reads all weights: near ones from its own second-level cache, far ones from
// beyond it. With fewer rows, or weights that the workers had better read once, all share one block, layer by layer.
constexpr int64_t kRowsEachNear = 4, kRowsEachFar = 8;
constexpr int64_t kNearBytes = 1 << 20, kFarBytes = 8 << 20;
// Weights that one worker has read by the time that two would have met after every layer.
constexpr int64_t kAloneBytes = 384 << 10;

}  // namespace

struct PackedTransform::Call {
    RowsView old, side, out;
};

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
    const int64_t per_tile = input_bytes_ + 2 * tile_bytes_ + joined_bytes_ + skip_bytes_;
    w->all = Block(static_cast<size_t>(block_tiles_ * per_tile));
    w->input = w->all.data();
    w->a = w->input + block_tiles_ * input_bytes_;
    w->b = w->a + block_tiles_ * tile_bytes_;
    w->joined = w->b + block_tiles_ * tile_bytes_;
    w->skip = w->joined + block_tiles_ * joined_bytes_;
    w->phases = std::vector<Shared>(static_cast<size_t>(phases()));
    return w;
}

void PackedTransform::give(std::unique_ptr<Workspace> w) const {
    std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(w));
}

// The caller's rows, old's or the side-information's, into their part of the input tiles.
void PackedTransform::pack_rows(const RowsView& from, bool side, int64_t first, int64_t rows, uint8_t* to) const {
    const int64_t column = side ? input_.old_padded : 0, padded = side ? input_.side_padded : input_.old_padded;
    for (int64_t done = 0; done < rows; done += kernels_.rows, to += input_bytes_)
        kernels_.pack_tile(from, first + done, static_cast<int>(std::min<int64_t>(kernels_.rows, rows - done)),
                           input_.store, column, padded, input_.scale.data(), input_.bias.data(), to);
}

// Panels outside, then runs of inputs, row tiles inside: a panel's weights of one run come from memory once per block
// and stay in the first-level cache while the tiles pass; the block's activations, read once per panel, stay in L2.
void PackedTransform::run_layer(const Packed& layer, const uint8_t* in, uint8_t* out, const uint8_t* skip, int64_t rows,
                                int64_t from_panel, int64_t to_panel) const {
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
    // Panels that a call takes together have one band, whoever calls, so that runs begin where they always do.
    const int64_t chunk_bytes = kernels_.cols * 4 * 16;
    alignas(kLine) uint8_t sums[kMaxBlockTiles][kMostSums];
    TileArgs t;
    t.panel_bytes = layer.panel_bytes;
    t.lowest = layer.lowest;
    const auto band_of = [&](int64_t panel) { return layer.bands[static_cast<size_t>(panel / kMostPanels)]; };
    const auto weights_at = [&](int64_t panel, int64_t chunk) {
        return layer.weights.data() + panel * layer.panel_bytes + chunk * chunk_bytes;
    };
    for (int64_t p = from_panel; p < to_panel;) {
        const bool several = p + wide <= to_panel;
        const int64_t step = several ? wide : 1;
        t.scale = layer.scale.data() + p * kernels_.cols;
        t.bias = layer.bias.data() + p * kernels_.cols;
        t.column = layer.first_column + p * kernels_.cols;
        const Band band = band_of(p);
        for (int64_t chunk = band.begin; chunk < band.end; chunk += run) {
            t.begins = chunk == band.begin;
            t.ends = chunk + run >= band.end;
            t.chunks = t.ends ? band.end - chunk : run;
            t.weights = weights_at(p, chunk);
            // The weights that follow come to L2 while these are at work: each tile fetches its part.
            const int64_t lines = t.chunks * chunk_bytes / kLine;
            const bool more = !t.ends || p + step < to_panel;
            t.ahead_lines = more ? (chunk_bytes / kLine + tiles - 1) / tiles : 0;
            const uint8_t* next = t.weights + lines * kLine;
            if (t.ends && more) next = weights_at(p + step, band_of(p + step).begin);
            for (int64_t i = 0; i < tiles; ++i) {
                t.act = in + layer.in_bytes + i * layer.in_stride + chunk * kernels_.rows * kLine;
                t.out = out + i * layer.out_stride;
                t.added = layer.adds ? skip + i * skip_bytes_ : nullptr;
                t.sums = sums[i];
                const int64_t fetched = i * t.ahead_lines * t.chunks;
                if (fetched >= lines) t.ahead_lines = 0;
                t.ahead = next + std::min(fetched, lines) * kLine;
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

int64_t PackedTransform::phases() const { return static_cast<int64_t>(layers().size()) + 3; }

// One branch by one worker: out of the packed rows, into its part of the joined tiles.
void PackedTransform::run_branch(const std::vector<Packed>& chain, const uint8_t* input, Workspace& own,
                                 uint8_t* joined, int64_t rows) const {
    const uint8_t* in = input;
    uint8_t *out = own.a, *other = own.b;
    for (const Packed& layer : chain) {
        run_layer(layer, in, &layer == &chain.back() ? joined : out, nullptr, rows, 0, layer.panels);
        in = out;
        std::swap(out, other);
    }
}

// Packs the rows and runs both branches. With a workspace of the worker's own (`own` is not `w`) each branch is one
// worker's: with very few rows a branch costs less than meeting after each of its layers.
template <class Divide>
void PackedTransform::run_branches(Workspace& own, Workspace& w, const Call& call, int64_t first, int64_t rows,
                                   Divide& divide) const {
    if (&own != &w) {
        divide(2, 1, [&](int64_t from, int64_t to) {
            if (from == 0) {
                pack_rows(call.old, false, first, rows, w.input);
                run_branch(old_, w.input, own, w.joined, rows);
            }
            if (to == 2) {
                uint8_t* input = side_is_old_ ? own.input : w.input;
                pack_rows(call.side, !side_is_old_, first, rows, input);
                run_branch(side_, input, own, w.joined, rows);
            }
        });
        return;
    }
    const int64_t tiles = (rows + kernels_.rows - 1) / kernels_.rows;
    divide(tiles, 1, [&](int64_t from, int64_t to) {
        const int64_t done = from * kernels_.rows, count = std::min(rows, to * kernels_.rows) - done;
        uint8_t* input = w.input + from * input_bytes_;
        pack_rows(call.old, false, first + done, count, input);
        if (!side_is_old_) pack_rows(call.side, true, first + done, count, input);
    });
    for (const std::vector<Packed>* chain : {&old_, &side_}) {
        const uint8_t* in = w.input;
        uint8_t *out = w.a, *other = w.b;
        for (const Packed& l : *chain) {
            uint8_t* to = &l == &chain->back() ? w.joined : out;
            divide(l.panels, kMostPanels,
                   [&](int64_t from, int64_t end) { run_layer(l, in, to, nullptr, rows, from, end); });
            in = out;
            std::swap(out, other);
        }
    }
}

// One block through every layer.
template <class Divide>
void PackedTransform::run_block(Workspace& own, Workspace& w, const Call& call, int64_t first, int64_t rows,
                                Divide& divide) const {
    run_branches(own, w, call, first, rows, divide);
    for (const Packed& l : skip_)
        divide(l.panels, kMostPanels,
               [&](int64_t from, int64_t to) { run_layer(l, w.input, w.skip, nullptr, rows, from, to); });
    const uint8_t* in = w.joined;
    uint8_t *out = w.a, *other = w.b;
    for (const Packed& l : mixer_) {
        divide(l.panels, kMostPanels, [&](int64_t from, int64_t to) { run_layer(l, in, out, w.skip, rows, from, to); });
        in = out;
        std::swap(out, other);
    }
    const int64_t tiles = (rows + kernels_.rows - 1) / kernels_.rows;
    divide(tiles, 1, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i)
            kernels_.finish_tile(in + i * tile_bytes_, call.out, first + i * kernels_.rows,
                                 static_cast<int>(std::min<int64_t>(kernels_.rows, rows - i * kernels_.rows)), length_);
    });
}

// All workers on the one block.
void PackedTransform::run_few(const Call& call, int64_t n, int threads) const {
    int64_t panels = 1;
    for (const Packed* layer : layers()) panels = std::max(panels, layer->panels);
    const int workers = static_cast<int>(std::min<int64_t>(threads, (panels + kMostPanels - 1) / kMostPanels));
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
}

bool PackedTransform::run(const RowsView& old, const RowsView& side, const RowsView& out, int64_t n, int threads,
                          const KeepGoing& keep_going) const {
    if (n <= 0) return true;
    const Call call{old, side, out};
    threads = std::max(threads, 1);
    const int64_t each = weight_bytes_ <= kNearBytes ? kRowsEachNear : kRowsEachFar;
    const bool few = weight_bytes_ > kFarBytes ? n <= block_tiles_ * kernels_.rows : n < 2 * each;
    if (threads > 1 && few && weight_bytes_ > kAloneBytes) {
        run_few(call, n, threads);
        return true;
    }
    // As many blocks for every worker. Several each: whole tiles, blocks that differ by one tile at most. One each: as
    // many rows for everybody, since a last tile costs what its rows do.
    const int64_t tiles = (n + kernels_.rows - 1) / kernels_.rows;
    const int64_t rounds = (tiles + block_tiles_ * threads - 1) / (block_tiles_ * threads);
    const bool several = rounds > 1;
    const int64_t units = several ? tiles : n, unit = several ? kernels_.rows : 1;
    const int64_t fewest = (tiles + block_tiles_ - 1) / block_tiles_;  // that hold them
    const int64_t blocks =
        several ? std::min(tiles, rounds * threads) : std::max(fewest, std::min<int64_t>(threads, n / each));
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
            const int64_t first = units * block / blocks * unit;
            const int64_t end = std::min(n, units * (block + 1) / blocks * unit);
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
        for (const Packed* layer : layers()) {
            const int64_t from = layer->panels * worker / threads, to = layer->panels * (worker + 1) / threads;
            sum += read_all(layer->weights.data() + from * layer->panel_bytes, (to - from) * layer->panel_bytes);
        }
        total += sum;
    });
    return total.load();
}

}  // namespace fct::cpu
