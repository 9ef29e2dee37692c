// The thread pool of every CPU kernel: one per process, grown on demand, made anew in a forked child.
#pragma once
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace fct::cpu {

// Calls fn(context, worker) once for each worker in [0, threads), worker 0 on the calling thread, and returns when
// all are done. Calls from several threads at once take turns; threads == 1 never waits. fn must not throw and must
// not call parallel itself.
void parallel(int threads, void (*fn)(void* context, int worker), void* context);

// The same for a lambda: parallel(threads, [&](int worker) { ... }).
template <class Fn>
void parallel(int threads, Fn&& fn) {
    using Plain = typename std::remove_reference<Fn>::type;
    parallel(
        threads, [](void* context, int worker) { (*static_cast<Plain*>(context))(worker); },
        const_cast<void*>(static_cast<const void*>(&fn)));
}

// A meeting point of the workers of one parallel call: nobody leaves wait() before all have come. Spins, since its
// users meet every few microseconds, and yields where processors are short.
class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait();

  private:
    const int threads_;
    std::atomic<int> waiting_{0};
    std::atomic<int> round_{0};
};

// Asked by long calls about every 100 ms, on the calling thread; returns false to stop (Ctrl-C).
struct KeepGoing {
    bool (*ask)(void* context) = nullptr;
    void* context = nullptr;
};

}  // namespace fct::cpu
