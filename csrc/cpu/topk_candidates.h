// The rows of one query that may still be among its k best, each with a proven interval of its key.
#pragma once
#include <atomic>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/topk_kernels.h"

namespace fct::cpu {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kInfinityF = std::numeric_limits<float>::infinity();

struct Candidate {
    int64_t id;
    float low, high;  // of the key
};

// Not above key - margin, not below key + margin; float32's rounding is 2^-24, or below float32's least normal number.
Candidate candidate(int64_t id, double key, double margin);

// Candidates of one query within one part of the gallery.
struct Candidates {
    std::vector<Candidate> rows;  // of those seen, every one whose key may reach `tau`
    double tau = -kInfinity;      // what a row has to reach: proven by k rows' keys, or guessed (see ScanBlock)
    std::vector<float> costs;     // scratch of shrink
    size_t room = 0;
    bool exhausted = false;

    // Raises tau to what the lower bounds of `rank` rows reach and drops what cannot. rank = k is a proof; with a share
    // of the intervals taken off their lower ends (trust) it is none.
    void shrink(int64_t rank, const TopkKernels& kernel, float trust = 0);

    bool proven(int64_t k) const;
};

// The best threshold of one query that k rows of any part have proven: its parts tell one another.
class Proven {
  public:
    // Adds one; returns the best.
    double exchange(double tau) {
        double best = tau_.load(std::memory_order_relaxed);
        while (best < tau && !tau_.compare_exchange_weak(best, tau, std::memory_order_relaxed)) {
        }
        return best < tau ? tau : best;
    }

  private:
    std::atomic<double> tau_{-kInfinity};
};

}  // namespace fct::cpu
