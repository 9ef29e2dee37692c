// From the plain addresses of cuda_ops.h to the kernels' own types.
#pragma once
#include "cuda_ops.h"
#include "rows.cuh"

namespace fct::cuda {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}
inline cudaStream_t to_stream(const Where& where) { return reinterpret_cast<cudaStream_t>(where.stream); }
inline Rows to_rows(const RowsAt& r) {
    return {at<void>(r.data), r.dtype, r.n, r.d, r.stride, at<const float>(r.scale), r.scale_row, r.scale_dim};
}

}  // namespace fct::cuda
