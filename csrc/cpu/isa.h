// Which instruction sets run here. Kernels are compiled once per level and chosen by it at run time.
#pragma once

namespace fct::cpu {

// Each level holds those before it. avx512 asks for F, BW, DQ and VL (every AVX-512 processor but the Xeon Phi).
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_vnni = 3, avx512_bf16 = 4 };
constexpr int kIsas = 5;

const char* isa_name(Isa isa);

// The best level this processor and its operating system run.
Isa detected_isa();

// Whether the processor has AMX tiles with bf16, which no kernel here uses (torch's do).
bool has_amx_bf16();

}  // namespace fct::cpu
