// Vectors in 8 bits, as they are scanned.
#pragma once
#include <cstdint>

#include "cpu/topk_kernels.h"

namespace fct::cpu {

// What an int32 sum of the scan holds besides a query's init and its products with unsigned bytes.
inline double room_beside(int64_t d) { return 2147483000 - 383.0 * 127 * static_cast<double>((d + 3) / 4 * 4); }

float round_up(double x);

// The vector that is scanned for a row: shifted for l2 and ip, divided by its norm (then shifted) for cosine.
void to_scanned(const float* x, int64_t d, Metric metric, const float* shift, double* v);

struct Quantised {
    float scale;
    double error, norm, length, largest;  // |v - v'|, |v'|, |v|, and the largest |v_j|
};

// Of any rotated vector, on top of Levels::loss times its length: what float32 loses below its least normal number.
constexpr double kLeastLoss = 1e-38;

// v (d float64) as it is scanned with levels, see topk.h.
void rotate(const Levels& levels, const double* v, int64_t d, double* y, const TopkKernels& kernel);

double largest_of(const double* v, int64_t d);

// `least`: of the scale.
Quantised quantise(const double* v, int64_t d, float least, int8_t* out, const TopkKernels& kernel);

}  // namespace fct::cpu
