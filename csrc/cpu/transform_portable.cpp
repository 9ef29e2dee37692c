// The compiler's vector extensions, 16 bytes wide: SSE2 on x86-64, NEON on AArch64, and whatever else there is. Tile:
// 6 rows x 2 vectors, or 12 x 2 on AArch64 with its 32 registers.
#include "cpu/transform_kernel.h"

namespace fct::cpu {
namespace {

typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));
typedef uint32_t u4 __attribute__((vector_size(16)));

template <class T>
inline T load_as(const void* p) {
    T x;
    std::memcpy(&x, p, 16);
    return x;
}

template <class To, class From>
inline To cast(From x) {
    return reinterpret_cast<To>(x);
}

struct Portable {
    using f = f4;
#if defined(__aarch64__)
    static constexpr int W = 4, kRows = 12, kHalf = 6, kCols = 8;
#else
    static constexpr int W = 4, kRows = 6, kHalf = 3, kCols = 8;
#endif
    // The compiler loses track of the value.
    template <class T>
    static void hide(T& x) {
#if defined(__aarch64__)
        asm volatile("" : "+w"(x));
#elif defined(__x86_64__)
        asm volatile("" : "+x"(x));
#else
        asm volatile("" : "+m"(x));
#endif
    }
    static f load(const float* p) { return load_as<f4>(p); }
    static f set(float x) { return f4{x, x, x, x}; }
    static f add(f a, f b) { return a + b; }
    static f fma(f a, f b, f c) { return a * b + c; }
    static f max_keeping_nan(f value, f lowest) { return value < lowest ? lowest : value; }
    static void store_f32(void* p, f x) { std::memcpy(p, &x, 16); }
    static void store_bf16(void* p, f x) {
        uint16_t out[4];
        for (int i = 0; i < 4; ++i) out[i] = to_bf16(x[i]);
        std::memcpy(p, out, 8);
    }
    // 2^23: in its binade floats are whole numbers, so the sum is rounded to nearest even.
    static void store_u8(void* p, f x) {
        const f4 top = set(255.0f);
        const f4 rounded = (x > top ? top : x) + set(8388608.0f);
        const u4 q = cast<u4>(rounded);
        uint8_t out[4];
        for (int i = 0; i < 4; ++i) out[i] = static_cast<uint8_t>(q[i]);
        std::memcpy(p, out, 4);
    }
    // 1.5 * 2^23, likewise for either sign.
    static void store_s16(void* p, f x) {
        const f4 most = set(kMostInt16), least = set(-kMostInt16);
        const f4 cut = x > most ? most : x < least ? least : x;
        const u4 q = cast<u4>(cut + set(12582912.0f)) - 0x4b400000u;
        int16_t out[4];
        for (int i = 0; i < 4; ++i) out[i] = static_cast<int16_t>(q[i]);
        std::memcpy(p, out, 8);
    }
};

struct Fp32 {
    using acc = f4;
    using operand = f4;
    static constexpr bool kInteger = false;
    static constexpr int kGroup = 1;
    static acc zero() { return f4{}; }
    static operand load(const uint8_t* p) { return load_as<f4>(p); }
    static operand bcast(const uint8_t* p) {
        float x;
        std::memcpy(&x, p, 4);
        return f4{x, x, x, x};
    }
    static acc fma(acc c, operand w, operand a) { return c + w * a; }
    static f4 to_float(acc c) { return c; }
};

struct Words {
    using operand = u4;
    static operand load(const uint8_t* p) { return load_as<u4>(p); }
    static operand bcast(const uint8_t* p) {
        uint32_t x;
        std::memcpy(&x, p, 4);
        return u4{x, x, x, x};
    }
};

// A pair of bf16 is two floats cut short: the high one is the word itself with its low half cleared.
struct Bf16 : Words {
    using acc = f4;
    static constexpr bool kInteger = false;
    static constexpr int kGroup = 2;
    static acc zero() { return f4{}; }
    static f4 low(operand x) { return cast<f4>(x << 16); }
    static f4 high(operand x) { return cast<f4>(x & 0xffff0000u); }
    static acc fma(acc c, operand w, operand a) { return (c + low(w) * low(a)) + high(w) * high(a); }
    static f4 to_float(acc c) { return c; }
};

struct Int8 : Words {
    using acc = i4;
    static constexpr bool kInteger = true;
    static constexpr int kGroup = 4;
    static acc zero() { return i4{}; }
    static acc fma(acc c, operand w, operand a) {
        c += (cast<i4>(w << 24) >> 24) * cast<i4>(a & 0xffu);
        c += (cast<i4>(w << 16) >> 24) * cast<i4>((a >> 8) & 0xffu);
        c += (cast<i4>(w << 8) >> 24) * cast<i4>((a >> 16) & 0xffu);
        c += (cast<i4>(w) >> 24) * cast<i4>(a >> 24);
        return c;
    }
    static f4 to_float(acc c) { return __builtin_convertvector(c, f4); }
};

struct Int16 : Int8 {
    static constexpr int kGroup = 2;
    static acc fma(acc c, operand w, operand a) {
        c += (cast<i4>(w << 16) >> 16) * (cast<i4>(a << 16) >> 16);
        c += (cast<i4>(w) >> 16) * (cast<i4>(a) >> 16);
        return c;
    }
};

}  // namespace

void add_portable_kernels(Kernels& kernels) {
    fill_shape<Portable>(kernels);
    fill_precision<Portable, Fp32>(kernels, Precision::fp32);
    fill_precision<Portable, Bf16>(kernels, Precision::bf16);
    fill_precision<Portable, Int8>(kernels, Precision::int8);
    fill_precision<Portable, Int16>(kernels, Precision::int16);
}

}  // namespace fct::cpu
