#include "cpu/peaks.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "cpu/threads.h"
#include "cpu/transform.h"

namespace fct::cpu {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// The best of several short spells: a peak is what undisturbed hardware does.
constexpr int kSpells = 5;

typedef uint64_t Words __attribute__((vector_size(32)));

}  // namespace

double peak_ops(Precision precision, Isa isa, int threads, double seconds) {
    const auto loop = kernels_of(isa).peak[static_cast<int>(precision)];
    int64_t rounds = 1000;
    for (;; rounds *= 4) {  // as many as take a spell
        const Clock::time_point start = Clock::now();
        loop(rounds);
        if (seconds_since(start) > seconds / kSpells / 4) break;
    }
    double best = 0;
    std::vector<double> done(static_cast<size_t>(threads));
    for (int spell = 0; spell < kSpells; ++spell) {
        const Clock::time_point start = Clock::now();
        parallel(threads, [&](int worker) { done[static_cast<size_t>(worker)] = loop(rounds * 2); });
        const double took = seconds_since(start);
        double total = 0;
        for (const double ops : done) total += ops;
        best = std::max(best, total / took);
    }
    return best;
}

double read_bandwidth(int64_t bytes, int threads, double seconds) {
    const int64_t part = std::max<int64_t>(4096, bytes / threads / 4096 * 4096);
    const Block block(static_cast<size_t>(part * threads));
    std::atomic<uint64_t> sink{0};
    double best = 0;
    const Clock::time_point began = Clock::now();
    do {
        const Clock::time_point start = Clock::now();
        parallel(threads, [&](int worker) {
            const uint8_t* data = block.data() + worker * part;
            Words sums[8] = {};
            for (int64_t at = 0; at < part; at += 256) {
                __builtin_prefetch(data + at + 2048);
                for (int i = 0; i < 8; ++i) {
                    Words x;
                    std::memcpy(&x, data + at + 32 * i, 32);
                    sums[i] += x;
                }
            }
            for (int i = 1; i < 8; ++i) sums[0] += sums[i];
            sink += sums[0][0] + sums[0][1] + sums[0][2] + sums[0][3];
        });
        best = std::max(best, static_cast<double>(part * threads) / seconds_since(start));
    } while (seconds_since(began) < seconds);
    return best;
}

}  // namespace fct::cpu
