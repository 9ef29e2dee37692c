// The fused transformation: every layer of a block of rows while the block's activations stay in cache.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/isa.h"
#include "cpu/threads.h"
#include "cpu/transform_tiles.h"

namespace fct::cpu {

// One layer, relu(x @ weight.T * scale + bias). The addresses need to live through packing only.
struct LayerSpec {
    const void* weight;   // (d_out, d_in) row-major: float for fp32 and bf16, int8 for int8
    const float* scale;   // (d_out) for int8, else null
    const float* bias;    // (d_out); for int8 with the inputs' zero points already taken off
    const float* in_mul;  // (d_in) for int8: the input x enters as round(x * in_mul + in_add), cut to [0, 255]
    const float* in_add;
    int64_t d_in;
    int64_t d_out;
    bool relu;
    Precision precision;
};

// Memory for packed weights and activations: 64-byte aligned, zeroed, in huge pages where the system gives them.
class Block {
  public:
    Block() = default;
    explicit Block(size_t bytes);
    uint8_t* data() const { return data_.get(); }
    size_t bytes() const { return bytes_; }

  private:
    struct Free {
        void operator()(uint8_t* p) const;
    };
    std::unique_ptr<uint8_t, Free> data_;
    size_t bytes_ = 0;
};

// Weights in the kernels' layout, and the memory of calls in flight. Made once per (h, precision); run is const and
// may be called from several threads at once.
class PackedTransform {
  public:
    // The mixer reads the old chain's output and the side chain's, side by side. Throws std::invalid_argument where a
    // layer does not fit (int8 with more than 66,311 inputs), std::bad_alloc.
    PackedTransform(const std::vector<LayerSpec>& old, const std::vector<LayerSpec>& side,
                    const std::vector<LayerSpec>& mixer, bool normalise, Isa isa);

    // n rows of old and side -> n rows of out. Returns false when keep_going said stop: out is then part-filled.
    bool run(const RowsView& old, const RowsView& side, const RowsView& out, int64_t n, int threads,
             const KeepGoing& keep_going) const;

    // Reads every packed weight once on `threads` threads; returns the sum of the words, which nobody needs. The
    // time it takes bounds a single row's from below.
    uint64_t read_weights(int threads) const;

    int64_t weight_bytes() const { return weight_bytes_; }
    int rows_per_block() const { return static_cast<int>(block_tiles_) * kernels_.rows; }

  private:
    struct Packed {
        Block weights;
        std::vector<float> scale, bias;
        const TileFn* tile;
        const TileFn* wide;
        int64_t chunks, panels, panel_bytes;
        int64_t first_column;  // where in the output tile this layer's first column goes
        float lowest;
    };
    struct Chain {
        std::vector<Packed> layers;
        Store input = Store::f32;
        int64_t padded = 0;              // columns of the packed input
        std::vector<float> scale, bias;  // of the input's quantisation
    };
    struct Workspace {
        Block all;
        uint8_t *a, *b, *joined;  // a block's activations, by turns, and the branches' outputs side by side
        float* scratch;
        std::vector<Shared> phases;
    };
    struct Call;
    struct Alone;
    struct Together;

    void pack_layer(Chain& chain, const LayerSpec& spec, const LayerSpec* next, int64_t next_offset, Store store,
                    int64_t first_column, const std::vector<int64_t>& input_slots);
    void pack_input(const Chain& chain, const RowsView& from, int64_t first, int64_t rows, uint8_t* to,
                    float* scratch) const;
    void run_layer(const Packed& layer, const uint8_t* in, uint8_t* out, int64_t rows, int64_t from_panel,
                   int64_t to_panel) const;
    template <class Divide>
    void run_block(Workspace& own, Workspace& w, const Call& call, int64_t first, int64_t rows, Divide& divide) const;
    int64_t phases() const;
    std::unique_ptr<Workspace> take() const;
    void give(std::unique_ptr<Workspace> w) const;

    Kernels kernels_;
    Chain old_, side_, mixer_;
    bool normalise_;
    int64_t d_new_ = 0, weight_bytes_ = 0;
    int64_t tile_bytes_ = 0, joined_bytes_ = 0, scratch_floats_ = 0, block_tiles_ = 1;
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Workspace>> idle_;
};

// The kernels of a level, those below it filling what it does not bring itself.
Kernels kernels_of(Isa isa);

}  // namespace fct::cpu
