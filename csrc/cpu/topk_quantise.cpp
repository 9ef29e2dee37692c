#include "cpu/topk_quantise.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/topk_candidates.h"

namespace fct::cpu {

float round_up(double x) {
    const float y = static_cast<float>(x * (1 + 1e-9));
    return static_cast<double>(y) < x ? std::nextafterf(y, kInfinityF) : y;
}

void to_scanned(const float* x, int64_t d, Metric metric, const float* shift, double* v) {
    double divide = 1;
    if (metric == Metric::cosine) {
        double sum = 0;
        for (int64_t j = 0; j < d; ++j) sum += static_cast<double>(x[j]) * x[j];
        divide = sum > 0 ? std::sqrt(sum) : 1;
    }
    if (shift) {
        for (int64_t j = 0; j < d; ++j) v[j] = x[j] / divide - shift[j];
    } else {
        for (int64_t j = 0; j < d; ++j) v[j] = x[j] / divide;
    }
}

void rotate(const Levels& levels, const double* v, int64_t d, double* y, const TopkKernels& kernel) {
    std::vector<float> x(v, v + d), rotated(static_cast<size_t>(d)), work(static_cast<size_t>(levels.head));
    kernel.rotate_one(levels, x.data(), d, rotated.data(), work.data());
    std::copy(rotated.begin(), rotated.end(), y);
}

double largest_of(const double* v, int64_t d) {
    double largest = 0;
    for (int64_t j = 0; j < d; ++j) largest = std::max(largest, std::fabs(v[j]));
    return largest;
}

Quantised quantise(const double* v, int64_t d, float least, int8_t* out, const TopkKernels& kernel) {
    double sum = 0;
    for (int64_t j = 0; j < d; ++j) sum += v[j] * v[j];
    const double largest = largest_of(v, d);
    Quantised q{std::max(least, static_cast<float>(largest / 127)), 0, 0, std::sqrt(sum), largest};
    double error, norm;
    kernel.quantise(v, d, q.scale, out, &error, &norm);
    q.error = std::sqrt(error);
    q.norm = std::sqrt(norm);
    return q;
}

}  // namespace fct::cpu
