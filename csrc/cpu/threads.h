// The thread pool of every CPU kernel: one per process, grown on demand, made anew in a forked child.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <type_traits>

namespace fct::cpu {

// How long a thread that waits stays awake before it gives its processor away. A pool's workers stay longer than a
// Python caller takes between two single queries: to wake one takes as long as the query.
constexpr std::chrono::microseconds kAwake{50}, kWorkersAwake{200};

// Returns at once when ready() holds, else looks again and again until it does or the time is over; whether it held.
template <class Ready>
bool spin_until(Ready&& ready, std::chrono::microseconds most) {
    if (ready()) return true;
    const auto end = std::chrono::steady_clock::now() + most;
    do {
        for (int i = 0; i < 16; ++i) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            asm volatile("yield");
#endif
            if (ready()) return true;
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

// Who has to take part in a parallel call.
enum class Join {
    all,       // every worker, e.g. because the work is divided by worker
    as_awake,  // worker 0 alone could do everything: who wakes up too late to help is not waited for
};

// Calls fn(context, worker) with worker 0 on the calling thread and the others, each in [1, threads) and each once, on
// threads of the pool; returns when all that have begun are done. Calls from several threads at once take turns;
// threads == 1 never waits. fn must not throw and must not call parallel itself.
void parallel(int threads, Join join, void (*fn)(void* context, int worker), void* context);

// The same for a lambda: parallel(threads, Join::all, [&](int worker) { ... }).
template <class Fn>
void parallel(int threads, Join join, Fn&& fn) {
    using Plain = typename std::remove_reference<Fn>::type;
    parallel(
        threads, join, [](void* context, int worker) { (*static_cast<Plain*>(context))(worker); },
        const_cast<void*>(static_cast<const void*>(&fn)));
}

// Items [0, count) shared by the workers of one parallel call, a few at a time, by whoever is there. run() returns
// when all items are done, by whomever: what comes after may read what they wrote.
class Shared {
  public:
    void reset() {
        next_.store(0, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
    }

    // fn(from, to) on pieces that are multiples of `step`: large ones first, so that they are few, small ones last, so
    // that all workers end together.
    template <class Fn>
    void run(int64_t count, int64_t step, int workers, Fn&& fn) {
        int64_t from = next_.load(std::memory_order_relaxed);
        while (from < count) {
            const int64_t even = (count - from) / (2 * workers);
            int64_t to = from + (even > step ? (even + step - 1) / step * step : step);
            if (to > count) to = count;
            if (!next_.compare_exchange_weak(from, to, std::memory_order_relaxed)) continue;
            fn(from, to);
            done_.fetch_add(to - from, std::memory_order_acq_rel);
            from = next_.load(std::memory_order_relaxed);
        }
        wait(count);
    }

  private:
    void wait(int64_t count) const;  // spins, since its users meet every few microseconds; yields after a while

    std::atomic<int64_t> next_{0};
    std::atomic<int64_t> done_{0};
};

// Asked by long calls about every 100 ms, on the calling thread, and told the share that is done, 0 to 1, as well as it
// can be foreseen; returns false to stop (Ctrl-C).
struct KeepGoing {
    bool (*ask)(void* context, double share) = nullptr;
    void* context = nullptr;
};

}  // namespace fct::cpu
