// A call of fct.transform_batch as it was made before. What Python has checked and chosen once stands here, so that a
// call with plain arrays pays microseconds less: with a small h and few rows, more than the kernels take.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#ifdef __linux__
#include <sched.h>
#endif

#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>

#include "cpu/rows.h"
#include "cpu/threads.h"
#include "cpu/transform.h"
#include "without_gil.h"

namespace fct {

namespace py = pybind11;

// What the choice of a backend and of the threads hangs on besides the arguments.
class Surroundings {
  public:
    Surroundings() : backend_(variable(kBackend)), threads_(variable(kThreads)), processors_(processors()) {}

    bool hold() const {
        return is(backend_, std::getenv(kBackend)) && is(threads_, std::getenv(kThreads)) &&
               processors() == processors_;
    }

  private:
    static constexpr const char *kBackend = "FCT_BACKEND", *kThreads = "FCT_NUM_THREADS";

    static std::optional<std::string> variable(const char* name) {
        const char* value = std::getenv(name);
        return value == nullptr ? std::nullopt : std::optional<std::string>(value);
    }
    static bool is(const std::optional<std::string>& then, const char* now) {
        return now == nullptr ? !then.has_value() : then.has_value() && *then == now;
    }
    // Of the affinity mask; -1 where that is not known.
    static int processors() {
#ifdef __linux__
        cpu_set_t mask;
        if (sched_getaffinity(0, sizeof mask, &mask) == 0) return CPU_COUNT(&mask);
#endif
        return -1;
    }

    std::optional<std::string> backend_, threads_;
    int processors_;
};

// Runs a call where everything is as it was and the arrays are plain: exact numpy arrays of native float32 or float16,
// C-contiguous, in memory that numpy itself holds (a mapped file may have been cut short), finite throughout. Of
// everything else it says nothing but "not here", and leaves it as it was: Python's checks alone refuse.
class RepeatedCall {
  public:
    // side: columns of the side-information, 0 for none. most_rows: above it, not here.
    RepeatedCall(py::object packed, int64_t old, int64_t side, int64_t out, int64_t most_rows, int threads)
        : packed_(std::move(packed)),
          transform_(packed_.cast<const cpu::PackedTransform*>()),
          old_(old),
          side_(side),
          out_(out),
          most_rows_(most_rows),
          threads_(threads) {}

    RepeatedCall(const RepeatedCall&) = delete;
    RepeatedCall& operator=(const RepeatedCall&) = delete;

    bool holds() const { return surroundings_.hold(); }

    // out: a float32 array to fill, or None for a new one. Returns the filled array; None for "not here".
    py::object run(const py::object& old, const py::object& side, const py::object& out,
                   const cpu::KeepGoing& going) const {
        cpu::RowsView from, with, to;
        const int64_t n = plain(old, old_, from);
        if (n <= 0 || n > most_rows_ || side.is_none() != (side_ == 0) || !surroundings_.hold()) return py::none();
        if (side_ == 0) {
            with = from;
        } else if (plain(side, side_, with) != n) {
            return py::none();
        }
        py::object filled = out;
        if (out.is_none()) {
            filled = py::array_t<float>({n, out_});
            plain(filled, out_, to);
        } else if (plain(out, out_, to) != n || to.dtype != cpu::DType::f32 || !is_writeable(out) ||
                   overlap(to, from, n) || overlap(to, with, n)) {
            return py::none();
        }
        bool finite, done = false;
        {
            WithoutGil without_gil;
            finite = are_finite(from, with, n);
            if (finite) done = transform_->run(from, with, to, n, threads_, going);
        }
        if (!finite) return py::none();
        if (!done) throw py::error_already_set();
        return filled;
    }

  private:
    // The array's rows as `to`; returns their number, -1 where it is no plain array of d columns.
    int64_t plain(const py::object& array, int64_t d, cpu::RowsView& to) const {
        const auto is_array = [this](const PyObject* x) { return Py_TYPE(x) == array_type_; };
        constexpr int kTidy = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
        if (!is_array(array.ptr())) return -1;
        const auto* facts = py::detail::array_proxy(array.ptr());
        if (facts->nd != 2 || facts->dimensions[1] != d || (facts->flags & kTidy) != kTidy) return -1;
        if (facts->descr != float32_.ptr() && facts->descr != float16_.ptr()) return -1;
        for (const PyObject* base = facts->base; base != nullptr; base = py::detail::array_proxy(base)->base)
            if (!is_array(base)) return -1;
        to.data = facts->data;
        to.dtype = facts->descr == float32_.ptr() ? cpu::DType::f32 : cpu::DType::f16;
        to.d = to.stride = d;
        return facts->dimensions[0];
    }

    static bool is_writeable(const py::object& array) {
        return (py::detail::array_proxy(array.ptr())->flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_) != 0;
    }

    static bool overlap(const cpu::RowsView& a, const cpu::RowsView& b, int64_t n) {
        const auto begin = [](const cpu::RowsView& x) { return reinterpret_cast<uintptr_t>(x.data); };
        const auto end = [&](const cpu::RowsView& x) {
            return begin(x) + static_cast<uintptr_t>(n * x.d * bytes_of(x));
        };
        return begin(a) < end(b) && begin(b) < end(a);
    }

    bool are_finite(const cpu::RowsView& old, const cpu::RowsView& side, int64_t n) const {
        constexpr int64_t kStep = 256;
        std::atomic<bool> bad{false};
        const auto check = [&](const cpu::RowsView& rows, int64_t from, int64_t to) {
            const auto* const data = static_cast<const char*>(rows.data) + from * rows.stride * bytes_of(rows);
            if (cpu::first_nonfinite_row(data, rows.dtype, to - from, rows.d, rows.stride) >= 0) bad = true;
        };
        cpu::Shared shared;
        const int workers = n > kStep ? threads_ : 1;
        cpu::parallel(workers, cpu::Join::as_awake, [&](int) {
            shared.run(n, kStep, workers, [&](int64_t from, int64_t to) {
                check(old, from, to);
                if (side_ != 0) check(side, from, to);
            });
        });
        return !bad;
    }

    static int64_t bytes_of(const cpu::RowsView& rows) { return kDTypes[static_cast<int>(rows.dtype)].bytes; }

    py::object packed_;  // keeps what transform_ points to
    const cpu::PackedTransform* transform_;
    // numpy's own objects, to be compared with: an array with another of the same meaning is not plain.
    const PyTypeObject* array_type_ = py::detail::npy_api::get().PyArray_Type_;
    py::dtype float32_ = py::dtype::of<float>(), float16_ = py::dtype("float16");
    Surroundings surroundings_;
    int64_t old_, side_, out_, most_rows_;
    int threads_;
};

}  // namespace fct
