// The only file that sees pybind11. Python passes addresses, sizes and strides that src/fct/ops has checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/rows.h"

namespace py = pybind11;
using fct::cpu::DType;

namespace {

// ---- rows ----
void bind_rows(py::module_& m) {
    m.def(
        "first_nonfinite_row",
        [](uintptr_t data, int dtype, int64_t n, int64_t d, int64_t row_stride) {
            py::gil_scoped_release release;
            return fct::cpu::first_nonfinite_row(reinterpret_cast<const void*>(data), static_cast<DType>(dtype), n,
                                                 d, row_stride);
        },
        py::arg("data"), py::arg("dtype"), py::arg("n"), py::arg("d"), py::arg("row_stride"));
    m.def(
        "nonfinite_rows",
        [](uintptr_t data, int dtype, int64_t n, int64_t d, int64_t row_stride, uintptr_t flags) {
            py::gil_scoped_release release;
            return fct::cpu::nonfinite_rows(reinterpret_cast<const void*>(data), static_cast<DType>(dtype), n, d,
                                            row_stride, reinterpret_cast<uint8_t*>(flags));
        },
        py::arg("data"), py::arg("dtype"), py::arg("n"), py::arg("d"), py::arg("row_stride"), py::arg("flags"));
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
    bind_rows(m);
}
