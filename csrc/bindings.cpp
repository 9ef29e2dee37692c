// With cuda/bind.h, repeated_call.h and without_gil.h the only file that sees pybind11. Python passes addresses, sizes
// and strides that src/fct/ops has checked.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/checksum.h"
#include "cpu/isa.h"
#include "cpu/peaks.h"
#include "cpu/rows.h"
#ifdef FCT_WITH_CUDA
#include "cuda/bind.h"
#endif
#include "cpu/topk.h"
#include "cpu/transform.h"
#include "repeated_call.h"
#include "without_gil.h"

namespace py = pybind11;
using fct::AtExit;
using fct::WithoutGil;
using fct::cpu::DType;

namespace {

// ---- rows ----
void bind_rows(py::module_& m) {
    // numpy's own ways to an address take microseconds, as much as a small h takes for a row.
    m.def(
        "array_address", [](const py::array& array) { return reinterpret_cast<uintptr_t>(array.data()); },
        py::arg("array").noconvert());
    m.def(
        "first_nonfinite_row",
        [](uintptr_t data, int dtype, int64_t n, int64_t d, int64_t row_stride) {
            WithoutGil without_gil;
            return fct::cpu::first_nonfinite_row(reinterpret_cast<const void*>(data), static_cast<DType>(dtype), n, d,
                                                 row_stride);
        },
        py::arg("data"), py::arg("dtype"), py::arg("n"), py::arg("d"), py::arg("row_stride"));
    m.def(
        "nonfinite_rows",
        [](uintptr_t data, int dtype, int64_t n, int64_t d, int64_t row_stride, uintptr_t flags) {
            WithoutGil without_gil;
            return fct::cpu::nonfinite_rows(reinterpret_cast<const void*>(data), static_cast<DType>(dtype), n, d,
                                            row_stride, reinterpret_cast<uint8_t*>(flags));
        },
        py::arg("data"), py::arg("dtype"), py::arg("n"), py::arg("d"), py::arg("row_stride"), py::arg("flags"));
    m.def(
        "scan_rows",
        [](uintptr_t data, int dtype, int64_t n, int64_t d, uintptr_t flags, fct::cpu::Xxh64& checksum) {
            WithoutGil without_gil;
            return fct::cpu::scan_rows(reinterpret_cast<const void*>(data), static_cast<DType>(dtype), n, d,
                                       reinterpret_cast<uint8_t*>(flags), checksum);
        },
        py::arg("data"), py::arg("dtype"), py::arg("n"), py::arg("d"), py::arg("flags"), py::arg("checksum"));
}

// ---- machine ----
fct::cpu::Isa isa_of(int isa) {
    if (isa < 0 || isa > static_cast<int>(fct::cpu::detected_isa()))
        throw std::invalid_argument("isa: expected a level this processor has, got " + std::to_string(isa));
    return static_cast<fct::cpu::Isa>(isa);
}

// Asked on the calling thread, without the GIL; false once a signal's Python handler or `report` raised, whose
// exception is then set. Elsewhere than on the main thread Python delivers no signals. report: called with the share
// done, or null.
bool no_exception(void* report, double share) {
    if (AtExit::here()) return false;
    py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) return false;
    if (report == nullptr) return true;
    PyObject* answer = PyObject_CallFunction(static_cast<PyObject*>(report), "d", share);
    Py_XDECREF(answer);
    return answer != nullptr;
}

// The caller holds `report`, a callable or None, while this is in use.
fct::cpu::KeepGoing keep_going(const py::object& report) {
    return {no_exception, report.is_none() ? nullptr : report.ptr()};
}

template <int kCount>
py::tuple names_of(const char* const (&table)[kCount]) {
    py::tuple names(kCount);
    for (int i = 0; i < kCount; ++i) names[static_cast<size_t>(i)] = table[i];
    return names;
}

