// The transformation h on a GPU, in bf16 with fp32 accumulation.
//
// Small batches (1 to 256 rows, query time): one cooperative launch for the whole h. The weights stream once through
// L2 into shared memory, all blocks share each layer's output columns, and a grid-wide barrier parts the layers.
//   convert inputs to bf16 | old.0, side.0 | old.1, side.1 | mixer.0 | mixer.1 | mixer.2 | length, cast
// Large batches: convert_rows, cuBLASLt's matrix products with bias and ReLU in their epilogues, finish_rows.
//
// Layouts: weights (d_out, pitch) bf16, pitch = d_in rounded up to 64 and zero there; activations (rows, pitch) bf16,
// zero in the padding; the last layer's output (rows, pitch) fp32.
//
// The skip, a linear layer on the rows that is added to the output, is more depth of the last layer: that one reads
// [activations | old row | side row] by [its weights | the skip's], so the sum stays in the fp32 accumulator and is
// never rounded. The rows are converted right there, and the branches read them there.
//
// The layers that read the gallery's rows multiply almost as fp32 does ("split"): row and weight are two bf16 parts,
// high and low, and high * high + low * high + high * low is one product of three times the depth, rows as
// [high | low | high] and weights as [high | high | low], each part padded to 64.
#pragma once
#include "rows.cuh"

namespace fct::cuda {

constexpr int kLayerChunk = 64;               // bf16 elements of a row per pipeline stage
constexpr int kLayerPitch = kLayerChunk + 8;  // in shared memory: free of ldmatrix conflicts
constexpr int kLayerColumns = 16;             // output columns per unit of work
constexpr int kLayerStages = 6;
constexpr int kLayerThreads = 128;
constexpr int kMaxLayers = 16;
constexpr int kMaxPhases = 12;
constexpr int kMaxSmallRows = 256;

// y = relu(x w^T + bias) over all rows.
struct LayerArgs {
    const bf16* x;  // (rows, x_pitch)
    int64_t x_pitch;
    const bf16* weight;  // (d_out, pitch)
    int pitch;
    const float* bias;  // (d_out,)
    int d_out;
    bool relu;
    bf16* y;  // (rows, y_pitch), already at its first column; null for the last layer
    int64_t y_pitch;
    float* y_last;  // (rows, y_pitch), the last layer's output
};

// The ends of h: where rows come from, where they lie as bf16, where the last layer leaves its output, and where it
// goes.
struct RowArgs {
    Rows old_rows, side_rows, out;
    bf16 *old_bf16, *side_bf16;  // (kMaxSmallRows, pitch); side null: it is old's
    int64_t old_pitch, side_pitch;
    const float* last;  // (kMaxSmallRows, last_pitch), the last layer's output
    int64_t last_pitch;
    float length;
    bool split;
};

struct SmallArgs : RowArgs {
    int n_phases;
    int first_layer[kMaxPhases + 1];  // phase p computes layers first_layer[p] to first_layer[p + 1] - 1
    LayerArgs layers[kMaxLayers];
    unsigned* barrier;  // two words: arrived, generation; zero before the first launch, left at zero arrivals
};

// One warp: rows[row] -> bf16, zero up to the next 64; split: three such parts.
GPU_INLINE void convert_row(const Rows& rows, int64_t row, bf16* dst, bool split) {
    const int64_t part = (rows.d + kLayerChunk - 1) / kLayerChunk * kLayerChunk;
    for (int64_t j = threadIdx.x % 32; j < part; j += 32) {
        const float x = j < rows.d ? load_element(rows, row, j) : 0.0f;
        const bf16 high = float_to_bf16(x);
        dst[j] = high;
        if (split) {
            dst[part + j] = float_to_bf16(x - bf16_to_float(high));
            dst[2 * part + j] = high;
        }
    }
}

// One warp: a row of the side-information or of the old embeddings to where the first layers read it.
GPU_INLINE void convert_input(const RowArgs& args, int64_t row, bool side) {
    if (side)
        convert_row(args.side_rows, row, args.side_bf16 + row * args.side_pitch, args.split);
    else
        convert_row(args.old_rows, row, args.old_bf16 + row * args.old_pitch, args.split);
}

// One warp: fp32 row -> brought to the length, unless that is 0 -> the output's dtype. A zero row stays zero.
GPU_INLINE void finish_row(const float* src, const Rows& out, int64_t row, float length) {
    const int lane = threadIdx.x % 32;
    float divisor = 1.0f, factor = 1.0f;
    if (length > 0.0f) {
        float largest = 0.0f, sum = 0.0f;
        for (int64_t j = lane; j < out.d; j += 32) largest = fmaxf(largest, fabsf(src[j]));
        largest = warp_max(largest);
        for (int64_t j = lane; j < out.d; j += 32) {
            const float x = largest > 0.0f ? src[j] / largest : 0.0f;
            sum = fmaf(x, x, sum);
        }
        const float norm = largest * sqrtf(warp_sum(sum));
        divisor = norm > 0.0f ? norm : 1.0f;
        factor = length;
    }
    for (int64_t j = lane; j < out.d; j += 32) store_element(out, row, j, src[j] / divisor * factor);
}

// Every block waits here until all have come. Needs a cooperative launch.
GPU_INLINE void grid_barrier(unsigned* state) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned generation = load_acquire(state + 1);
        if (atomicAdd(state, 1u) == gridDim.x - 1) {
            atomicExch(state, 0u);
            __threadfence();
            atomicAdd(state + 1, 1u);
        } else {
            while (load_acquire(state + 1) == generation) __nanosleep(32);
        }
        __threadfence();
    }
    __syncthreads();
}

