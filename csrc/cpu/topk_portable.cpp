#include <cstring>

#include "cpu/topk.h"
#include "cpu/topk_kernels.h"

#define FCT_TOPK_DOUBLES 2

namespace fct::cpu::portable {
namespace {

template <int group>
bool scan_products(const ScanTile& tile, int64_t steps, const ScanQueries& queries, int64_t first, uint64_t* masks,
                   float* keys) {
    const int32_t *const words = queries.words + first * queries.stride, *const init = queries.init + first;
    const float *const inverse = queries.inverse + first, *const threshold = queries.threshold + first;
    const float* const per_tail = queries.per_tail + first;
    const float *const scale = tile.scale(), *const half = tile.half();
    uint64_t any = 0;
    for (int q = 0; q < group; ++q) {
        int32_t sums[kTile];
        for (int r = 0; r < kTile; ++r) sums[r] = init[q];
        for (int64_t k = 0; k < steps; ++k) {
            int8_t y[4];
            std::memcpy(y, words + k * group + q, 4);
            uint8_t bytes[4 * kTile];
            const uint8_t* x = tile.values + k * 4 * kTile;
            if (tile.kind != Values::bytes) {
                const int64_t at = k / 2 * 4 * kTile;
                const int up = k % 2 ? 4 : 0;
                for (int i = 0; i < 4 * kTile; ++i) {
                    const int low = tile.kind == Values::halves ? tile.low[at + i] >> up & 0x0f : 0;
                    bytes[i] = static_cast<uint8_t>((tile.values[at + i] << up & 0xf0) | low);
                }
                x = bytes;
            }
            for (int r = 0; r < kTile; ++r)
                sums[r] += x[4 * r] * y[0] + x[4 * r + 1] * y[1] + x[4 * r + 2] * y[2] + x[4 * r + 3] * y[3];
        }
        uint64_t mask = 0;
        for (int r = 0; r < kTile; ++r) {
            const float key = static_cast<float>(sums[r]) * scale[r] - half[r] * inverse[q];
            keys[q * kTile + r] = key;
            const bool counts =
                tile.has_tail ? !(key + tile.tails[r] * per_tail[q] < threshold[q]) : key >= threshold[q];
            mask |= static_cast<uint64_t>(counts) << r;
        }
        masks[q] = mask;
        any |= mask;
    }
    return any != 0;
}

typedef double TwoDoubles __attribute__((vector_size(16)));
inline TwoDoubles difference(TwoDoubles x, const double* y) { return x - *y; }
inline TwoDoubles add_product(TwoDoubles sum, TwoDoubles x, const double* y) { return sum + x * *y; }

inline int count_within(const float* x, float limit) {
    int count = 0;
    for (int i = 0; i < kPanel; ++i) count += x[i] <= limit;
    return count;
}

void tails(const uint8_t* records, int64_t size, const uint8_t* rows, int count, const int8_t* q, int64_t bytes,
           int32_t* out) {
    for (int i = 0; i < count; ++i) {
        const uint8_t* const x = records + rows[i] * size + sizeof(TailFacts);
        int32_t sum = 0;
        for (int64_t j = 0; j < bytes; ++j) sum += x[j] * q[j];
        out[i] = sum;
    }
}

uint64_t reaching(const float* ends, float threshold) {
    uint64_t mask = 0;
    for (int r = 0; r < kTile; ++r) mask |= static_cast<uint64_t>(!(ends[r] < threshold)) << r;
    return mask;
}

#include "cpu/topk_kernels.inl"

}  // namespace
const TopkKernels& topk_kernels() {
    static const TopkKernels table = make_table();
    return table;
}
}  // namespace fct::cpu::portable
