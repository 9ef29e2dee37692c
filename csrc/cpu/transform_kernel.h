// The micro-kernel of the fused transformation, once for every instruction set. Included by one file per set, each
// compiled with its own flags; everything lies in an unnamed namespace so that no two of them share code.
//
// Layout. Activations: a row tile of kRows rows is a run of chunks, each kRows x 64 bytes: 64 bytes of row 0, 64 of
// row 1, ... (16 float, 32 bf16 or 64 u8 values of each). Weights: a panel of kCols output columns is, for each group
// of 4 bytes along the inputs (1 float, 2 bf16, 4 s8), kCols x 4 bytes. Both are read front to back, once.
// Numerics. Each output element is one accumulator (fp32, or int32 for int8), summed over the inputs in ascending
// order whatever the tile's size, so an element's bits depend on its row and the weights alone. fp32 sums are kept in
// two levels, runs of kRun chunks (256 floats, 512 bf16) and the sum of the runs, which keeps the error of long
// rows at the square root of the run's length rather than of the row's. int32 cannot overflow below 2^31 / (255 * 127)
// = 66,311 inputs of 8 bits, nor where 16-bit weights add up to less than 2^31 / 4,095; packing refuses others.
//
// A set supplies: struct V (float vectors of V::W lanes and stores) and one struct per precision (K::load, K::bcast,
// K::fma, K::to_float, K::zero).
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/convert.h"
#include "cpu/transform_tiles.h"

namespace fct::cpu {
namespace {

// Where row 0 of a column lies in a tile of activations; row r is r * 64 bytes on.
template <class V, Store kStore>
inline uint8_t* column_of(uint8_t* tile, uint64_t column) {
    constexpr uint64_t kSize = kStore == Store::f32 ? 4 : kStore == Store::u8 ? 1 : 2;
    constexpr uint64_t kPerChunk = 64 / kSize;
    return tile + column / kPerChunk * (V::kRows * 64) + column % kPerChunk * kSize;
}

template <class V, Store kStore>
inline void store_activation(uint8_t* to, typename V::f value) {
    if constexpr (kStore == Store::f32) V::store_f32(to, value);
    if constexpr (kStore == Store::bf16) V::store_bf16(to, value);
    if constexpr (kStore == Store::u8) V::store_u8(to, value);
    if constexpr (kStore == Store::s16) V::store_s16(to, value);
}

// Sums of two parts: float lanes, or the 32-bit lanes of an integer vector.
template <class K>
inline typename K::acc sum_of(typename K::acc a, typename K::acc b) {
    if constexpr (K::kInteger) {
        typedef int32_t Lanes __attribute__((vector_size(sizeof a)));
        return (typename K::acc)((Lanes)a + (Lanes)b);
    } else {
        return a + b;
    }
}

// M rows of a tile times P panels beside each other.
template <class V, class K, Store kStore, int M, int P>
void tile(const TileArgs& args) {
    const TileArgs t = args;  // a copy of our own, which no store can change
    constexpr int NV = V::kCols / V::W;
    constexpr int kStep = V::kCols * 4;
    static_assert(M * P * V::kCols * 4 <= kMostSums);
    typename K::acc acc[M][P * NV];
    auto* const sums = reinterpret_cast<typename K::acc(*)[P * NV]>(t.sums);  // touched once a run
    const bool whole = t.begins && t.ends && (K::kInteger || t.chunks <= kRun);
    const auto clear = [&] {
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < P * NV; ++v) acc[r][v] = K::zero();
    };
    clear();
    const uint8_t* act = t.act;
    const uint8_t* weights = t.weights;
    const uint8_t* ahead = t.ahead;
    bool fresh = t.begins;
    for (int64_t done = 0; done < t.chunks;) {
        const int64_t stop = K::kInteger || t.chunks - done < kRun ? t.chunks : done + kRun;
        for (; done < stop; ++done) {
            if constexpr (M == V::kRows) {
                for (int64_t i = 0; i < t.ahead_lines; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
            }
            for (int quarter = 0; quarter < 4; ++quarter) {
#pragma GCC unroll 4
                for (int s = 0; s < 4; ++s) {
                    if constexpr (M == V::kRows)  // the next chunk's activations, from L2
                        __builtin_prefetch(act + (V::kRows + quarter * 4 + s) * 64 - quarter * 16, 0, 3);
                    typename K::operand w[P * NV];
#pragma GCC unroll 16
                    for (int v = 0; v < P * NV; ++v)
                        w[v] = K::load(weights + (v / NV) * t.panel_bytes + s * kStep + (v % NV) * V::W * 4);
#pragma GCC unroll 16
                    for (int r = 0; r < M; ++r) {
                        const typename K::operand a = K::bcast(act + r * 64 + s * 4);
#pragma GCC unroll 16
                        for (int v = 0; v < P * NV; ++v) acc[r][v] = K::fma(acc[r][v], w[v], a);
                    }
                }
                act += 16;
                weights += 4 * kStep;
            }
            act += (V::kRows - 1) * 64;
        }
        if (whole) break;
        if (!fresh) {
#pragma GCC unroll 16
            for (int r = 0; r < M; ++r)
#pragma GCC unroll 16
                for (int v = 0; v < P * NV; ++v) acc[r][v] = sum_of<K>(sums[r][v], acc[r][v]);
        }
        fresh = false;
        if (t.ends && done == t.chunks) break;
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < P * NV; ++v) sums[r][v] = acc[r][v];
        clear();
    }
    if (!t.ends) return;
    constexpr bool kScaled = K::kInteger || kStore == Store::u8;
    const typename V::f lowest = V::set(t.lowest);
#pragma GCC unroll 16
    for (int v = 0; v < P * NV; ++v) {
        const int column = v * V::W;
        uint8_t* const out = column_of<V, kStore>(t.out, static_cast<uint64_t>(t.column + column));
        const uint8_t* added = nullptr;
        if constexpr (kStore == Store::f32) {
            if (t.added != nullptr) added = t.added + (out - t.out);
        }
        const typename V::f bias = V::load(t.bias + column);
        typename V::f scale;
        if constexpr (kScaled) scale = V::load(t.scale + column);
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r) {
            typename V::f value = K::to_float(acc[r][v]);
            if constexpr (kScaled) {
                value = V::fma(value, scale, bias);
            } else {
                value = V::add(value, bias);
            }
            value = V::max_keeping_nan(value, lowest);
            if constexpr (kStore == Store::f32) {
                if (added != nullptr) value = V::add(value, V::load(reinterpret_cast<const float*>(added + r * 64)));
            }
            store_activation<V, kStore>(out + r * 64, value);
        }
    }
}

