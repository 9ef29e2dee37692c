// A cuBLASLt of a few lines on CPU memory: what csrc/cuda/cublaslt.cpp calls, computed in double. It refuses what the
// real one refuses and our code must not ask for: another compute type, A not transposed, a workspace beyond its own,
// buffers less aligned than the algorithm was asked for.
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {
struct Desc {
    int transa = 0, epilogue = 1;
    const void* bias = nullptr;
};
struct Layout {
    int type;
    uint64_t rows, cols;
    int64_t ld;
};
struct Algo {
    uint64_t data[8];  // 42, then the alignments of A, B, C and D that it was chosen for
};
struct Preference {
    uint32_t alignment[4] = {256, 256, 256, 256};  // what the real one assumes
};
struct Heuristic {
    Algo algo;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
float bf16(const void* p, int64_t i) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
bool aligned(const void* p, uint64_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }
uint16_t to_bf16(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
}  // namespace

extern "C" {
int cublasLtCreate(void** h) { return *h = new int(0), 0; }
int cublasLtMatmulDescCreate(void** d, int compute, int scale) {
    if (compute != 68 || scale != 0) return 7;
    return *d = new Desc, 0;
}
int cublasLtMatmulDescDestroy(void* d) { return delete static_cast<Desc*>(d), 0; }
int cublasLtMatmulDescSetAttribute(void* d, int what, const void* value, size_t bytes) {
    Desc* desc = static_cast<Desc*>(d);
    if (what == 3 && bytes == 4) return std::memcpy(&desc->transa, value, 4), 0;
    if (what == 7 && bytes == 4) return std::memcpy(&desc->epilogue, value, 4), 0;
    if (what == 8 && bytes == 8) return std::memcpy(&desc->bias, value, 8), 0;
    return 7;
}
int cublasLtMatrixLayoutCreate(void** l, int type, uint64_t rows, uint64_t cols, int64_t ld) {
    if (ld < static_cast<int64_t>(rows)) return 7;
    return *l = new Layout{type, rows, cols, ld}, 0;
}
int cublasLtMatrixLayoutDestroy(void* l) { return delete static_cast<Layout*>(l), 0; }
int cublasLtMatmulPreferenceCreate(void** p) { return *p = new Preference, 0; }
int cublasLtMatmulPreferenceDestroy(void* p) { return delete static_cast<Preference*>(p), 0; }
int cublasLtMatmulPreferenceSetAttribute(void* p, int what, const void* value, size_t bytes) {
    if (what == 1 && bytes == 8) return 0;
    if (what < 5 || what > 8 || bytes != 4) return 7;
    return std::memcpy(static_cast<Preference*>(p)->alignment + (what - 5), value, 4), 0;
}
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void* p, int, Heuristic* out, int* count) {
    *out = {};
    out->algo.data[0] = 42;
    for (int i = 0; i < 4; ++i) {
        const uint32_t alignment = static_cast<Preference*>(p)->alignment[i];
        if (alignment < 16) return *count = 0, 15;  // the real one knows slower ones; none is to be asked for
        out->algo.data[1 + i] = alignment;
    }
    return *count = 1, 0;
}
int cublasLtMatmul(void*, void* d, const void* alpha, const void* a, void* al, const void* b, void* bl,
                   const void* beta, const void* c, void*, void* y, void* yl, const Algo* algo, void*, size_t, void*) {
    const Desc* desc = static_cast<Desc*>(d);
    const Layout *A = static_cast<Layout*>(al), *B = static_cast<Layout*>(bl), *Y = static_cast<Layout*>(yl);
    if (desc->transa != 1 || A->rows != B->rows || A->cols != Y->rows || B->cols != Y->cols || A->type != 14 ||
        B->type != 14 || algo->data[0] != 42 || *static_cast<const float*>(alpha) != 1 ||
        *static_cast<const float*>(beta) != 0 || (desc->epilogue != 4 && desc->epilogue != 6))
        return 7;
    const uint64_t* to = algo->data + 1;
    if (!aligned(a, to[0]) || !aligned(b, to[1]) || !aligned(c, to[2]) || !aligned(y, to[3])) return 7;
    for (uint64_t j = 0; j < Y->cols; ++j)
        for (uint64_t i = 0; i < Y->rows; ++i) {
            double sum = Y->type == 0 ? static_cast<const float*>(desc->bias)[i] : bf16(desc->bias, i);
            for (uint64_t k = 0; k < A->rows; ++k)
                sum += static_cast<double>(bf16(a, i * A->ld + k)) * bf16(b, j * B->ld + k);
            if (desc->epilogue == 6 && sum < 0) sum = 0;
            if (Y->type == 0)
                static_cast<float*>(y)[j * Y->ld + i] = static_cast<float>(sum);
            else
                static_cast<uint16_t*>(y)[j * Y->ld + i] = to_bf16(static_cast<float>(sum));
        }
    return 0;
}
}
