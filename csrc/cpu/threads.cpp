#include "cpu/threads.h"

#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace fct::cpu {
namespace {

class Pool {
  public:
    const pid_t owner = getpid();

    void run(int threads, Join join, void (*fn)(void*, int), void* context) {
        std::lock_guard<std::mutex> turn(turn_);
        while (static_cast<int>(workers_.size()) < threads - 1) {
            workers_.emplace_back([this] { work(); });
            workers_.back().detach();
        }
        fn_ = fn;
        context_ = context;
        places_ = static_cast<uint64_t>(threads - 1);
        left_.store(0);
        {
            std::lock_guard<std::mutex> lock(sleep_);
            state_.store(next_job(state_.load()) | kOpen);
        }
        wake_.notify_all();
        fn(context, 0);
        if (join == Join::all) wait_for([&] { return joined(state_.load()) == places_; });
        const uint64_t last = state_.fetch_and(~kOpen);
        wait_for([&] { return left_.load() == joined(last); });
    }

  private:
    // One word says everything a worker has to know to join: the number of the job (high 32 bits), whether it may
    // still be joined, and how many have. A worker that was late for a job never touches it, so nobody waits for
    // sleepers.
    static constexpr uint64_t kOpen = uint64_t{1} << 31;
    static uint64_t next_job(uint64_t state) { return ((state >> 32) + 1) << 32; }
    static uint64_t joined(uint64_t state) { return state & (kOpen - 1); }

    template <class Ready>
    static void wait_for(Ready&& ready) {
        if (spin_until(ready, kAwake)) return;
        while (!ready()) std::this_thread::yield();
    }

    void work() {
        uint64_t seen = 0;  // the last job looked at
        for (;;) {
            const auto called = [&] { return state_.load() >> 32 != seen; };
            if (!spin_until(called, kWorkersAwake)) {
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, called);
            }
            uint64_t state = state_.load();
            seen = state >> 32;
            // As long as this job is open its fields stay, and once joined it does not end without us.
            while (state >> 32 == seen && (state & kOpen) != 0 && joined(state) < places_.load()) {
                if (!state_.compare_exchange_weak(state, state + 1)) continue;
                fn_(context_, static_cast<int>(joined(state)) + 1);
                left_.fetch_add(1);
                break;
            }
        }
    }

    std::mutex turn_, sleep_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::atomic<uint64_t> state_{0};
    std::atomic<uint64_t> places_{0}, left_{0};
    void (*fn_)(void*, int) = nullptr;
    void* context_ = nullptr;
};

// Threads do not survive a fork, so a child leaves its parent's pool alone and makes its own. Never destroyed:
// detached workers wait in it until the process ends. No lock, which a fork could catch in the closed state.
Pool& pool() {
    static std::atomic<Pool*> current{nullptr};
    Pool* found = current.load();
    while (found == nullptr || found->owner != getpid()) {
        Pool* fresh = new Pool;
        if (current.compare_exchange_strong(found, fresh)) return *fresh;
        delete fresh;
    }
    return *found;
}

}  // namespace

void parallel(int threads, Join join, void (*fn)(void*, int), void* context) {
    if (threads <= 1) {
        fn(context, 0);
        return;
    }
    pool().run(threads, join, fn, context);
}

void Shared::wait(int64_t count) const {
    const auto ready = [&] { return done_.load(std::memory_order_acquire) == count; };
    if (spin_until(ready, kAwake)) return;
    while (!ready()) std::this_thread::yield();
}

}  // namespace fct::cpu
