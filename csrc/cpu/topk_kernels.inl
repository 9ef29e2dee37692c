// Included once per instruction set, inside its namespace, by topk_<isa>.cpp; the compiler's vector extensions do the
// rest. What differs by more than the vector's width comes from the includer: scan_products<group>, the 8-bit products;
// difference(x, y) and add_product(sum, x, y) with one float64 *y for every lane; count_within(const float*, float),
// how many of kPanel are <= a limit; tails, the products of rows that lie one by one. Tiles of the shadow are in
// topk_tile.inl.

constexpr int kWidth = FCT_TOPK_DOUBLES;  // float64 lanes of a register
typedef double Doubles __attribute__((vector_size(kWidth * 8)));
typedef double LooseDoubles __attribute__((vector_size(kWidth * 8), aligned(8)));
typedef float Floats __attribute__((vector_size(kWidth * 8)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 8)));
typedef int32_t LooseInts __attribute__((vector_size(kWidth * 8), aligned(4)));
typedef float LooseFloats __attribute__((vector_size(kWidth * 8), aligned(4)));
constexpr int kVectors = kPanel / kWidth;
constexpr int kFloats = 2 * kWidth;

#include "cpu/topk_tile.inl"

typedef float Floats4 __attribute__((vector_size(16), aligned(4)));
typedef int32_t Ints4 __attribute__((vector_size(16)));
typedef double Doubles4 __attribute__((vector_size(32), aligned(8)));

void pack(const float* const* rows, int64_t d, double* panel) {
    const int64_t whole = d & ~int64_t{3};
    const auto put = [](double* out, Floats4 a, Floats4 b, Ints4 order) {
        *reinterpret_cast<Doubles4*>(out) = __builtin_convertvector(__builtin_shuffle(a, b, order), Doubles4);
    };
    for (int64_t k = 0; k < whole; k += 4) {
#pragma GCC unroll 4
        for (int r = 0; r < kPanel; r += 4) {  // a 4 x 4 transposition
            const Floats4 a = *reinterpret_cast<const Floats4*>(rows[r] + k);
            const Floats4 b = *reinterpret_cast<const Floats4*>(rows[r + 1] + k);
            const Floats4 c = *reinterpret_cast<const Floats4*>(rows[r + 2] + k);
            const Floats4 e = *reinterpret_cast<const Floats4*>(rows[r + 3] + k);
            const Floats4 ab = __builtin_shuffle(a, b, Ints4{0, 4, 1, 5});
            const Floats4 AB = __builtin_shuffle(a, b, Ints4{2, 6, 3, 7});
            const Floats4 ce = __builtin_shuffle(c, e, Ints4{0, 4, 1, 5});
            const Floats4 CE = __builtin_shuffle(c, e, Ints4{2, 6, 3, 7});
            double* out = panel + k * kPanel + r;
            put(out, ab, ce, Ints4{0, 1, 4, 5});
            put(out + kPanel, ab, ce, Ints4{2, 3, 6, 7});
            put(out + 2 * kPanel, AB, CE, Ints4{0, 1, 4, 5});
            put(out + 3 * kPanel, AB, CE, Ints4{2, 3, 6, 7});
        }
    }
    for (int64_t k = whole; k < d; ++k)
        for (int r = 0; r < kPanel; ++r) panel[k * kPanel + r] = rows[r][k];
}

