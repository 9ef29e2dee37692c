// The only header a kernel file includes: one source, two back ends.
//   nvcc              real CUDA and the few inline-PTX wrappers below
//   g++ -DFCT_SIMT    tests/emulators/simt/simt.h, which runs every GPU thread as a fiber on the CPU and checks what it
//   does
// Rules for kernel files: all shared memory through GPU_DYN_SMEM and SmemCarver; launches through GPU_LAUNCH; no asm,
// no <<<>>>, no cuda_bf16.h. docs/build.md and tests/emulators/simt/README.md say what each rule buys.
#pragma once
#ifdef FCT_SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#define GPU_INLINE __device__ __forceinline__
#define GPU_DYN_SMEM(name) extern __shared__ __align__(128) unsigned char name[]
// GPU_LAUNCH(grid, block, smem, stream, (kernel<A, B>), args...): checked; throws with the kernel, its shape and the
// device. GPU_LAUNCH_COOPERATIVE also promises that all blocks run at once, which a grid-wide barrier needs.
#define GPU_LAUNCH(grid, block, smem, stream, kern, ...) \
    ::gpu::launch(#kern, false, grid, block, smem, stream, kern, __VA_ARGS__)
#define GPU_LAUNCH_COOPERATIVE(grid, block, smem, stream, kern, ...) \
    ::gpu::launch(#kern, true, grid, block, smem, stream, kern, __VA_ARGS__)

struct bf16 {
    uint16_t u;
};

namespace gpu {

inline void check(cudaError_t status, const std::string& what) {
    if (status == cudaSuccess) return;
    int device = -1;
    cudaGetDevice(&device);
    throw std::runtime_error(what + ", device " + std::to_string(device) + ": " + cudaGetErrorName(status) + ": " +
                             cudaGetErrorString(status));
}

// Makes a device current for a scope.
struct DeviceGuard {
    int before = -1;
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&before), "reading the current device");
        if (device != before) check(cudaSetDevice(device), "making device " + std::to_string(device) + " current");
    }
    ~DeviceGuard() { cudaSetDevice(before); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
};

template <class... Params, class... Args>
void launch(const char* name, bool cooperative, dim3 grid, dim3 block, size_t smem, cudaStream_t stream,
            void (*kernel)(Params...), Args&&... args) {
    const std::string what = std::string("kernel ") + name + ", grid (" + std::to_string(grid.x) + ", " +
                             std::to_string(grid.y) + ", " + std::to_string(grid.z) + "), block " +
                             std::to_string(block.x) + ", " + std::to_string(smem) + " bytes of shared memory";
    if (smem > 48 * 1024)
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(smem)),
              what);
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = smem;
    config.stream = stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = cooperative;
    config.attrs = &attribute;
    config.numAttrs = cooperative ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), what);
}

}  // namespace gpu

// Carves typed arrays out of dynamic shared memory, 16-byte aligned. The emulator puts red zones between them.
struct SmemCarver {
    unsigned char* p;
    GPU_INLINE explicit SmemCarver(unsigned char* base) : p(base) {}
    template <class T>
    GPU_INLINE T* take(int n) {
        T* taken = reinterpret_cast<T*>(p);
        p += (n * sizeof(T) + 15) / 16 * 16;
        return taken;
    }
};

GPU_INLINE uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies 16 bytes from global to shared memory past the registers; src_bytes 16, or 0 to fill with zeros.
GPU_INLINE void cp_async16(void* dst_smem, const void* src, int src_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(smem_address(dst_smem)), "l"(src),
                 "r"(src_bytes)
                 : "memory");
}
GPU_INLINE void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kPending>
GPU_INLINE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
GPU_INLINE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_address(row))
                 : "memory");
}
// d (16x8, f32) += a (16x16, bf16, row-major) * b (16x8, bf16, column-major).
GPU_INLINE void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d (16x8, s32) += a (16x32, s8, row-major) * b (32x8, s8, column-major).
GPU_INLINE void mma_s8_16832(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

GPU_INLINE uint32_t pack_bf16x2(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
GPU_INLINE float bf16_to_float(bf16 x) { return __uint_as_float(uint32_t(x.u) << 16); }
GPU_INLINE bf16 float_to_bf16(float x) { return bf16{static_cast<uint16_t>(pack_bf16x2(x, 0.0f))}; }
GPU_INLINE float half_to_float(uint16_t x) {
    float r;
    asm("cvt.f32.f16 %0, %1;\n" : "=f"(r) : "h"(x));
    return r;
}
GPU_INLINE uint16_t float_to_half(float x) {
    uint16_t r;
    asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(r) : "f"(x));
    return r;
}
// A load that another block's store, made before its fence, is visible to.
GPU_INLINE unsigned load_acquire(const unsigned* p) {
    unsigned r;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(r) : "l"(p) : "memory");
    return r;
}
#endif
