#include "cpu/threads.h"

#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace fct::cpu {
namespace {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Rounds of pause() before a waiting thread gives its processor away: some tens of microseconds, so that calls that
// follow each other closely (single queries) find the workers awake.
constexpr int kSpins = 1500;

class Pool {
  public:
    const pid_t owner = getpid();

    void run(int threads, void (*fn)(void*, int), void* context) {
        std::lock_guard<std::mutex> turn(turn_);
        while (static_cast<int>(workers_.size()) < threads - 1) {
            const int worker = static_cast<int>(workers_.size()) + 1;
            const uint64_t seen = job_.load();
            workers_.emplace_back([this, worker, seen] { work(worker, seen); });
            workers_.back().detach();
        }
        fn_ = fn;
        context_ = context;
        threads_ = threads;
        // Every worker of the pool answers every job, also those that have no part in it, so that none can sleep
        // through one job and wake in the fields of the next.
        pending_.store(static_cast<int>(workers_.size()));
        {
            std::lock_guard<std::mutex> lock(sleep_);
            job_.fetch_add(1);
        }
        wake_.notify_all();
        fn(context, 0);
        for (int i = 0; pending_.load() != 0; ++i) {
            if (i < kSpins) {
                pause();
            } else {
                std::this_thread::yield();
            }
        }
    }

  private:
    void work(int worker, uint64_t seen) {
        for (;;) {
            for (int i = 0; i < kSpins && job_.load() == seen; ++i) pause();
            if (job_.load() == seen) {
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, [&] { return job_.load() != seen; });
            }
            ++seen;
            if (worker < threads_) fn_(context_, worker);
            pending_.fetch_sub(1);
        }
    }

    std::mutex turn_, sleep_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::atomic<uint64_t> job_{0};
    std::atomic<int> pending_{0};
    void (*fn_)(void*, int) = nullptr;
    void* context_ = nullptr;
    int threads_ = 0;
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

void parallel(int threads, void (*fn)(void*, int), void* context) {
    if (threads <= 1) {
        fn(context, 0);
        return;
    }
    pool().run(threads, fn, context);
}

void Barrier::wait() {
    const int round = round_.load();
    if (waiting_.fetch_add(1) + 1 == threads_) {
        waiting_.store(0);
        round_.store(round + 1);
        return;
    }
    for (int i = 0; round_.load() == round; ++i) {
        if (i < kSpins) {
            pause();
        } else {
            std::this_thread::yield();
        }
    }
}

}  // namespace fct::cpu