// `count` of the `stride` queries, from `values`. Each lane is one row: its sum runs over the dimensions in order.
template <int count, bool product>
void exact_block(const double* panel, int64_t d, const double* values, int64_t stride, double* out) {
    Doubles sums[count][kVectors];
#pragma GCC unroll 8
    for (int q = 0; q < count; ++q)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[q][v] = Doubles{};
    for (int64_t k = 0; k < d; ++k) {
        Doubles x[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
            x[v] = *reinterpret_cast<const LooseDoubles*>(panel + k * kPanel + v * kWidth);
#pragma GCC unroll 8
        for (int q = 0; q < count; ++q) {
            const double* const y = values + k * stride + q;
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {
                if (product) {
                    sums[q][v] = add_product(sums[q][v], x[v], y);
                } else {
                    const Doubles t = difference(x[v], y);
                    sums[q][v] += t * t;
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < count; ++q)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) std::memcpy(out + q * kPanel + v * kWidth, &sums[q][v], sizeof(Doubles));
}

void row_norms(const double* panel, int64_t d, double* norms) {
    Doubles sums[kVectors] = {};
    for (int64_t k = 0; k < d; ++k) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            const Doubles x = *reinterpret_cast<const LooseDoubles*>(panel + k * kPanel + v * kWidth);
            sums[v] += x * x;
        }
    }
    std::memcpy(norms, sums, sizeof sums);
}

void exact(const double* panel, int64_t d, const double* values, bool product, double* out, double* norms) {
    constexpr int step = kWidth == 8 ? 8 : kWidth == 4 ? 2 : 1;
    for (int q = 0; q < kExactQueries; q += step) {
        if (product) {
            exact_block<step, true>(panel, d, values + q, kExactQueries, out + q * kPanel);
        } else {
            exact_block<step, false>(panel, d, values + q, kExactQueries, out + q * kPanel);
        }
    }
    if (norms) row_norms(panel, d, norms);
}

void exact_one(const double* panel, int64_t d, const double* values, bool product, double* out, double* norms) {
    if (product) {
        exact_block<1, true>(panel, d, values, 1, out);
    } else {
        exact_block<1, false>(panel, d, values, 1, out);
    }
    if (norms) row_norms(panel, d, norms);
}

void quantise(const double* v, int64_t d, float scale, int8_t* out, double* error, double* norm) {
    const double inverse = scale > 0 ? 1.0 / scale : 0.0;
    // Adding and taking away 1.5 * 2^52 rounds to a whole number, and vectorises on every target.
    constexpr double kRound = 6755399441055744.0;
    double e[8] = {}, m[8] = {};
    const int64_t whole = d & ~int64_t{7};
    for (int64_t k = 0; k < whole; k += 8) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            double q = v[k + j] * inverse;
            q = q > 127 ? 127 : q < -127 ? -127 : q;
            q = (q + kRound) - kRound;
            const double y = q * scale, t = v[k + j] - y;
            e[j] += t * t;
            m[j] += y * y;
            out[k + j] = static_cast<int8_t>(static_cast<int32_t>(q));
        }
    }
    for (int64_t k = whole; k < d; ++k) {
        double q = v[k] * inverse;
        q = q > 127 ? 127 : q < -127 ? -127 : q;
        q = (q + kRound) - kRound;
        const double y = q * scale, t = v[k] - y;
        e[0] += t * t;
        m[0] += y * y;
        out[k] = static_cast<int8_t>(static_cast<int32_t>(q));
    }
    *error = *norm = 0;
    for (int j = 0; j < 8; ++j) {
        *error += e[j];
        *norm += m[j];
    }
}

void count4(const float* costs, int64_t n, const float* limits, int64_t* counts) {
    const int64_t whole = n - n % kFloats;
    for (int t = 0; t < 4; ++t) counts[t] = 0;
    for (int64_t start = 0; start < whole; start += int64_t{kFloats} << 24) {  // lanes hold 32 bits
        const int64_t stop = whole < start + (int64_t{kFloats} << 24) ? whole : start + (int64_t{kFloats} << 24);
        Ints below[4] = {};
        for (int64_t i = start; i < stop; i += kFloats) {
            const Floats c = *reinterpret_cast<const LooseFloats*>(costs + i);
#pragma GCC unroll 4
            for (int t = 0; t < 4; ++t) below[t] -= c <= limits[t];
        }
        for (int t = 0; t < 4; ++t)
            for (int j = 0; j < kFloats; ++j) counts[t] += below[t][j];
    }
    for (int64_t i = whole; i < n; ++i)
        for (int t = 0; t < 4; ++t) counts[t] += costs[i] <= limits[t];
}

