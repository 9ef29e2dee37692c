#include "cpu/isa.h"

namespace fct::cpu {

const char* isa_name(Isa isa) {
    static const char* const names[kIsas] = {"portable", "avx2", "avx512", "avx512-vnni", "avx512-bf16"};
    return names[static_cast<int>(isa)];
}

Isa detected_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
        return Isa::portable;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
        return Isa::avx2;
    if (!__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512_vnni;
#else
    return Isa::portable;
#endif
}

bool has_amx_bf16() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("amx-bf16");
#else
    return false;
#endif
}

}  // namespace fct::cpu
