// Runs CUDA kernels on one OS thread: one fiber per GPU thread, a randomised schedule, checked warp collectives and
// barriers, asynchronous copies that land at a random legal moment. This is what gpu_api.h includes under -DFCT_SIMT;
// the runtime, simt_rt.cpp, is compiled WITHOUT sanitizers (it talks to ASan and TSan through weak symbols).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) int2 {
    int x, y;
};
struct bf16 {
    uint16_t u;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
typedef void* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
    memset(p, value, bytes);
    return cudaSuccess;
}
namespace gpu {
inline void check(cudaError_t status, const std::string& what) {
    if (status != cudaSuccess) throw std::runtime_error(what);
}
struct DeviceGuard {
    explicit DeviceGuard(int) {}
};
}  // namespace gpu

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ static  // works, but stale between blocks and only ASan-red-zoned: prefer GPU_DYN_SMEM + SmemCarver
#define GPU_INLINE inline
#define GPU_DYN_SMEM(name) unsigned char* name = simt::dyn_smem()
#define GPU_LAUNCH(grid, block, smem, stream, kern, ...) \
    ((void)(stream), simt::launch_kernel(grid, block, smem, false, kern, __VA_ARGS__))
// All blocks of a cooperative launch are resident: a grid-wide barrier may wait for them.
#define GPU_LAUNCH_COOPERATIVE(grid, block, smem, stream, kern, ...) \
    ((void)(stream), simt::launch_kernel(grid, block, smem, true, kern, __VA_ARGS__))

namespace simt {
struct Loc {
    const char* file;
    int line;
    static constexpr Loc here(const char* f = __builtin_FILE(), int l = __builtin_LINE()) { return {f, l}; }
};
struct Ctx {
    uint3 tid, bid;
    dim3 bdim, gdim;
};  // prefix of a fiber
extern Ctx* cur;
struct Config {  // also read from SIMT_SEED, SIMT_SCHED, SIMT_RESIDENT, SIMT_MMA
    uint64_t seed = 1;
    enum { InOrder, Random, RunAhead, Reverse } sched = Random;
    int resident = 1;         // blocks interleaved at once
    bool strict_exit = true;  // a barrier with exited threads is an error
    int mma_mode = 0;         // 0: exact sum, one rounding; 1: truncated sum (tensor-core like)
};
struct Stats {
    uint64_t switches, barriers, collectives, mma, ldmatrix, bank_extra, cp_async, blocks;
};
extern Config config;
extern Stats stats;
// throws std::runtime_error on deadlock, divergent collective, misalignment, shared overflow ...
void launch(dim3 grid, dim3 block, size_t smem, const std::function<void()>& body, bool cooperative = false);

// Set, it takes the emulator's place: the kernel's function (dladdr names it), the launch, each argument's bytes.
using Interceptor = std::function<void(void*, dim3, dim3, size_t, bool, const std::vector<std::string>&)>;
extern Interceptor interceptor;
template <class T>
std::string bytes_of(const T& value) {
    return {reinterpret_cast<const char*>(&value), sizeof value};
}
template <class... Params, class... Args>
void launch_kernel(dim3 grid, dim3 block, size_t smem, bool cooperative, void (*kernel)(Params...), Args&&... args) {
    std::tuple<Params...> params(static_cast<Params>(args)...);
    if (interceptor) {
        std::apply(
            [&](const auto&... p) {
                interceptor(reinterpret_cast<void*>(kernel), grid, block, smem, cooperative, {bytes_of(p)...});
            },
            params);
        return;
    }
    launch(
        grid, block, smem, [&] { std::apply(kernel, params); }, cooperative);
}

enum Op {
    SHFL_IDX,
    SHFL_UP,
    SHFL_DOWN,
    SHFL_XOR,
    BALLOT,
    MATCH_ANY,
    RED_ADD,
    RED_MIN,
    RED_MAX,
    SYNCWARP,
    MMA16816,
    MMA_S8_16832,
    LDM4,
    LDM4T
};
struct WarpArgs {
    uint64_t v;
    int arg, width;
    const void* ptr;
    const uint32_t* a;
    const uint32_t* b;
    float* d;
    int* di;
    uint32_t* r;
};
void warp_op(Op op, unsigned mask, WarpArgs& w, Loc loc);
void block_barrier(int id, int count, Loc loc, int pred_kind, int pred, int* result);
void yield();
unsigned char* dyn_smem();
void* smem_take(unsigned char*& p, size_t bytes, Loc loc);
void cp_async(void* dst, const void* src, int bytes, int src_bytes, Loc loc);
void cp_commit();
void cp_wait(int n);
void fence();
[[noreturn]] void fail(const std::string& msg, Loc loc);
template <class T>
inline uint64_t to_bits(T v) {
    static_assert(sizeof(T) <= 8);
    uint64_t b = 0;
    memcpy(&b, &v, sizeof(T));
    return b;
}
template <class T>
inline T from_bits(uint64_t b) {
    T v;
    memcpy(&v, &b, sizeof(T));
    return v;
}
template <class T>
inline T shfl(Op op, unsigned m, T v, int arg, int width, Loc loc) {
    WarpArgs w{};
    w.v = to_bits(v);
    w.arg = arg;
    w.width = width;
    warp_op(op, m, w, loc);
    return from_bits<T>(w.v);
}
}  // namespace simt

