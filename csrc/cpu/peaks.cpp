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

// Words of one load; eight sums, so that the loads do not wait for one another, and a prefetch far enough ahead to
// cover the way from the third-level cache or memory. Inlined into a function for each width of load.
template <class Words>
inline __attribute__((always_inline)) uint64_t read_words(const uint8_t* data, int64_t bytes) {
    constexpr int64_t kStep = 8 * sizeof(Words), kAhead = 2048;
    Words sums[8] = {};
    int64_t at = 0;
    for (; at + kStep <= bytes; at += kStep) {
        for (int64_t line = 0; line < kStep; line += 64) __builtin_prefetch(data + at + kAhead + line);
        for (int i = 0; i < 8; ++i) {
            Words x;
            std::memcpy(&x, data + at + sizeof(Words) * static_cast<size_t>(i), sizeof(Words));
            sums[i] += x;
        }
    }
    for (int i = 1; i < 8; ++i) sums[0] += sums[i];
    uint64_t total = 0;
    for (size_t i = 0; i < sizeof(Words) / 8; ++i) total += sums[0][i];
    for (; at < bytes; ++at) total += data[at];
    return total;
}

typedef uint64_t Words32 __attribute__((vector_size(32)));

#if defined(__x86_64__)
typedef uint64_t Words64 __attribute__((vector_size(64)));

__attribute__((target("avx512f"))) uint64_t read_avx512(const uint8_t* data, int64_t bytes) {
    return read_words<Words64>(data, bytes);
}

__attribute__((target("avx2"))) uint64_t read_avx2(const uint8_t* data, int64_t bytes) {
    return read_words<Words32>(data, bytes);
}
#endif

}  // namespace

uint64_t read_all(const uint8_t* data, int64_t bytes) {
#if defined(__x86_64__)
    static const Isa isa = detected_isa();
    if (isa >= Isa::avx512) return read_avx512(data, bytes);
    if (isa >= Isa::avx2) return read_avx2(data, bytes);
#endif
    return read_words<Words32>(data, bytes);
}

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
        parallel(threads, Join::all, [&](int worker) { done[static_cast<size_t>(worker)] = loop(rounds * 2); });
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
        parallel(threads, Join::all, [&](int worker) { sink += read_all(block.data() + worker * part, part); });
        best = std::max(best, static_cast<double>(part * threads) / seconds_since(start));
    } while (seconds_since(began) < seconds);
    return best;
}

}  // namespace fct::cpu
