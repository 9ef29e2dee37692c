// The CUDA section of fct._C, with the kernels run by the emulator on CPU memory: a device that is always there.
#include <dlfcn.h>
#include <pybind11/functional.h>

#include "../../../csrc/cuda/bind.h"
#include "simt.h"

namespace fct::cuda {

std::string why_not_here() { return ""; }
DeviceProperties device_properties(int device) {
    if (device != 0)
        throw std::runtime_error("reading the properties of device " + std::to_string(device) +
                                 ": cudaErrorInvalidDevice: invalid device ordinal");
    return {"emulator", 8, 0, 2, 99 * 1024, 1 << 20};
}
void refuse_after_fork() {}

}  // namespace fct::cuda

PYBIND11_MODULE(fct_simt, m) {
    fct::AtExit::install();
    fct::cuda::bind(m);
    m.def("schedule", [](int sched, uint64_t seed, int resident) {
        simt::config.sched = static_cast<decltype(simt::config.sched)>(sched);
        simt::config.seed = seed;
        simt::config.resident = resident;
    });
    // callback(mangled kernel name, grid, block, shared memory, cooperative, [argument bytes]) instead of the emulator.
    m.def("intercept", [](const pybind11::object& callback) {
        if (callback.is_none()) {
            simt::interceptor = nullptr;
            return;
        }
        simt::interceptor = [callback](void* kernel, dim3 g, dim3 b, size_t smem, bool cooperative,
                                       const std::vector<std::string>& args) {
            pybind11::gil_scoped_acquire gil;
            Dl_info info = {};
            if (!dladdr(kernel, &info) || !info.dli_sname) throw std::runtime_error("the kernel has no symbol");
            pybind11::list bytes;
            for (const std::string& arg : args) bytes.append(pybind11::bytes(arg));
            callback(info.dli_sname, pybind11::make_tuple(g.x, g.y, g.z), pybind11::make_tuple(b.x, b.y, b.z), smem,
                     cooperative, bytes);
        };
    });
    m.def("mma_rounding", [](int mode) { simt::config.mma_mode = mode; });
    m.def("reset_stats", [] { simt::stats = {}; });
    m.def("stats", [] {
        const simt::Stats& s = simt::stats;
        return pybind11::dict(pybind11::arg("mma") = s.mma, pybind11::arg("ldmatrix") = s.ldmatrix,
                              pybind11::arg("bank_extra") = s.bank_extra, pybind11::arg("cp_async") = s.cp_async,
                              pybind11::arg("barriers") = s.barriers, pybind11::arg("blocks") = s.blocks);
    });
}