#define threadIdx (simt::cur->tid)
#define blockIdx (simt::cur->bid)
#define blockDim (simt::cur->bdim)
#define gridDim (simt::cur->gdim)
#define SIMT_LOC simt::Loc loc = simt::Loc::here()
inline void __syncthreads(SIMT_LOC) { simt::block_barrier(0, -1, loc, 0, 0, nullptr); }
inline int __syncthreads_count(int p, SIMT_LOC) {
    int r;
    simt::block_barrier(0, -1, loc, 1, p, &r);
    return r;
}
inline int __syncthreads_or(int p, SIMT_LOC) { return __syncthreads_count(p != 0, loc) > 0; }
inline int __syncthreads_and(int p, SIMT_LOC) { return __syncthreads_count(p == 0, loc) == 0; }
inline void named_barrier_sync(int id, int count, SIMT_LOC) { simt::block_barrier(id, count, loc, 0, 0, nullptr); }
inline void __syncwarp(unsigned m = 0xffffffffu, SIMT_LOC) {
    simt::WarpArgs w{};
    simt::warp_op(simt::SYNCWARP, m, w, loc);
}
template <class T>
T __shfl_sync(unsigned m, T v, int s, int width = 32, SIMT_LOC) {
    return simt::shfl(simt::SHFL_IDX, m, v, s, width, loc);
}
template <class T>
T __shfl_up_sync(unsigned m, T v, unsigned s, int width = 32, SIMT_LOC) {
    return simt::shfl(simt::SHFL_UP, m, v, (int)s, width, loc);
}
template <class T>
T __shfl_down_sync(unsigned m, T v, unsigned s, int width = 32, SIMT_LOC) {
    return simt::shfl(simt::SHFL_DOWN, m, v, (int)s, width, loc);
}
template <class T>
T __shfl_xor_sync(unsigned m, T v, int s, int width = 32, SIMT_LOC) {
    return simt::shfl(simt::SHFL_XOR, m, v, s, width, loc);
}
inline unsigned __ballot_sync(unsigned m, int p, SIMT_LOC) {
    simt::WarpArgs w{};
    w.v = p != 0;
    simt::warp_op(simt::BALLOT, m, w, loc);
    return (unsigned)w.v;
}
inline int __any_sync(unsigned m, int p, SIMT_LOC) { return __ballot_sync(m, p, loc) != 0; }
inline int __all_sync(unsigned m, int p, SIMT_LOC) { return __ballot_sync(m, !p, loc) == 0; }
template <class T>
unsigned __match_any_sync(unsigned m, T v, SIMT_LOC) {
    simt::WarpArgs w{};
    w.v = simt::to_bits(v);
    simt::warp_op(simt::MATCH_ANY, m, w, loc);
    return (unsigned)w.v;
}
inline int __reduce_add_sync(unsigned m, int v, SIMT_LOC) {
    simt::WarpArgs w{};
    w.v = (int64_t)v;
    simt::warp_op(simt::RED_ADD, m, w, loc);
    return (int)w.v;
}
inline int __reduce_min_sync(unsigned m, int v, SIMT_LOC) {
    simt::WarpArgs w{};
    w.v = (int64_t)v;
    simt::warp_op(simt::RED_MIN, m, w, loc);
    return (int)w.v;
}
inline int __reduce_max_sync(unsigned m, int v, SIMT_LOC) {
    simt::WarpArgs w{};
    w.v = (int64_t)v;
    simt::warp_op(simt::RED_MAX, m, w, loc);
    return (int)w.v;
}