// float values of one row, from column on, in whole vectors -> activations of row r of a tile. scale and bias, by
// column, for integers only.
template <class V, Store kStore>
void put_row(const float* values, int64_t column, int64_t count, const float* scale, const float* bias, uint8_t* out,
             int row) {
    for (int64_t j = 0; j < count; j += V::W) {
        typename V::f value = V::load(values + j);
        if constexpr (kStore == Store::u8 || kStore == Store::s16)
            value = V::fma(value, V::load(scale + column + j), V::load(bias + column + j));
        if constexpr (kStore == Store::u8) value = V::max_keeping_nan(value, V::set(0.0f));
        store_activation<V, kStore>(column_of<V, kStore>(out, static_cast<uint64_t>(column + j)) + row * 64, value);
    }
}

// Rows [first, first + rows) of the caller's matrix -> columns [column, column + padded) of one tile. A row passes
// through a piece of the stack; float rows go straight there as far as whole vectors reach.
template <class V, Store kStore>
void pack_rows_as(const RowsView& from, int64_t first, int rows, int64_t column, int64_t padded, const float* scale,
                  const float* bias, uint8_t* out) {
    constexpr int64_t kPiece = 256;
    alignas(64) float piece[kPiece];
    const int64_t straight = from.dtype == DType::f32 ? from.d / V::W * V::W : 0;
    for (int r = 0; r < rows; ++r) {
        if (straight > 0)
            put_row<V, kStore>(static_cast<const float*>(from.data) + (first + r) * from.stride, column, straight,
                               scale, bias, out, r);
        for (int64_t done = straight; done < padded; done += kPiece) {
            const int64_t count = padded - done < kPiece ? padded - done : kPiece;
            const int64_t filled = from.d - done < 0 ? 0 : from.d - done < count ? from.d - done : count;
            load_part(from, first + r, done, filled, piece);
            for (int64_t j = filled; j < count; ++j) piece[j] = 0.0f;
            put_row<V, kStore>(piece, column + done, count, scale, bias, out, r);
        }
    }
}

template <class V>
void pack_tile(const RowsView& from, int64_t first, int rows, Store store, int64_t column, int64_t padded,
               const float* scale, const float* bias, uint8_t* out) {
    switch (store) {
        case Store::f32:
            return pack_rows_as<V, Store::f32>(from, first, rows, column, padded, scale, bias, out);
        case Store::bf16:
            return pack_rows_as<V, Store::bf16>(from, first, rows, column, padded, scale, bias, out);
        case Store::u8:
            return pack_rows_as<V, Store::u8>(from, first, rows, column, padded, scale, bias, out);
        case Store::s16:
            return pack_rows_as<V, Store::s16>(from, first, rows, column, padded, scale, bias, out);
    }
}

