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
    static bool here() { return begun_.load() && PyThread_get_thread_ident() != ender_; }

    [[noreturn]] static void stay() {
        leave();
        for (;;) ::pause();
    }

    // Called by Python's atexit, with the GIL: returns when no other thread is in a kernel or on its way back. The
    // limit is for a thread whose progress report hangs.
    static void begin() {
        ended_by(PyThread_get_thread_ident());
        pybind11::gil_scoped_release release;
        const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(10);
        while (inside_.load() > 0 && std::chrono::steady_clock::now() < limit)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }

    static void install() {
        // The threads that were in kernels are not in a forked child.
        if (pthread_atfork(nullptr, nullptr, [] { inside_.store(0); }) != 0) throw std::bad_alloc();
        pybind11::module_::import("atexit").attr("register")(pybind11::cpp_function(&AtExit::begin));
        // Loaded by a daemon thread while the exit functions run already, this one is not called any more. The main
        // thread counts as ended before the first of them, so one that is alive here will still come to it.
        const pybind11::object main = pybind11::module_::import("threading").attr("main_thread")();
        if (!main.attr("is_alive")().cast<bool>()) ended_by(main.attr("ident").cast<unsigned long>());
    }

  private:
    static void ended_by(unsigned long thread) {
        ender_ = thread;
        begun_.store(true);
    }

    static inline std::atomic<bool> begun_{false};
    static inline std::atomic<int> inside_{0};
    static inline unsigned long ender_ = 0;  // as PyThread_get_thread_ident() and Thread.ident have it
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
