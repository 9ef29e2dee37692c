// cuBLASLt for large batches, loaded at run time: neither its header nor its library is needed to build or to import.
// The few declarations below are cublasLt.h's; tests/kernels/test_cuda_cublaslt.py holds them against that header.
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "cuda_ops.h"

namespace fct::cuda {
namespace {

namespace lt {
using Status = int;
constexpr int kF32 = 0, kBF16 = 14;                          // cudaDataType
constexpr int kComputeF32 = 68, kOpT = 1;                    // cublasComputeType_t, cublasOperation_t
constexpr int kTransA = 3, kEpilogue = 7, kBiasPointer = 8;  // cublasLtMatmulDescAttributes_t
constexpr int kEpilogueBias = 4, kEpilogueReluBias = 6;
// cublasLtMatmulPreferenceAttributes_t
constexpr int kMaxWorkspace = 1, kAlignmentA = 5, kAlignmentB = 6, kAlignmentC = 7, kAlignmentD = 8;
struct Algo {
    uint64_t data[8];
};
struct Heuristic {
    Algo algo;
    size_t workspace;
    Status state;
    float waves;
    int reserved[4];
};

struct Library {
    Status (*create)(void**);
    Status (*matmul)(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                     void*, void*, const Algo*, void*, size_t, void*);
    Status (*heuristic)(void*, void*, void*, void*, void*, void*, void*, int, Heuristic*, int*);
    Status (*desc_create)(void**, int, int);
    Status (*desc_destroy)(void*);
    Status (*desc_set)(void*, int, const void*, size_t);
    Status (*layout_create)(void**, int, uint64_t, uint64_t, int64_t);
    Status (*layout_destroy)(void*);
    Status (*preference_create)(void**);
    Status (*preference_destroy)(void*);
    Status (*preference_set)(void*, int, const void*, size_t);
    std::string why_not;
};
}  // namespace lt

std::mutex mutex;  // guards all that follows
lt::Library library;
bool loaded = false;
std::map<int, void*> handles;  // per device, for the life of the process
using Key = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool, size_t, uint32_t, uint32_t>;
std::map<Key, lt::Algo> algorithms;

template <class F>
void resolve(void* so, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(so, name));
    if (!function) library.why_not = std::string("libcublasLt has no ") + name;
}

void load(const std::vector<std::string>& paths) {
    if (loaded) return;
    void* so = nullptr;
    const char* names[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"};
    for (const std::string& path : paths)
        if (!so) so = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    for (const char* name : names)
        if (!so) so = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    for (const char* name : names)
        if (!so) so = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!so) {
        const char* error = dlerror();
        library.why_not = std::string("libcublasLt could not be loaded: ") + (error ? error : "not found");
        return;  // not remembered: a later call may bring a path
    }
    loaded = true;
    library.why_not.clear();
    resolve(so, "cublasLtCreate", library.create);
    resolve(so, "cublasLtMatmul", library.matmul);
    resolve(so, "cublasLtMatmulAlgoGetHeuristic", library.heuristic);
    resolve(so, "cublasLtMatmulDescCreate", library.desc_create);
    resolve(so, "cublasLtMatmulDescDestroy", library.desc_destroy);
    resolve(so, "cublasLtMatmulDescSetAttribute", library.desc_set);
    resolve(so, "cublasLtMatrixLayoutCreate", library.layout_create);
    resolve(so, "cublasLtMatrixLayoutDestroy", library.layout_destroy);
    resolve(so, "cublasLtMatmulPreferenceCreate", library.preference_create);
    resolve(so, "cublasLtMatmulPreferenceDestroy", library.preference_destroy);
    resolve(so, "cublasLtMatmulPreferenceSetAttribute", library.preference_set);
}

void check(lt::Status status, const char* call, const Layer& layer, int64_t rows, int device) {
    if (status)
        throw std::runtime_error(std::string(call) + ", layer " + std::to_string(layer.d_in) + " -> " +
                                 std::to_string(layer.d_out) + ", " + std::to_string(rows) + " rows, device " +
                                 std::to_string(device) + ": cuBLAS status " + std::to_string(status));
}

struct Object {  // a descriptor and what destroys it
    void* p = nullptr;
    lt::Status (*destroy)(void*);
    explicit Object(lt::Status (*d)(void*)) : destroy(d) {}
    ~Object() {
        if (p) destroy(p);
    }
    Object(const Object&) = delete;
    Object& operator=(const Object&) = delete;
};

// Of a buffer, as cuBLASLt asks for it: at most the 256 bytes that it assumes unless told. Strides are in the layouts.
uint32_t alignment_of(uintptr_t address) {
    uint32_t alignment = 256;
    while (address % alignment) alignment /= 2;
    return alignment;
}

}  // namespace

