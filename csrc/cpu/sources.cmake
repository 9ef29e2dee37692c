# One file per op and instruction set; each is compiled with its own flags and chosen at run time.
set(FCT_CPU_SOURCES
    csrc/cpu/rows.cpp
    csrc/cpu/isa.cpp
    csrc/cpu/threads.cpp
    csrc/cpu/peaks.cpp
    csrc/cpu/transform.cpp
    csrc/cpu/transform_pack.cpp
    csrc/cpu/transform_portable.cpp)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(FCT_AVX2_FLAGS "-mavx2;-mfma;-mf16c")
  set(FCT_AVX512_FLAGS "${FCT_AVX2_FLAGS};-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mprefer-vector-width=512")
  foreach(isa avx2 avx512 avx512_vnni avx512_bf16)
    list(APPEND FCT_CPU_SOURCES csrc/cpu/transform_${isa}.cpp)
  endforeach()
  set_source_files_properties(csrc/cpu/transform_avx2.cpp PROPERTIES COMPILE_OPTIONS "${FCT_AVX2_FLAGS}")
  set_source_files_properties(csrc/cpu/transform_avx512.cpp PROPERTIES COMPILE_OPTIONS "${FCT_AVX512_FLAGS}")
  set_source_files_properties(csrc/cpu/transform_avx512_vnni.cpp PROPERTIES COMPILE_OPTIONS
                                                                           "${FCT_AVX512_FLAGS};-mavx512vnni")
  set_source_files_properties(csrc/cpu/transform_avx512_bf16.cpp PROPERTIES
                              COMPILE_OPTIONS "${FCT_AVX512_FLAGS};-mavx512vnni;-mavx512bf16")
else()
  # One multiply-add instead of two roundings, wherever the processor has it.
  set_source_files_properties(csrc/cpu/transform_portable.cpp PROPERTIES COMPILE_OPTIONS "-ffp-contract=fast")
endif()

# ---- topk ----
list(APPEND FCT_CPU_SOURCES csrc/cpu/topk.cpp csrc/cpu/topk_candidates.cpp csrc/cpu/topk_exact.cpp csrc/cpu/topk_likely.cpp csrc/cpu/topk_levels.cpp
     csrc/cpu/topk_quantise.cpp csrc/cpu/topk_ranks.cpp csrc/cpu/topk_scan.cpp csrc/cpu/topk_shadow.cpp
     csrc/cpu/topk_portable.cpp)
set_source_files_properties(csrc/cpu/topk_portable.cpp PROPERTIES COMPILE_OPTIONS "-O3;-ffp-contract=fast")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  # GCC 12 takes the undefined source of its own AVX-512 shifts for an uninitialised variable.
  set(FCT_TOPK_FLAGS "-O3;-ffp-contract=fast;-Wno-uninitialized;-Wno-maybe-uninitialized")
  list(APPEND FCT_CPU_SOURCES csrc/cpu/topk_avx2.cpp csrc/cpu/topk_avx512.cpp csrc/cpu/topk_avx512_vnni.cpp)
  set_source_files_properties(csrc/cpu/topk_avx2.cpp PROPERTIES COMPILE_OPTIONS "${FCT_AVX2_FLAGS};${FCT_TOPK_FLAGS}")
  set_source_files_properties(csrc/cpu/topk_avx512.cpp PROPERTIES COMPILE_OPTIONS
                                                                  "${FCT_AVX512_FLAGS};${FCT_TOPK_FLAGS}")
  set_source_files_properties(csrc/cpu/topk_avx512_vnni.cpp PROPERTIES
                              COMPILE_OPTIONS "${FCT_AVX512_FLAGS};-mavx512vnni;${FCT_TOPK_FLAGS}")
endif()

# ---- checksum ----
list(APPEND FCT_CPU_SOURCES csrc/cpu/checksum.cpp)