void bucket(const float* costs, int64_t n, float low, float inverse, int32_t last, int32_t* out) {
    const float top = static_cast<float>(last);
    for (int64_t i = 0; i < n; ++i) {
        float x = (costs[i] - low) * inverse + 1.0f;
        x = x > 0.0f ? x : 0.0f;
        x = x < top ? x : top;
        out[i] = static_cast<int32_t>(x);
    }
}

double bucket_precision(const RankBuckets& buckets, const float* matches, const int32_t* places, int64_t m) {
    double sum = 0;
    for (int64_t j = 0; j < m; ++j) {
        const int32_t b = places[j];
        const float limit = matches[j];
        // Past a bucket's end stand costs of worse buckets, or infinity: nothing there is within the limit.
        uint64_t rows = buckets.rows_before[b], some = buckets.matches_at[b - 1];
        for (uint32_t at = buckets.rows_at[b - 1]; at < buckets.rows_at[b]; at += kPanel)
            rows += static_cast<uint64_t>(count_within(buckets.ordered + at, limit));
        for (uint32_t at = buckets.matches_at[b - 1]; at < buckets.matches_at[b]; at += kPanel)
            some += static_cast<uint64_t>(count_within(buckets.ordered_matches + at, limit));
        sum += static_cast<double>(some) / static_cast<double>(rows);
    }
    return sum;
}

// ---- levels ----

constexpr int kLanes = kPanel / kFloats;  // vectors of a panel's row
constexpr int64_t kSummed = 128;          // products that are added up before they are added to the rest, see loss_of

inline Floats load_floats(const float* x) {
    Floats y;
    std::memcpy(&y, x, sizeof y);
    return y;
}

void rotate_one(const Levels& levels, const float* x, int64_t d, float* y, float* work) {
    const int64_t head = levels.head;
    std::memcpy(y, x, static_cast<size_t>(d) * sizeof(float));
    for (int64_t r = 0; r < head; r += kFloats) {
        const int64_t some = head - r < kFloats ? head - r : kFloats;
        float sums[kFloats] = {};
        for (int64_t from = 0; from < d; from += kSummed) {
            const int64_t to = d - from < kSummed ? d : from + kSummed;
            float part[kFloats] = {};
            if (some == kFloats) {
                Floats p{};
                for (int64_t k = from; k < to; ++k) p += x[k] * load_floats(levels.down + k * head + r);
                std::memcpy(part, &p, sizeof p);
            } else {
                for (int64_t k = from; k < to; ++k)
                    for (int64_t j = 0; j < some; ++j) part[j] += x[k] * levels.down[k * head + r + j];
            }
            for (int j = 0; j < kFloats; ++j) sums[j] += part[j];
        }
        std::memcpy(work + r, sums, static_cast<size_t>(some) * sizeof(float));
    }
    for (int64_t r = 0; r < head; ++r) {
        const float z = work[r];
        const float* const up = levels.up + r * d;
        for (int64_t k = 0; k < d; ++k) y[k] -= z * up[k];
    }
}

// Columns [k, k + count) of a panel, less work times up.
template <int count>
void take_off(const Levels& levels, float* y, int64_t d, int64_t k, const float* work) {
    Floats sums[count][kLanes];
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < kLanes; ++v) sums[j][v] = load_floats(y + (k + j) * kPanel + v * kFloats);
    for (int64_t r = 0; r < levels.head; ++r) {
        Floats z[kLanes];
#pragma GCC unroll 4
        for (int v = 0; v < kLanes; ++v) z[v] = load_floats(work + r * kPanel + v * kFloats);
        const float* const up = levels.up + r * d + k;
#pragma GCC unroll 8
        for (int j = 0; j < count; ++j)
#pragma GCC unroll 4
            for (int v = 0; v < kLanes; ++v) sums[j][v] -= z[v] * up[j];
    }
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < kLanes; ++v) std::memcpy(y + (k + j) * kPanel + v * kFloats, &sums[j][v], sizeof(Floats));
}

