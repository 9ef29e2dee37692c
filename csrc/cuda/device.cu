// What the machine has. The CUDA runtime is linked statically and loads the driver at run time, so that all of this
// answers, in words, where there is none.
#include <unistd.h>

#include <mutex>

#include "cuda_ops.h"
#include "gpu_api.h"

namespace fct::cuda {
namespace {

std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

}  // namespace

// cudaGetDeviceCount initialises no context, and a driver that is missing or too old is an answer like any other.
std::string why_not_here() {
    int driver = 0, runtime = 0, count = 0;
    cudaRuntimeGetVersion(&runtime);
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
        cudaGetLastError();
        return "no CUDA driver on this machine (libcuda.so.1)";
    }
    const cudaError_t status = cudaGetDeviceCount(&count);
    cudaGetLastError();  // leaves no error behind for the next launch's check
    if (driver / 1000 < runtime / 1000)
        return "the CUDA driver is too old: it supports CUDA " + version(driver) + ", this build needs " +
               std::to_string(runtime / 1000) + ".0";
    if (status != cudaSuccess) return std::string("no CUDA device: ") + cudaGetErrorString(status);
    return count ? "" : "no CUDA device";
}

DeviceProperties device_properties(int device) {
    refuse_after_fork();
    cudaDeviceProp p;
    gpu::check(cudaGetDeviceProperties(&p, device), "reading the properties of device " + std::to_string(device));
    return {
        p.name, p.major, p.minor, p.multiProcessorCount, p.sharedMemPerBlockOptin, static_cast<size_t>(p.l2CacheSize)};
}

void refuse_after_fork() {
    static std::once_flag once;
    static pid_t first;
    std::call_once(once, [] { first = getpid(); });
    if (getpid() != first)
        throw std::runtime_error("CUDA was first used in process " + std::to_string(first) +
                                 ", before this one was forked from it; start workers with 'spawn' or 'forkserver'");
}

}  // namespace fct::cuda