template <class T>
T atomicAdd(T* p, T v) {
    if constexpr (std::is_integral_v<T>)
        return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
    else {
        T o;
        __atomic_load(p, &o, __ATOMIC_RELAXED);
        T n;
        do n = o + v;
        while (!__atomic_compare_exchange(p, &o, &n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
        return o;
    }
}
template <class T>
T atomicMax(T* p, T v) {
    T o = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (o < v && !__atomic_compare_exchange_n(p, &o, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return o;
}
template <class T>
T atomicMin(T* p, T v) {
    T o = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (v < o && !__atomic_compare_exchange_n(p, &o, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return o;
}
template <class T>
T atomicExch(T* p, T v) {
    return __atomic_exchange_n(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicCAS(T* p, T c, T v) {
    __atomic_compare_exchange_n(p, &c, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return c;
}
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() { simt::fence(); }
inline void __nanosleep(unsigned) { simt::yield(); }
template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T __ldcs(const T* p) {
    return *p;
}
template <class T>
void __stcs(T* p, T v) {
    *p = v;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline float __uint_as_float(uint32_t u) { return simt::from_bits<float>(u); }
inline uint32_t __float_as_uint(float f) { return (uint32_t)simt::to_bits(f); }
inline int __float_as_int(float f) { return (int)simt::to_bits(f); }
inline float __int_as_float(int u) { return simt::from_bits<float>((uint32_t)u); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return std::exp(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
using std::isnan;
using std::max;
using std::min;

struct SmemCarver {
    unsigned char* p;
    explicit SmemCarver(unsigned char* base) : p(base) {}
    template <class T>
    T* take(int n, SIMT_LOC) {
        return static_cast<T*>(simt::smem_take(p, n * sizeof(T), loc));
    }
};
inline void cp_async16(void* dst, const void* src, int src_bytes, SIMT_LOC) {
    simt::cp_async(dst, src, 16, src_bytes, loc);
}
inline void cp_async_commit() { simt::cp_commit(); }
template <int N>
inline void cp_async_wait() {
    simt::cp_wait(N);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_LOC) {
    simt::WarpArgs w{};
    w.ptr = row;
    w.r = r;
    simt::warp_op(simt::LDM4, ~0u, w, loc);
}
inline void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_LOC) {
    uint32_t b[2] = {b0, b1};
    simt::WarpArgs w{};
    w.a = a;
    w.b = b;
    w.d = d;
    simt::warp_op(simt::MMA16816, ~0u, w, loc);
}
inline void mma_s8_16832(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_LOC) {
    uint32_t b[2] = {b0, b1};
    simt::WarpArgs w{};
    w.a = a;
    w.b = b;
    w.di = d;
    simt::warp_op(simt::MMA_S8_16832, ~0u, w, loc);
}
inline float bf16_to_float(bf16 x) { return __uint_as_float(uint32_t(x.u) << 16); }
inline uint16_t simt_f2bf(float f) {
    uint32_t u = __float_as_uint(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
inline uint32_t pack_bf16x2(float lo, float hi) { return simt_f2bf(lo) | (uint32_t(simt_f2bf(hi)) << 16); }
inline bf16 float_to_bf16(float x) { return bf16{simt_f2bf(x)}; }
inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    const float magnitude =
        exponent ? std::ldexp(float(mantissa + 1024), int(exponent) - 25) : std::ldexp(float(mantissa), -24);
    return sign ? -magnitude : magnitude;
}
inline uint16_t float_to_half(float f) {  // nearest, ties to even
    const uint16_t sign = uint16_t(__float_as_uint(f) >> 16 & 0x8000u);
    const float a = std::fabs(f);
    if (std::isnan(a)) return 0x7fff;
    if (a >= 65520.0f) return sign | 0x7c00;
    int exponent;
    std::frexp(a, &exponent);
    exponent = std::max(exponent - 1, -14);
    const int steps = int(std::nearbyint(std::ldexp(a, 10 - exponent)));  // 1024 to 2048 where normal
    return uint16_t(sign | (((exponent + 14) << 10) + steps));
}
inline unsigned load_acquire(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
