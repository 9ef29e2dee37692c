// Gives the GIL away for as long as a kernel runs, and survives the end of the interpreter.
#pragma once
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <new>
#include <thread>

namespace fct {

// A thread that asks for the GIL once the interpreter is being finalised is ended on the spot by CPython before 3.14,
// its C++ frames unwound while pool threads still work for them: std::terminate at best. So kernels in daemon threads
// are told to stop when the interpreter's exit functions run, are waited for, and their threads never come back to
// Python.
class AtExit {
  public:
    static void enter() { inside_.fetch_add(1); }
    static void leave() { inside_.fetch_sub(1); }

    // Whether the calling thread may not go back to Python. The one that ends the interpreter may.
    static bool here() { return begun_.load() && std::this_thread::get_id() != ender_; }

    [[noreturn]] static void stay() {
        leave();
        for (;;) ::pause();
    }

    // Called by Python's atexit, with the GIL: returns when no other thread is in a kernel or on its way back. The
    // limit is for a thread whose progress report hangs.
    static void begin() {
        ender_ = std::this_thread::get_id();
        begun_.store(true);
        pybind11::gil_scoped_release release;
        const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(10);
        while (inside_.load() > 0 && std::chrono::steady_clock::now() < limit)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }

    static void install() {
        // The threads that were in kernels are not in a forked child.
        if (pthread_atfork(nullptr, nullptr, [] { inside_.store(0); }) != 0) throw std::bad_alloc();
        pybind11::module_::import("atexit").attr("register")(pybind11::cpp_function(&AtExit::begin));
    }

  private:
    static inline std::atomic<bool> begun_{false};
    static inline std::atomic<int> inside_{0};
    static inline std::thread::id ender_;
};

// Gives the GIL away for as long as it lives.
class WithoutGil {
  public:
    WithoutGil() {
        AtExit::enter();
        state_ = PyEval_SaveThread();
        if (AtExit::here()) AtExit::stay();
    }
    ~WithoutGil() {
        if (AtExit::here()) AtExit::stay();
        PyEval_RestoreThread(state_);
        AtExit::leave();
    }
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;

  private:
    PyThreadState* state_;
};

}  // namespace fct
