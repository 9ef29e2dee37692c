// One search: its sides, what scores mean, and its steps.
#pragma once
#include <cmath>
#include <vector>

#include "cpu/topk_candidates.h"
#include "cpu/topk_control.h"

namespace fct::cpu {

// For progress, which counts tiles times queries: about how many rows are scanned while one is scored in float64.
constexpr int64_t kExactCost = 24;

const TopkKernels& kernels(Isa isa);

inline float score_of(double sum, double q_norm, double x_sum, Metric metric) {
    if (metric != Metric::cosine) return static_cast<float>(sum);
    const double norms = q_norm * std::sqrt(x_sum);
    return norms > 0 ? static_cast<float>(sum / norms) : 0.0f;
}

// The smallest cost is best; + 0 so that there is one zero.
inline float cost_of(float score, Metric metric) { return metric == Metric::l2 ? score : -score + 0.0f; }

template <class T>
double norm_of(const T* x, int64_t d) {
    double sum = 0;
    for (int64_t j = 0; j < d; ++j) sum += static_cast<double>(x[j]) * x[j];
    return std::sqrt(sum);
}

struct Search {
    const RowSource& queries;
    const RowSource& gallery;
    const Shadow& shadow;
    Metric metric;
    int64_t k, self;
    int threads;
    const TopkKernels& kernel;
    Control& control;
    double shift_length;  // |shift| where queries are not shifted, else 0

    int64_t self_of(int64_t q) const { return self < 0 ? -1 : self + q; }
};

// Scores the candidates of query q in float64 and writes the k best. `rows` begins with (nearly) the k largest lower
// bounds: once these are scored, the k-th best score is known more closely than by any bound, and many of the others
// need not be.
void rescore(const Search& s, int64_t q, std::vector<Candidate>& rows, float* distances, int64_t* indices);

// A key that k of these rows reach, by their exact scores; minus infinity where there are fewer.
double exact_bar(const Search& s, int64_t q, const std::vector<int64_t>& ids);

// The `wanted` queries over every row, in float64; false when stopped.
bool search_all(const Search& s, const std::vector<int64_t>& wanted, float* distances, int64_t* indices);

}  // namespace fct::cpu
