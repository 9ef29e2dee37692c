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

constexpr int64_t kMaxBlockTiles = 8;
constexpr int64_t kMostPanels = 4;  // that one call of a micro-kernel takes

// One layer, relu(x @ weight.T * scale + bias). The addresses need to live through packing only.
struct LayerSpec {
    const void* weight;   // (d_out, d_in) row-major: float for fp32 and bf16, int8, int16
    const float* scale;   // (d_out) for the integers, else null
    const float* bias;    // (d_out); for the integers with the inputs' zero points already taken off
    const float* in_mul;  // (d_in) for the integers: the input x enters as round(x * in_mul + in_add), cut to
    const float* in_add;  // [0, 255] (int8) or [-kMostInt16, kMostInt16] (int16)
    int64_t d_in;
    int64_t d_out;
    bool relu;
    Precision precision;
};

// h: the mixer reads the old chain's output and the side chain's, side by side; the skip, where there is one, is a
// linear layer on the rows themselves, old and side side by side, and is added to the mixer's output.
struct NetworkSpec {
    std::vector<LayerSpec> old, side, mixer;
    std::vector<LayerSpec> skip;  // none or one
    bool side_is_old = false;     // no side-information: the side chain reads the old rows, and the skip them alone
    float length = 0.0f;          // what outputs are brought to; 0: they are left as they are
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
    // Throws std::invalid_argument where a layer does not fit (integer sums that could pass int32; first layers and
    // skip of different precisions), std::bad_alloc.
    PackedTransform(const NetworkSpec& spec, Isa isa);

    // n rows of old and side -> n rows of out. Returns false when keep_going said stop: out is then part-filled.
    bool run(const RowsView& old, const RowsView& side, const RowsView& out, int64_t n, int threads,
             const KeepGoing& keep_going) const;

    // Reads every packed weight once on `threads` threads; returns the sum of the words, which nobody needs. The
    // time it takes bounds a single row's from below.
    uint64_t read_weights(int threads) const;

    int64_t weight_bytes() const { return weight_bytes_; }
    int rows_per_block() const { return static_cast<int>(block_tiles_) * kernels_.rows; }

  private:
    struct Band {
        int64_t begin, end;  // chunks
    };
    struct Packed {
        Block weights;
        // Of each kMostPanels panels, the chunks outside which every weight is 0: those of a composed h mostly are.
        std::vector<Band> bands;
        std::vector<float> scale, bias;
        const TileFn* tile;
        const TileFn* wide;
        int64_t chunks, panels, panel_bytes;
        int64_t in_bytes = 0;      // where in the tile it reads its first input lies
        int64_t first_column = 0;  // where in the tile it writes its first column goes
        int64_t in_stride = 0, out_stride = 0;
        float lowest;
        bool adds = false;  // what the skip left is added to the output
    };
    // The rows as the first layers and the skip read them: a run of whole chunks of the old row, one of the side row.
    struct Input {
        Store store = Store::f32;
        int64_t old_padded = 0, side_padded = 0;  // columns
        std::vector<float> scale, bias;           // of the quantisation, old's columns first
    };
    // A block's activations, tile by tile: the packed rows; those of the layers, by turns; the branches' outputs side
    // by side; what the skip leaves.
    struct Workspace {
        Block all;
        uint8_t *input, *a, *b, *joined, *skip;
        std::vector<Shared> phases;
    };
    struct Call;
    struct Alone;
    struct Together;

    void pack_input_layout(const NetworkSpec& spec);
    void pack_chain(std::vector<Packed>& chain, const std::vector<LayerSpec>& specs, int64_t in_bytes,
                    std::vector<int64_t> slots, const LayerSpec* after, int64_t after_offset, int64_t after_column);
    Packed pack_layer(const LayerSpec& spec, const std::vector<int64_t>& input_slots, const LayerSpec* next,
                      int64_t next_offset, Store store, int64_t first_column);
    void pack_weights(Packed& layer, const LayerSpec& spec, const std::vector<int64_t>& input_slots) const;
    void find_bands(Packed& layer) const;
    void set_strides();
    std::vector<const Packed*> layers() const;

    void pack_rows(const RowsView& from, bool side, int64_t first, int64_t rows, uint8_t* to) const;
    void run_layer(const Packed& layer, const uint8_t* in, uint8_t* out, const uint8_t* skip, int64_t rows,
                   int64_t from_panel, int64_t to_panel) const;
    void run_branch(const std::vector<Packed>& chain, const uint8_t* input, Workspace& own, uint8_t* joined,
                    int64_t rows) const;
    template <class Divide>
    void run_branches(Workspace& own, Workspace& w, const Call& call, int64_t first, int64_t rows,
                      Divide& divide) const;
    template <class Divide>
    void run_block(Workspace& own, Workspace& w, const Call& call, int64_t first, int64_t rows, Divide& divide) const;
    void run_few(const Call& call, int64_t n, int threads) const;
    int64_t phases() const;
    std::unique_ptr<Workspace> take() const;
    void give(std::unique_ptr<Workspace> w) const;

    Kernels kernels_;
    Input input_;
    std::vector<Packed> old_, side_, mixer_, skip_;
    bool side_is_old_;
    float length_;
    int64_t d_new_ = 0, weight_bytes_ = 0;
    int64_t input_bytes_ = 0, tile_bytes_ = 0, joined_bytes_ = 0, skip_bytes_ = 0, block_tiles_ = 1;
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Workspace>> idle_;
};

// The kernels of a level, those below it filling what it does not bring itself.
Kernels kernels_of(Isa isa);

}  // namespace fct::cpu