void bind_machine(py::module_& m) {
    m.attr("metrics") = names_of(fct::kMetrics);
    m.attr("precisions") = names_of(fct::kPrecisionNames);
    m.attr("shadow_kinds") = names_of(fct::kShadowKinds);
    py::list names;
    for (int i = 0; i < fct::cpu::kIsas; ++i) names.append(fct::cpu::isa_name(static_cast<fct::cpu::Isa>(i)));
    m.attr("isa_names") = py::tuple(names);
    py::list dtypes;
    for (const auto& facts : fct::kDTypes) dtypes.append(py::make_tuple(facts.name, facts.bytes));
    m.attr("dtypes") = py::tuple(dtypes);
    m.def("detected_isa", [] { return static_cast<int>(fct::cpu::detected_isa()); });
    m.def("has_amx_bf16", &fct::cpu::has_amx_bf16);
    m.def(
        "peak_ops",
        [](int precision, int isa, int threads, double seconds) {
            const fct::cpu::Isa level = isa_of(isa);
            WithoutGil without_gil;
            return fct::cpu::peak_ops(static_cast<fct::cpu::Precision>(precision), level, threads, seconds);
        },
        py::arg("precision"), py::arg("isa"), py::arg("threads"), py::arg("seconds"));
    m.def(
        "read_bandwidth",
        [](int64_t bytes, int threads, double seconds) {
            WithoutGil without_gil;
            return fct::cpu::read_bandwidth(bytes, threads, seconds);
        },
        py::arg("bytes"), py::arg("threads"), py::arg("seconds"));
}

// ---- transform ----
// (weight, scale, bias, in_mul, in_add, d_in, d_out, relu, precision): addresses as ints, 0 for none.
using LayerTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, bool, int>;
// (data, dtype, d, row_stride, scale, scale_row, scale_column)
using RowsTuple = std::tuple<uintptr_t, int, int64_t, int64_t, uintptr_t, int64_t, int64_t>;

std::vector<fct::cpu::LayerSpec> layers_of(const std::vector<LayerTuple>& from) {
    std::vector<fct::cpu::LayerSpec> layers;
    for (const auto& [weight, scale, bias, in_mul, in_add, d_in, d_out, relu, precision] : from)
        layers.push_back({reinterpret_cast<const void*>(weight), reinterpret_cast<const float*>(scale),
                          reinterpret_cast<const float*>(bias), reinterpret_cast<const float*>(in_mul),
                          reinterpret_cast<const float*>(in_add), d_in, d_out, relu,
                          static_cast<fct::cpu::Precision>(precision)});
    return layers;
}

// The same, and (offset, offset_row, offset_column)
using CodesTuple =
    std::tuple<uintptr_t, int, int64_t, int64_t, uintptr_t, int64_t, int64_t, uintptr_t, int64_t, int64_t>;

fct::cpu::RowsView rows_of(const CodesTuple& from) {
    const auto& [data, dtype, d, stride, scale, scale_row, scale_column, offset, offset_row, offset_column] = from;
    return {reinterpret_cast<void*>(data),
            static_cast<DType>(dtype),
            d,
            stride,
            reinterpret_cast<const float*>(scale),
            scale_row,
            scale_column,
            reinterpret_cast<const float*>(offset),
            offset_row,
            offset_column};
}

void bind_transform(py::module_& m) {
    using fct::cpu::PackedTransform;
    py::class_<PackedTransform>(m, "PackedTransform")
        .def(py::init([](const std::vector<LayerTuple>& old, const std::vector<LayerTuple>& side,
                         const std::vector<LayerTuple>& mixer, const std::vector<LayerTuple>& skip, bool side_is_old,
                         float length, int isa) {
                 const fct::cpu::Isa level = isa_of(isa);
                 const fct::cpu::NetworkSpec spec{layers_of(old),  layers_of(side), layers_of(mixer),
                                                  layers_of(skip), side_is_old,     length};
                 WithoutGil without_gil;
                 return std::make_unique<PackedTransform>(spec, level);
             }),
             py::arg("old"), py::arg("side"), py::arg("mixer"), py::arg("skip"), py::arg("side_is_old"),
             py::arg("length"), py::arg("isa"))
        .def(
            "run",
            [](const PackedTransform& self, const CodesTuple& old, const CodesTuple& side, const CodesTuple& out,
               int64_t n, int threads, const py::object& report) {
                const fct::cpu::KeepGoing going = keep_going(report);
                bool done;
                {
                    WithoutGil without_gil;
                    done = self.run(rows_of(old), rows_of(side), rows_of(out), n, threads, going);
                }
                if (!done) throw py::error_already_set();
            },
            py::arg("old"), py::arg("side"), py::arg("out"), py::arg("n"), py::arg("threads"),
            py::arg("report") = py::none())
        .def(
            "read_weights",
            [](const PackedTransform& self, int threads) {
                WithoutGil without_gil;
                return self.read_weights(threads);
            },
            py::arg("threads"))
        .def_property_readonly("weight_bytes", &PackedTransform::weight_bytes)
        .def_property_readonly("rows_per_block", &PackedTransform::rows_per_block);
    using fct::RepeatedCall;
    py::class_<RepeatedCall>(m, "RepeatedCall")
        .def(py::init<py::object, int64_t, int64_t, int64_t, int64_t, int>(), py::arg("packed"), py::arg("old"),
             py::arg("side"), py::arg("out"), py::arg("most_rows"), py::arg("threads"))
        .def("holds", &RepeatedCall::holds)
        .def(
            "run",
            [](const RepeatedCall& self, const py::object& old, const py::object& side, const py::object& out) {
                return self.run(old, side, out, keep_going(py::none()));
            },
            py::arg("old"), py::arg("side"), py::arg("out"));
}