std::string cublaslt_why_not(const std::vector<std::string>& paths) {
    std::lock_guard<std::mutex> lock(mutex);
    load(paths);
    return library.why_not;
}

void cublaslt_layer(const Layer& layer, int64_t rows, uintptr_t workspace, size_t workspace_bytes, const Where& where) {
    refuse_after_fork();
    if (rows == 0) return;
    std::lock_guard<std::mutex> lock(mutex);
    load({});
    if (!library.why_not.empty()) throw std::runtime_error(library.why_not);
    auto must = [&](lt::Status status, const char* call) { check(status, call, layer, rows, where.device); };
    void*& handle = handles[where.device];
    if (!handle) must(library.create(&handle), "cublasLtCreate");

    // Row-major y = x w^T is column-major y^T = w^T' x^T: A = w (k x d_out, transposed), B = x^T (k x rows).
    const uint64_t k = static_cast<uint64_t>(layer_row_elements(layer.d_in));
    const uint64_t m = static_cast<uint64_t>(layer.d_out), n = static_cast<uint64_t>(rows);
    const int out_type = layer.last ? lt::kF32 : lt::kBF16;
    const int epilogue = layer.relu ? lt::kEpilogueReluBias : lt::kEpilogueBias;
    const void* bias = reinterpret_cast<const void*>(layer.bias);
    Object desc(library.desc_destroy), a(library.layout_destroy), b(library.layout_destroy), y(library.layout_destroy);
    must(library.desc_create(&desc.p, lt::kComputeF32, lt::kF32), "cublasLtMatmulDescCreate");
    must(library.desc_set(desc.p, lt::kTransA, &lt::kOpT, sizeof lt::kOpT), "cublasLtMatmulDescSetAttribute");
    must(library.desc_set(desc.p, lt::kEpilogue, &epilogue, sizeof epilogue), "cublasLtMatmulDescSetAttribute");
    must(library.desc_set(desc.p, lt::kBiasPointer, &bias, sizeof bias), "cublasLtMatmulDescSetAttribute");
    must(library.layout_create(&a.p, lt::kBF16, k, m, static_cast<int64_t>(k)), "cublasLtMatrixLayoutCreate");
    must(library.layout_create(&b.p, lt::kBF16, k, n, layer.x_pitch), "cublasLtMatrixLayoutCreate");
    must(library.layout_create(&y.p, out_type, m, n, layer.y_pitch), "cublasLtMatrixLayoutCreate");

    // Rows are read from, and the side branch writes into, the middle of others: say how aligned that is.
    const uint32_t of_a = alignment_of(layer.weight), of_b = alignment_of(layer.x), of_y = alignment_of(layer.y);
    const Key key{where.device, rows,       layer.d_in,      layer.d_out,       layer.x_pitch, layer.y_pitch,
                  layer.relu,   layer.last, workspace_bytes, of_a << 16 | of_b, of_y};
    auto found = algorithms.find(key);
    if (found == algorithms.end()) {
        Object preference(library.preference_destroy);
        must(library.preference_create(&preference.p), "cublasLtMatmulPreferenceCreate");
        must(library.preference_set(preference.p, lt::kMaxWorkspace, &workspace_bytes, sizeof workspace_bytes),
             "cublasLtMatmulPreferenceSetAttribute");
        const std::pair<int, const uint32_t*> alignments[] = {
            {lt::kAlignmentA, &of_a}, {lt::kAlignmentB, &of_b}, {lt::kAlignmentC, &of_y}, {lt::kAlignmentD, &of_y}};
        for (const auto& [attribute, alignment] : alignments)
            must(library.preference_set(preference.p, attribute, alignment, sizeof *alignment),
                 "cublasLtMatmulPreferenceSetAttribute");
        lt::Heuristic best = {};
        int count = 0;
        must(library.heuristic(handle, desc.p, a.p, b.p, y.p, y.p, preference.p, 1, &best, &count),
             "cublasLtMatmulAlgoGetHeuristic");
        must(count ? best.state : 15, "cublasLtMatmulAlgoGetHeuristic");  // 15: CUBLAS_STATUS_NOT_SUPPORTED
        found = algorithms.emplace(key, best.algo).first;
    }
    const float one = 1.0f, zero = 0.0f;
    void* out = reinterpret_cast<void*>(layer.y);
    must(library.matmul(handle, desc.p, &one, reinterpret_cast<const void*>(layer.weight), a.p,
                        reinterpret_cast<const void*>(layer.x), b.p, &zero, out, y.p, out, y.p, &found->second,
                        reinterpret_cast<void*>(workspace), workspace_bytes, reinterpret_cast<void*>(where.stream)),
         "cublasLtMatmul");
}

}  // namespace fct::cuda
