// The CUDA kernels as plain functions: addresses, sizes, strides, a device and a stream; nothing of CUDA, torch or
// pybind11 in sight. All are asynchronous on the stream and throw std::runtime_error naming kernel, shape and device.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fct::cuda {

struct Where {
    int device;
    uintptr_t stream;  // cudaStream_t
};

// Rows of embeddings, see rows.cuh.
struct RowsAt {
    uintptr_t data;
    int dtype;
    int64_t n, d, stride;
    uintptr_t scale;
    int64_t scale_row, scale_dim;
};

// ---- device (device.cu) ----
struct DeviceProperties {
    std::string name;
    int major, minor, multiprocessors;
    size_t shared_memory;  // per block, on request
    size_t l2_bytes;
};
std::string why_not_here();  // "" when a device is there, else one sentence
DeviceProperties device_properties(int device);
void refuse_after_fork();  // throws when CUDA was first used in a parent of this process

// ---- top-k (topk.cu) ----
int shadow_row_bytes(int64_t d, int kind);
void make_shadow_rows(const RowsAt& rows, int metric, int kind, bool is_query, uintptr_t shadow, uintptr_t meta,
                      const Where& where);

struct Search {
    RowsAt queries, gallery;
    int metric, kind, k;
    uintptr_t query_shadow, query_meta;
    uintptr_t gallery_shadow, gallery_meta;
    int64_t base;
    uintptr_t distances, indices;
    int multiprocessors;
    size_t shared_memory;
    uintptr_t scratch;  // search_scratch() bytes
};
struct SearchSize {
    size_t scratch, failed_at;  // bytes; where the number of queries that took the exact way lies (uint32)
    int splits, candidates, rescored, tile_rows, blocks_per_multiprocessor;
};
SearchSize search_size(const Search& search);
// Queries that one search() should take, so that its scan fills the device.
int64_t search_queries(int64_t d, int kind, int k, int multiprocessors, size_t shared_memory);
void search(const Search& search, const Where& where);
void merge_part_results(uintptr_t distances, uintptr_t indices, int parts, int64_t n_queries, int k, int metric,
                        uintptr_t out_distances, uintptr_t out_indices, const Where& where);

// ---- transformation (transform.cu) ----
int layer_row_elements(int64_t d);
struct Layer {
    uintptr_t x;
    int64_t x_pitch;
    uintptr_t weight;     // (d_out, layer_row_elements(d_in)) bf16
    int64_t d_in, d_out;  // of split rows, d_in is the three parts' length
    uintptr_t bias;
    bool relu;
    uintptr_t y;
    int64_t y_pitch;
    bool last;  // y is fp32
    int phase;  // layers of one phase do not depend on each other
};
// h with its buffers: what stays as it is from call to call. Two streams never share one.
struct Network {
    uintptr_t old_bf16, side_bf16;  // where the rows go as bf16; side 0: the side branch reads old's
    int64_t old_pitch, side_pitch;
    bool split;      // as high and low parts, see transform.cuh
    uintptr_t last;  // the last layer's output
    int64_t last_pitch;
    float length;  // what the output's rows are brought to; 0: they stay as they come
    std::vector<Layer> layers;
};
struct Batch {
    RowsAt old_rows, side_rows, out;
};
// blocks: at most what the device runs at once.
void transform_small_rows(const Network& h, const Batch& batch, uintptr_t barrier, int blocks, const Where& where);
void transform_large_rows(const Network& h, const Batch& batch, uintptr_t workspace, size_t workspace_bytes,
                          const Where& where);

// ---- cuBLASLt (cublaslt.cpp) ----
// Loads the library on first use: the one already in the process, else by these paths, else by its usual names.
std::string cublaslt_why_not(const std::vector<std::string>& paths);
// y = relu?(x weight^T + bias); bias as bf16, for the last layer as fp32.
void cublaslt_layer(const Layer& layer, int64_t rows, uintptr_t workspace, size_t workspace_bytes, const Where& where);

}  // namespace fct::cuda
