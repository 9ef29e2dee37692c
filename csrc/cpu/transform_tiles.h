// What the fused transformation asks of an instruction set: plain types and a table of functions, no code.
#pragma once
#include <cstdint>

#include "cpu/rows.h"

namespace fct::cpu {

enum class Precision : int { fp32 = kFp32, bf16 = kBf16, int8 = kInt8Layer, int16 = kInt16Layer };
constexpr int kPrecisions = kPrecisionCount;

// What activations are kept as: the next layer's operand type. s16 comes from rows alone, never from a layer.
enum class Store : int { f32 = 0, bf16 = 1, u8 = 2, s16 = 3 };
constexpr int kStores = 4;
constexpr int kMostInt16 = 4095;  // the largest s16 operand, so that sums of products fit int32
constexpr int kTileSizes = 5;

// fp32 sums are kept in two levels: runs of so many chunks of 64 bytes (256 floats, 512 bf16), and the sum of the
// runs. A run's weights are also what stays in the first-level cache while several row tiles pass by.
constexpr int64_t kRun = 16;
constexpr int64_t kMostSums = 2048;  // bytes of accumulators in one call of a micro-kernel

// A matrix of the caller: n rows of d elements, stride elements from row to row. i8 rows have
// scale[row * scale_row + column * scale_column]; others a null scale.
struct RowsView {
    void* data = nullptr;
    DType dtype = DType::f32;
    int64_t d = 0;
    int64_t stride = 0;
    const float* scale = nullptr;
    int64_t scale_row = 0;
    int64_t scale_column = 0;
    const float* offset = nullptr;  // added to i8 times scale, indexed likewise; null for nothing
    int64_t offset_row = 0;
    int64_t offset_column = 0;
};

struct TileArgs {
    const uint8_t* act;      // one row tile of activations
    const uint8_t* weights;  // first panel
    const float* scale;      // per column of the first panel on; null where nothing is scaled
    const float* bias;
    const uint8_t* added;  // f32 tile of the same columns that is added to the output; null for none
    uint8_t* out;          // the row tile written
    uint8_t* sums;         // of this tile and panel, from one call to the next; unused where one call takes all chunks
    int64_t chunks;        // of this call; a multiple of kRun but in the last call
    bool begins;           // the first call for this tile and panel
    bool ends;             // the last one: the epilogue follows
    int64_t panel_bytes;
    int64_t column;       // where in the tile written the first column goes
    float lowest;         // 0 for a ReLU and for u8, else -infinity
    int64_t ahead_lines;  // 64-byte lines of the next panel to be fetched per chunk
    const uint8_t* ahead;
};

using TileFn = void (*)(const TileArgs&);

struct Kernels {
    int rows = 0;  // of a tile
    int cols = 0;  // of a panel
    int size_rows[kTileSizes] = {};
    int size_panels[kTileSizes] = {};
    TileFn tile[kPrecisions][kStores][kTileSizes] = {};  // one panel
    TileFn wide[kPrecisions][kStores][kTileSizes] = {};  // size_panels panels at once
    void (*pack_tile)(const RowsView& from, int64_t first, int rows, Store store, int64_t column, int64_t padded,
                      const float* scale, const float* bias, uint8_t* out) = nullptr;
    void (*finish_tile)(const uint8_t* tile, const RowsView& to, int64_t first, int rows, float length) = nullptr;
    double (*peak[kPrecisions])(int64_t rounds) = {};  // returns operations done
};

// Each fills the table with what its set does best, over what is there already.
void add_portable_kernels(Kernels& kernels);
void add_avx2_kernels(Kernels& kernels);
void add_avx512_kernels(Kernels& kernels);
void add_avx512_vnni_kernels(Kernels& kernels);
void add_avx512_bf16_kernels(Kernels& kernels);

}  // namespace fct::cpu
