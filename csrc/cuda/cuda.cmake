# FCT_CUDA was read and checked in the top-level file. CMAKE_CUDA_ARCHITECTURES (or the environment's CUDAARCHS) is
# honoured; the default is the common machine code, and PTX that a later GPU's driver compiles for itself.
set(FCT_CUDA_WHY_NOT "")
if(FCT_CUDA STREQUAL "off")
  set(FCT_CUDA_WHY_NOT "built with FCT_CUDA=off")
else()
  if(NOT CMAKE_CUDA_COMPILER OR NOT EXISTS "${CMAKE_CUDA_COMPILER}")
    unset(CMAKE_CUDA_COMPILER CACHE)  # nvcc may have come, or gone, since the last build in this folder
  endif()
  unset(FCT_NVCC CACHE)
  find_program(FCT_NVCC NAMES "$ENV{CUDACXX}" nvcc HINTS ENV CUDA_PATH PATH_SUFFIXES bin)
  mark_as_advanced(FCT_NVCC)
  if(NOT FCT_NVCC AND NOT CMAKE_CUDA_COMPILER)
    set(FCT_CUDA_WHY_NOT "no CUDA compiler (nvcc) was found at build time")
    if(FCT_CUDA STREQUAL "on")
      message(FATAL_ERROR "FCT_CUDA=on, but ${FCT_CUDA_WHY_NOT}; put nvcc on PATH or set CUDACXX")
    endif()
  elseif(FCT_CUDA STREQUAL "auto")  # under "on" the compiler's own words end the build, below
    include(CheckLanguage)
    check_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER)
      set(FCT_CUDA_WHY_NOT "${FCT_NVCC} does not compile with ${CMAKE_CXX_COMPILER} ${CMAKE_CXX_COMPILER_VERSION} or for the \
architectures asked for; building with FCT_CUDA=on shows its words")
    endif()
  endif()
endif()

if(NOT FCT_CUDA_WHY_NOT)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    set(FCT_CUDA_DEFAULT_ARCHITECTURES TRUE)
    set(CMAKE_CUDA_ARCHITECTURES 80)  # for the compiler check alone
  endif()
  enable_language(CUDA)
  if(FCT_CUDA_DEFAULT_ARCHITECTURES)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
      set(CMAKE_CUDA_ARCHITECTURES 80-real 89-real 90-real 100 120-real)  # 8.6 runs 8.0
    else()
      set(CMAKE_CUDA_ARCHITECTURES 80-real 89-real 90)
    endif()
  endif()
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 11.8)
    set(FCT_CUDA_WHY_NOT "expected nvcc 11.8 or newer, got ${CMAKE_CUDA_COMPILER_VERSION}")
    if(FCT_CUDA STREQUAL "on")
      message(FATAL_ERROR "FCT_CUDA=on, but ${FCT_CUDA_WHY_NOT}")
    endif()
  endif()
endif()

if(FCT_CUDA_WHY_NOT)
  message(STATUS "fct: CUDA kernels: not built: ${FCT_CUDA_WHY_NOT}")
  target_compile_definitions(_C PRIVATE FCT_CUDA_WHY_NOT="${FCT_CUDA_WHY_NOT}")
else()
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " FCT_CUDA_ARCHITECTURES)
  message(STATUS "fct: CUDA kernels: nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${FCT_CUDA_ARCHITECTURES}")
  # A library of its own, so that the module's C++ flags (LTO, warnings) stay away from nvcc.
  add_library(fct_cuda STATIC csrc/cuda/device.cu csrc/cuda/topk.cu csrc/cuda/transform.cu csrc/cuda/cublaslt.cpp)
  set_target_properties(
    fct_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden
                        CUDA_RUNTIME_LIBRARY Static POSITION_INDEPENDENT_CODE ON)
  target_compile_options(fct_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--threads=2>
                                          $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>)
  set_target_properties(_C PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  target_link_libraries(_C PRIVATE fct_cuda ${CMAKE_DL_LIBS})
  target_compile_definitions(_C PRIVATE FCT_WITH_CUDA FCT_CUDA_ARCHITECTURES="${FCT_CUDA_ARCHITECTURES}")
endif()