// ---- topk ----
fct::cpu::RowSource source_of(const RowsTuple& from, int64_t n) {
    const auto& [data, dtype, d, stride, scale, scale_row, scale_column] = from;
    return {reinterpret_cast<const void*>(data),
            static_cast<DType>(dtype),
            n,
            d,
            stride,
            reinterpret_cast<const float*>(scale),
            scale_row,
            scale_column};
}

// (head, down, up, loss, tails): addresses, head 0 where there are no levels.
using LevelsTuple = std::tuple<int64_t, uintptr_t, uintptr_t, double, uintptr_t>;

fct::cpu::Levels levels_of(const LevelsTuple& from) {
    const auto& [head, down, up, loss, tails] = from;
    return {head, reinterpret_cast<const float*>(down), reinterpret_cast<const float*>(up), loss,
            reinterpret_cast<const uint8_t*>(tails)};
}

void bind_topk(py::module_& m) {
    using fct::cpu::Metric;
    m.attr("shadow_tile") = fct::cpu::kTile;
    m.attr("shadow_meta") = fct::cpu::kMeta;
    m.attr("shadow_head_meta") = fct::cpu::kHeadMeta;
    m.attr("shadow_tail_facts") = sizeof(fct::cpu::TailFacts);
    m.attr("shadow_max_dim") = fct::cpu::kShadowMaxDim;
    m.def(
        "shadow_pack",
        [](const RowsTuple& gallery, int64_t n, int metric, int64_t first, int64_t count, uintptr_t shift,
           const LevelsTuple& levels, uintptr_t tiles, uintptr_t meta, uintptr_t tails, uintptr_t low,
           uintptr_t high_error, int threads, int isa) {
            const fct::cpu::Isa level = isa_of(isa);
            WithoutGil without_gil;
            const auto* const from = reinterpret_cast<const float*>(shift);
            auto* const bytes = reinterpret_cast<uint8_t*>(tiles);
            auto* const facts = reinterpret_cast<float*>(meta);
            const auto by = static_cast<Metric>(metric);
            const fct::cpu::Levels in_levels = levels_of(levels);
            if (in_levels.head > 0) {
                fct::cpu::shadow_pack_levels(source_of(gallery, n), by, first, count, from, in_levels, bytes, facts,
                                             reinterpret_cast<uint8_t*>(tails), threads, level);
            } else {
                fct::cpu::shadow_pack(source_of(gallery, n), by, first, count, from, bytes, facts,
                                      reinterpret_cast<uint8_t*>(low), reinterpret_cast<float*>(high_error), threads,
                                      level);
            }
        },
        py::arg("gallery"), py::arg("n"), py::arg("metric"), py::arg("first"), py::arg("count"), py::arg("shift"),
        py::arg("levels"), py::arg("tiles"), py::arg("meta"), py::arg("tails"), py::arg("low"), py::arg("high_error"),
        py::arg("threads"), py::arg("isa"));
    m.def(
        "topk",
        [](const RowsTuple& queries, int64_t n_queries, const RowsTuple& gallery, int64_t n_gallery, uintptr_t tiles,
           uintptr_t meta, uintptr_t shift, const LevelsTuple& levels, uintptr_t low, uintptr_t high_error, int metric,
           int64_t k, int64_t self, uintptr_t distances, uintptr_t indices, int threads, int isa,
           const py::object& report) {
            const fct::cpu::Isa level = isa_of(isa);
            const fct::cpu::KeepGoing going = keep_going(report);
            fct::cpu::SearchCounts counts;
            bool done;
            {
                WithoutGil without_gil;
                done =
                    fct::cpu::topk(source_of(queries, n_queries), source_of(gallery, n_gallery),
                                   {reinterpret_cast<const uint8_t*>(tiles), reinterpret_cast<const float*>(meta),
                                    reinterpret_cast<const float*>(shift), levels_of(levels),
                                    reinterpret_cast<const uint8_t*>(low), reinterpret_cast<const float*>(high_error)},
                                   static_cast<Metric>(metric), k, self, reinterpret_cast<float*>(distances),
                                   reinterpret_cast<int64_t*>(indices), threads, level, going, &counts);
            }
            if (!done) throw py::error_already_set();
            return std::make_tuple(counts.rescored, counts.tails, counts.exhausted);
        },
        py::arg("queries"), py::arg("n_queries"), py::arg("gallery"), py::arg("n_gallery"), py::arg("tiles"),
        py::arg("meta"), py::arg("shift"), py::arg("levels"), py::arg("low"), py::arg("high_error"), py::arg("metric"),
        py::arg("k"), py::arg("self"), py::arg("distances"), py::arg("indices"), py::arg("threads"), py::arg("isa"),
        py::arg("report") = py::none());
    m.def(
        "ranks",
        [](const RowsTuple& queries, int64_t n_queries, const RowsTuple& gallery, int64_t n_gallery, uintptr_t codes,
           uintptr_t starts, uintptr_t members, int metric, int64_t self, uintptr_t first, uintptr_t precision,
           int threads, int isa, const py::object& report) {
            const fct::cpu::Isa level = isa_of(isa);
            const fct::cpu::KeepGoing going = keep_going(report);
            bool done;
            {
                WithoutGil without_gil;
                done = fct::cpu::ranks(
                    source_of(queries, n_queries), source_of(gallery, n_gallery),
                    reinterpret_cast<const int64_t*>(codes), reinterpret_cast<const int64_t*>(starts),
                    reinterpret_cast<const int64_t*>(members), static_cast<Metric>(metric), self,
                    reinterpret_cast<int64_t*>(first), reinterpret_cast<double*>(precision), threads, level, going);
            }
            if (!done) throw py::error_already_set();
        },
        py::arg("queries"), py::arg("n_queries"), py::arg("gallery"), py::arg("n_gallery"), py::arg("codes"),
        py::arg("starts"), py::arg("members"), py::arg("metric"), py::arg("self"), py::arg("first"),
        py::arg("precision"), py::arg("threads"), py::arg("isa"), py::arg("report") = py::none());
}

// ---- checksum ----
void bind_checksum(py::module_& m) {
    py::class_<fct::cpu::Xxh64>(m, "Xxh64")
        .def(py::init<uint64_t>(), py::arg("seed") = 0)
        .def(
            "update",
            [](fct::cpu::Xxh64& self, uintptr_t data, size_t bytes) {
                WithoutGil without_gil;
                self.update(reinterpret_cast<const void*>(data), bytes);
            },
            py::arg("data"), py::arg("bytes"))
        .def("digest", &fct::cpu::Xxh64::digest);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of fct.";
    m.attr("version") = FCT_VERSION;
#ifdef FCT_CUDA_WHY_NOT
    m.attr("cuda_why_not") = FCT_CUDA_WHY_NOT;
#else
    m.attr("cuda_why_not") = "";
#endif
#ifdef FCT_WITH_CUDA
    m.attr("cuda_architectures") = FCT_CUDA_ARCHITECTURES;
    fct::cuda::bind(m);
#else
    m.attr("cuda_architectures") = "";
#endif
    AtExit::install();
    bind_checksum(m);  // before what takes one
    bind_rows(m);
    bind_machine(m);
    bind_transform(m);
    bind_topk(m);
}