void rotate(const Levels& levels, float* y, int64_t d, float* work) {
    constexpr int kColumns = 4;  // of `down` at once; head is a multiple
    const int64_t head = levels.head;
    for (int64_t r = 0; r < head; r += kColumns) {
        Floats sums[kColumns][kLanes] = {};
        for (int64_t from = 0; from < d; from += kSummed) {
            const int64_t to = d - from < kSummed ? d : from + kSummed;
            Floats part[kColumns][kLanes] = {};
            for (int64_t k = from; k < to; ++k) {
                const float* const down = levels.down + k * head + r;
#pragma GCC unroll 4
                for (int v = 0; v < kLanes; ++v) {
                    const Floats x = load_floats(y + k * kPanel + v * kFloats);
#pragma GCC unroll 8
                    for (int j = 0; j < kColumns; ++j) part[j][v] += x * down[j];
                }
            }
            for (int j = 0; j < kColumns; ++j)
                for (int v = 0; v < kLanes; ++v) sums[j][v] += part[j][v];
        }
        for (int j = 0; j < kColumns; ++j)
            for (int v = 0; v < kLanes; ++v)
                std::memcpy(work + (r + j) * kPanel + v * kFloats, &sums[j][v], sizeof(Floats));
    }
    int64_t k = 0;
    for (; k + 8 <= d; k += 8) take_off<8>(levels, y, d, k, work);
    for (; k < d; ++k) take_off<1>(levels, y, d, k, work);
}

void largest(const float* y, int64_t m, float* out) {
    for (int v = 0; v < kLanes; ++v) {
        Floats most{};
        for (int64_t k = 0; k < m; ++k) {
            const Floats x = load_floats(y + k * kPanel + v * kFloats);
            const Floats size = x > 0 ? x : -x;
            most = size > most ? size : most;
        }
        std::memcpy(out + v * kFloats, &most, sizeof most);
    }
}

void quantise_panel(const float* y, int64_t m, const float* scale, uint32_t* words, float* length, float* error,
                    float* norm) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
    typedef uint32_t Words __attribute__((vector_size(kWidth * 8)));
    for (int v = 0; v < kLanes; ++v) {
        float inverses[kFloats];
        for (int j = 0; j < kFloats; ++j) inverses[j] = scale[v * kFloats + j] > 0 ? 1 / scale[v * kFloats + j] : 0.0f;
        const Floats inverse = load_floats(inverses);
        Floats lengths{}, errors{}, norms{};
        for (int64_t k = 0; k < m; k += 4) {
            Words word{};
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                if (k + j >= m) break;
                const Floats x = load_floats(y + (k + j) * kPanel + v * kFloats) * inverse;
                Floats q = x > 127.0f ? Floats{} + 127.0f : x;
                q = q < -127.0f ? Floats{} - 127.0f : q;
                q = (q + kRound) - kRound;
                const Floats t = x - q;
                lengths += x * x;
                errors += t * t;
                norms += q * q;
                word |= (reinterpret_cast<Words>(__builtin_convertvector(q, Ints)) & 255) << (8 * j);
            }
            word ^= 0x80808080u;
            std::memcpy(words + k / 4 * kPanel + v * kFloats, &word, sizeof word);
        }
        for (int j = 0; j < kFloats; ++j) {
            length[v * kFloats + j] = __builtin_sqrtf(lengths[j]);
            error[v * kFloats + j] = __builtin_sqrtf(errors[j]);
            norm[v * kFloats + j] = __builtin_sqrtf(norms[j]);
        }
    }
}

TopkKernels make_table() {
    return {open_tile, aim,        scan,   join,    pack,           exact,  exact_one, quantise,        tails,
            reaching,  rotate_one, rotate, largest, quantise_panel, count4, bucket,    bucket_precision};
}