// One unit: 16 * kWarpsM rows x 16 columns of one layer. kWarpsM warps lie along the rows; the others halve or quarter
// the sum over the inputs, which is what keeps a single query from waiting on one warp.
template <int kWarpsM>
struct LayerShape {
    static constexpr int kRows = 16 * kWarpsM;
    static constexpr int kWarpsK = 4 / kWarpsM;
    static constexpr size_t smem = static_cast<size_t>(kLayerStages) * (kRows + kLayerColumns) * kLayerPitch * 2 +
                                   static_cast<size_t>(kWarpsK) * kRows * kLayerColumns * 4;
};

template <int kWarpsM>
GPU_INLINE void layer_unit(const LayerArgs& layer, int rows, int row0, int column0, bf16* xs, bf16* ws,
                           float* partial) {
    using Shape = LayerShape<kWarpsM>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_m = warp % kWarpsM, warp_k = warp / kWarpsM;
    const int chunks = layer.pitch / kLayerChunk;
    auto load = [&](int chunk) {
        const int stage = chunk % kLayerStages;
        for (int i = threadIdx.x; i < (Shape::kRows + kLayerColumns) * 8; i += kLayerThreads) {
            const int r = i / 8, offset = i % 8 * 8;
            if (r < kLayerColumns) {
                const bool real = column0 + r < layer.d_out;
                cp_async16(ws + (stage * kLayerColumns + r) * kLayerPitch + offset,
                           layer.weight + static_cast<int64_t>(real ? column0 + r : 0) * layer.pitch +
                               chunk * kLayerChunk + offset,
                           real ? 16 : 0);
            } else {
                const int row = r - kLayerColumns;
                const bool real = row0 + row < rows;
                cp_async16(xs + (stage * Shape::kRows + row) * kLayerPitch + offset,
                           layer.x + (real ? row0 + row : 0) * layer.x_pitch + chunk * kLayerChunk + offset,
                           real ? 16 : 0);
            }
        }
    };
    for (int s = 0; s < kLayerStages - 1; ++s) {
        if (s < chunks) load(s);
        cp_async_commit();
    }
    float acc[2][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
        cp_async_wait<kLayerStages - 2>();
        __syncthreads();  // this stage is there for all; the one that is loaded next has been read by all
        if (chunk + kLayerStages - 1 < chunks) load(chunk + kLayerStages - 1);
        cp_async_commit();
        const int stage = chunk % kLayerStages;
        const bf16* x = xs + (stage * Shape::kRows + warp_m * 16) * kLayerPitch;
        const bf16* w = ws + stage * kLayerColumns * kLayerPitch;
#pragma unroll
        for (int k = 0; k < kLayerChunk / 16; k += Shape::kWarpsK) {
            const int at = (k + warp_k) * 16;
            uint32_t a[4], b[4];
            ldmatrix_x4(a, x + lane % 16 * kLayerPitch + at + lane / 16 * 8);
            ldmatrix_x4(b, w + (lane % 8 + lane / 16 * 8) * kLayerPitch + at + lane / 8 % 2 * 8);
            mma_bf16_16816(acc[0], a, b[0], b[1]);
            mma_bf16_16816(acc[1], a, b[2], b[3]);
        }
    }
    cp_async_wait<0>();
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int r = warp_m * 16 + lane / 4 + e / 2 * 8, c = j * 8 + lane % 4 * 2 + e % 2;
            partial[(warp_k * Shape::kRows + r) * kLayerColumns + c] = acc[j][e];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < Shape::kRows * kLayerColumns; i += kLayerThreads) {
        const int row = row0 + i / kLayerColumns, column = column0 + i % kLayerColumns;
        if (row >= rows || column >= layer.d_out) continue;
        float sum = layer.bias[column];
#pragma unroll
        for (int k = 0; k < Shape::kWarpsK; ++k) sum += partial[k * Shape::kRows * kLayerColumns + i];
        if (layer.relu) sum = fmaxf(sum, 0.0f);
        if (layer.y)
            layer.y[row * layer.y_pitch + column] = float_to_bf16(sum);
        else
            layer.y_last[row * layer.y_pitch + column] = sum;
    }
    // No barrier: the next unit loads where all have read, and has passed one before it writes to partial.
}