// One tile of f32 activations -> rows of the caller's matrix, brought to `length` where that is not 0. A row of a tile
// is pieces of 16 floats, kRows * 64 bytes apart.
template <class V>
void finish_tile(const uint8_t* tile, const RowsView& to, int64_t first, int rows, float length) {
    for (int r = 0; r < rows; ++r) {
        const uint8_t* const row = tile + r * 64;
        const auto piece = [&](int64_t j) { return reinterpret_cast<const float*>(row + j / 16 * (V::kRows * 64)); };
        double factor = 1.0;
        if (length != 0.0f) {
            double sums[8] = {};
            for (int64_t j = 0; j < to.d; j += 16) add_squares(piece(j), to.d - j < 16 ? to.d - j : 16, sums);
            factor = factor_to(length, sums);
        }
        for (int64_t j = 0; j < to.d; j += 16) {
            const int64_t count = to.d - j < 16 ? to.d - j : 16;
            float values[16];
            std::memcpy(values, piece(j), 64);
            if (length != 0.0f)
                for (float& x : values) x = static_cast<float>(x * factor);
            store_part(values, to, first + r, j, count);
        }
    }
}

// Register-only: as many independent accumulators as the micro-kernel has, nothing but K::fma. The machine's peak.
template <class V, class K>
double peak_loop(int64_t rounds) {
    constexpr int kAccs = V::kRows * (V::kCols / V::W);
    typename K::acc acc[kAccs];
    alignas(64) uint8_t seed[64];
    std::memset(seed, 0, sizeof seed);
    typename K::operand w = K::load(seed), a = K::bcast(seed);
#pragma GCC unroll 32
    for (int i = 0; i < kAccs; ++i) {
        acc[i] = K::zero();
        V::hide(acc[i]);  // or the compiler sees that all accumulators are equal and keeps one
    }
    for (int64_t k = 0; k < rounds; ++k) {
#pragma GCC unroll 32
        for (int i = 0; i < kAccs; ++i) {
            V::hide(a);  // or a product made of several instructions would be shared by all accumulators
            acc[i] = K::fma(acc[i], w, a);
        }
        V::hide(w);
    }
    typename V::f total = V::set(0.0f);
#pragma GCC unroll 32
    for (int i = 0; i < kAccs; ++i) total = V::add(total, K::to_float(acc[i]));
    alignas(64) float lanes[16] = {};
    V::store_f32(lanes, total);
    volatile float sink = lanes[0];  // so that the loop cannot be left out
    (void)sink;
    return 2.0 * K::kGroup * V::W * kAccs * static_cast<double>(rounds);
}

template <class V, class K, Store kStore>
constexpr TileFn pick(int rows, int panels) {
    if (panels == 4) return rows == 1 ? tile<V, K, kStore, 1, 4> : tile<V, K, kStore, 2, 4>;
    if (panels == 2) return tile<V, K, kStore, 4, 2>;
    return rows == 1          ? tile<V, K, kStore, 1, 1>
           : rows == 2        ? tile<V, K, kStore, 2, 1>
           : rows == 4        ? tile<V, K, kStore, 4, 1>
           : rows == V::kHalf ? tile<V, K, kStore, V::kHalf, 1>
                              : tile<V, K, kStore, V::kRows, 1>;
}

// The tile sizes that are compiled: rows 1, 2, 4, about half a tile, a whole one; few rows take several panels at
// once, since one panel's accumulators alone would wait for each other.
template <class V, class K, Store kStore>
void fill_sizes(TileFn (&fns)[kTileSizes], TileFn (&wide)[kTileSizes]) {
    const int rows[kTileSizes] = {1, 2, 4, V::kHalf, V::kRows};
    const int panels[kTileSizes] = {4, 4, 2, 1, 1};
    for (int i = 0; i < kTileSizes; ++i) {
        fns[i] = pick<V, K, kStore>(rows[i], 1);
        wide[i] = pick<V, K, kStore>(rows[i], panels[i]);
    }
}

template <class V, class K>
void fill_precision(Kernels& kernels, Precision precision) {
    const int p = static_cast<int>(precision);
    fill_sizes<V, K, Store::f32>(kernels.tile[p][0], kernels.wide[p][0]);
    fill_sizes<V, K, Store::bf16>(kernels.tile[p][1], kernels.wide[p][1]);
    fill_sizes<V, K, Store::u8>(kernels.tile[p][2], kernels.wide[p][2]);  // no layer writes s16
    kernels.peak[p] = peak_loop<V, K>;
}

template <class V>
void fill_shape(Kernels& kernels) {
    kernels.rows = V::kRows;
    kernels.cols = V::kCols;
    const int rows[kTileSizes] = {1, 2, 4, V::kHalf, V::kRows};
    const int panels[kTileSizes] = {4, 4, 2, 1, 1};
    for (int i = 0; i < kTileSizes; ++i) {
        kernels.size_rows[i] = rows[i];
        kernels.size_panels[i] = panels[i];
    }
    kernels.pack_tile = pack_tile<V>;
    kernels.finish_tile = finish_tile<V>;
}

}  // namespace
}  // namespace fct::cpu
