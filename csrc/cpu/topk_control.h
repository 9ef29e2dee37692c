// What the workers of one search share: whether to go on, how much is done, who takes the next task.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "cpu/threads.h"

namespace fct::cpu {

// Shared by the workers of one call: whether to stop, and how much is done. Worker 0, on the calling thread, asks and
// tells every 100 ms.
class Control {
  public:
    explicit Control(KeepGoing keep_going) : keep_going_(keep_going), last_(Clock::now()) {}

    bool go(int worker) {
        if (worker == 0 && keep_going_.ask && Clock::now() - last_ > std::chrono::milliseconds(100)) {
            if (!keep_going_.ask(keep_going_.context, share())) stop_.store(true);
            last_ = Clock::now();
        }
        return !stop_.load(std::memory_order_relaxed);
    }

    // Work that was found, and work that was done, in any unit that does not change within a call.
    void expect(int64_t units) { expected_.fetch_add(units, std::memory_order_relaxed); }
    void did(int64_t units) { did_.fetch_add(units, std::memory_order_relaxed); }

    // fn(task, worker) for every task in [0, count); false when stopped.
    template <class Fn>
    bool tasks(int threads, int64_t count, Fn&& fn) {
        std::atomic<int64_t> next{0}, done{0};
        threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
        parallel(threads, Join::as_awake, [&](int worker) {
            for (int64_t task; go(worker) && (task = next.fetch_add(1)) < count;) {
                fn(task, worker);
                done.fetch_add(1);
            }
            if (worker != 0) return;
            // Stays to ask while the others finish: awake at first, since a single query takes less than a sleep does.
            const auto ready = [&] { return done.load() == count; };
            if (spin_until(ready, kAwake)) return;
            while (go(0) && !ready()) std::this_thread::sleep_for(std::chrono::microseconds(50));
        });
        return !stop_.load();
    }

  private:
    double share() const {
        const auto expected = static_cast<double>(expected_.load());
        return expected > 0 ? std::min(1.0, static_cast<double>(did_.load()) / expected) : 0.0;
    }

    using Clock = std::chrono::steady_clock;
    KeepGoing keep_going_;
    Clock::time_point last_;
    std::atomic<bool> stop_{false};
    std::atomic<int64_t> expected_{0}, did_{0};
};

}  // namespace fct::cpu