template <int kWarpsM>
__global__ void __launch_bounds__(kLayerThreads, 2) transform_small(const SmallArgs args) {
    using Shape = LayerShape<kWarpsM>;
    GPU_DYN_SMEM(smem);
    SmemCarver carve(smem);
    bf16* xs = carve.take<bf16>(kLayerStages * Shape::kRows * kLayerPitch);
    bf16* ws = carve.take<bf16>(kLayerStages * kLayerColumns * kLayerPitch);
    float* partial = carve.take<float>(Shape::kWarpsK * Shape::kRows * kLayerColumns);
    const int rows = static_cast<int>(args.out.n);
    const int warp = blockIdx.x * (kLayerThreads / 32) + threadIdx.x / 32, warps = gridDim.x * (kLayerThreads / 32);
    for (int i = warp; i < (args.side_bf16 ? 2 : 1) * rows; i += warps)
        convert_input(args, i < rows ? i : i - rows, i >= rows);
    grid_barrier(args.barrier);
    const int row_blocks = (rows + Shape::kRows - 1) / Shape::kRows;
    for (int phase = 0; phase < args.n_phases; ++phase) {
        int unit0 = 0;  // of this layer, within the phase
        for (int l = args.first_layer[phase]; l < args.first_layer[phase + 1]; ++l) {
            const LayerArgs layer = args.layers[l];
            const int units = (layer.d_out + kLayerColumns - 1) / kLayerColumns * row_blocks;
            // Units are dealt to blocks across all layers of the phase.
            int unit = static_cast<int>((blockIdx.x + gridDim.x - unit0 % gridDim.x) % gridDim.x);
            for (; unit < units; unit += gridDim.x)
                layer_unit<kWarpsM>(layer, rows, unit % row_blocks * Shape::kRows, unit / row_blocks * kLayerColumns,
                                    xs, ws, partial);
            unit0 += units;
        }
        grid_barrier(args.barrier);
    }
    for (int i = warp; i < rows; i += warps) finish_row(args.last + i * args.last_pitch, args.out, i, args.length);
}

// One warp per row; blockIdx.y: old's rows, the side-information's.
__global__ void __launch_bounds__(256) convert_rows(const RowArgs args) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
    if (row < args.out.n) convert_input(args, row, blockIdx.y == 1);
}

__global__ void __launch_bounds__(256) finish_rows(const RowArgs args) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
    if (row < args.out.n) finish_row(args.last + row * args.last_pitch, args.out, row, args.length);
}

// ---- host ----
inline int layer_pitch(int64_t d) { return static_cast<int>((d + kLayerChunk - 1) / kLayerChunk * kLayerChunk); }

// Blocks that have something to do in some phase: units of the widest, or a row in for each warp. A narrow h leaves
// most of a device idle, and fewer blocks meet sooner.
inline int useful_blocks(const SmallArgs& args) {
    const int rows = static_cast<int>(args.out.n), high = rows <= 16 ? 16 : rows <= 32 ? 32 : 64;
    int most = (2 * rows + kLayerThreads / 32 - 1) / (kLayerThreads / 32);
    for (int phase = 0; phase < args.n_phases; ++phase) {
        int units = 0;
        for (int l = args.first_layer[phase]; l < args.first_layer[phase + 1]; ++l)
            units += (args.layers[l].d_out + kLayerColumns - 1) / kLayerColumns * ((rows + high - 1) / high);
        if (units > most) most = units;
    }
    return most;
}

// at_once: blocks that the device runs at once.
inline void run_small(const SmallArgs& args, int at_once, cudaStream_t stream) {
    if (args.out.n == 0) return;
    if (args.out.n > kMaxSmallRows)
        throw std::invalid_argument("transform_small: expected at most 256 rows, got " + std::to_string(args.out.n));
    const int useful = useful_blocks(args), blocks = useful < at_once ? useful : at_once;
    if (args.out.n <= 16)
        GPU_LAUNCH_COOPERATIVE(dim3(blocks), kLayerThreads, LayerShape<1>::smem, stream, (transform_small<1>), args);
    else if (args.out.n <= 32)
        GPU_LAUNCH_COOPERATIVE(dim3(blocks), kLayerThreads, LayerShape<2>::smem, stream, (transform_small<2>), args);
    else
        GPU_LAUNCH_COOPERATIVE(dim3(blocks), kLayerThreads, LayerShape<4>::smem, stream, (transform_small<4>), args);
}

inline void run_convert(const RowArgs& args, cudaStream_t stream) {
    if (args.out.n == 0) return;
    const dim3 grid(static_cast<unsigned>((args.out.n + 7) / 8), args.side_bf16 ? 2 : 1);
    GPU_LAUNCH(grid, 256, 0, stream, convert_rows, args);
}

inline void run_finish(const RowArgs& args, cudaStream_t stream) {
    if (args.out.n == 0) return;
    GPU_LAUNCH(dim3(static_cast<unsigned>((args.out.n + 7) / 8)), 256, 0, stream, finish_rows, args);
}

}  // namespace fct::cuda
