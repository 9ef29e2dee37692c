// The CUDA section of the bindings; bindings.cpp includes it, and so does the emulated build of the same kernels.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "../without_gil.h"
#include "cuda_ops.h"

namespace fct::cuda {

namespace py = pybind11;

// (address, dtype, n, d, stride, scale address or 0, scale_row, scale_dim)
using RowsTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, uintptr_t, int64_t, int64_t>;
inline RowsAt rows_at(const RowsTuple& t) {
    return std::apply([](auto... field) { return RowsAt{field...}; }, t);
}

// Keyword arguments into a struct, each key required and none unknown.
class Fields {
  public:
    explicit Fields(const py::dict& dict) : dict_(dict) {}
    template <class T>
    Fields& operator()(const char* name, T& value) {
        if (!dict_.contains(name)) throw py::type_error(std::string("missing argument ") + name);
        value = dict_[name].cast<T>();
        ++seen_;
        return *this;
    }
    Fields& rows(const char* name, RowsAt& value) {
        RowsTuple tuple;
        (*this)(name, tuple);
        value = rows_at(tuple);
        return *this;
    }
    void done() const {
        if (seen_ != dict_.size()) throw py::type_error("got an unknown argument");
    }

  private:
    const py::dict& dict_;
    size_t seen_ = 0;
};

inline Search search_from(const py::dict& dict) {
    Search s = {};
    Fields f(dict);
    f.rows("queries", s.queries).rows("gallery", s.gallery);
    f("metric", s.metric)("kind", s.kind)("k", s.k)("base", s.base);
    f("query_shadow", s.query_shadow)("query_meta", s.query_meta);
    f("gallery_shadow", s.gallery_shadow)("gallery_meta", s.gallery_meta);
    f("distances", s.distances)("indices", s.indices)("scratch", s.scratch);
    f("multiprocessors", s.multiprocessors)("shared_memory", s.shared_memory);
    f.done();
    return s;
}

inline Layer layer_from(const py::dict& dict) {
    Layer l = {};
    Fields f(dict);
    f("x", l.x)("x_pitch", l.x_pitch)("weight", l.weight)("d_in", l.d_in)("d_out", l.d_out)("bias", l.bias);
    f("relu", l.relu)("y", l.y)("y_pitch", l.y_pitch)("last", l.last)("phase", l.phase);
    f.done();
    return l;
}

inline Network network_from(const py::kwargs& kwargs) {
    Network h = {};
    std::vector<py::dict> layers;
    Fields f(kwargs);
    f("old_bf16", h.old_bf16)("old_pitch", h.old_pitch)("side_bf16", h.side_bf16)("side_pitch", h.side_pitch);
    f("split", h.split)("last", h.last)("last_pitch", h.last_pitch)("length", h.length)("layers", layers);
    f.done();
    for (const py::dict& layer : layers) h.layers.push_back(layer_from(layer));
    return h;
}

inline void bind(py::module_& m) {
    m.def("cuda_why_not_here", &why_not_here, py::call_guard<WithoutGil>());
    m.def("cuda_device", [](int device) {
        const DeviceProperties p = device_properties(device);
        return py::dict(py::arg("name") = p.name, py::arg("capability") = py::make_tuple(p.major, p.minor),
                        py::arg("multiprocessors") = p.multiprocessors, py::arg("shared_memory") = p.shared_memory,
                        py::arg("l2_bytes") = p.l2_bytes);
    });
    m.def("cuda_shadow_row_bytes", &shadow_row_bytes);
    m.def("cuda_layer_row_elements", &layer_row_elements);
    m.def("cuda_make_shadow", [](const RowsTuple& rows, int metric, int kind, bool is_query, uintptr_t shadow,
                                 uintptr_t meta, int device, uintptr_t stream) {
        WithoutGil without_gil;
        make_shadow_rows(rows_at(rows), metric, kind, is_query, shadow, meta, {device, stream});
    });
    m.def("cuda_search_size", [](const py::kwargs& kwargs) {
        const SearchSize size = search_size(search_from(kwargs));
        return py::dict(py::arg("scratch") = size.scratch, py::arg("failed_at") = size.failed_at,
                        py::arg("splits") = size.splits, py::arg("candidates") = size.candidates,
                        py::arg("rescored") = size.rescored, py::arg("tile_rows") = size.tile_rows,
                        py::arg("blocks_per_multiprocessor") = size.blocks_per_multiprocessor);
    });
    m.def("cuda_search_queries", &search_queries, py::kw_only(), py::arg("d"), py::arg("kind"), py::arg("k"),
          py::arg("multiprocessors"), py::arg("shared_memory"));
    m.def("cuda_search", [](int device, uintptr_t stream, const py::kwargs& kwargs) {
        const Search s = search_from(kwargs);
        WithoutGil without_gil;
        search(s, {device, stream});
    });
    m.def("cuda_merge_parts",
          [](uintptr_t distances, uintptr_t indices, int parts, int64_t n_queries, int k, int metric,
             uintptr_t out_distances, uintptr_t out_indices, int device, uintptr_t stream) {
              WithoutGil without_gil;
              merge_part_results(distances, indices, parts, n_queries, k, metric, out_distances, out_indices,
                                 {device, stream});
          });
    m.def("cuda_blaslt_why_not", &cublaslt_why_not);
    // Local: the emulated build has the same class in one process with this one.
    py::class_<Network>(m, "CudaNetwork", py::module_local())
        .def(py::init(&network_from))
        .def("small",
             [](const Network& h, const RowsTuple& old, const RowsTuple& side, const RowsTuple& out, uintptr_t barrier,
                int blocks, int device, uintptr_t stream) {
                 const Batch batch = {rows_at(old), rows_at(side), rows_at(out)};
                 WithoutGil without_gil;
                 transform_small_rows(h, batch, barrier, blocks, {device, stream});
             })
        .def("large", [](const Network& h, const RowsTuple& old, const RowsTuple& side, const RowsTuple& out,
                         uintptr_t workspace, size_t workspace_bytes, int device, uintptr_t stream) {
            const Batch batch = {rows_at(old), rows_at(side), rows_at(out)};
            WithoutGil without_gil;
            transform_large_rows(h, batch, workspace, workspace_bytes, {device, stream});
        });
}

}  // namespace fct::cuda
