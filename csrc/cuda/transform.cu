#include "convert.h"
#include "cuda_ops.h"
#include "transform.cuh"

namespace fct::cuda {
namespace {

void fill_ends(RowArgs& args, const Network& h, const Batch& batch) {
    args.old_rows = to_rows(batch.old_rows);
    args.side_rows = to_rows(batch.side_rows);
    args.out = to_rows(batch.out);
    args.old_bf16 = at<bf16>(h.old_bf16);
    args.side_bf16 = at<bf16>(h.side_bf16);
    args.old_pitch = h.old_pitch;
    args.side_pitch = h.side_pitch;
    args.last = at<float>(h.last);
    args.last_pitch = h.last_pitch;
    args.length = h.length;
    args.split = h.split;
}

}  // namespace

int layer_row_elements(int64_t d) { return layer_pitch(d); }

void transform_small_rows(const Network& h, const Batch& batch, uintptr_t barrier, int blocks, const Where& where) {
    refuse_after_fork();
    if (h.layers.empty() || h.layers.size() > kMaxLayers)
        throw std::invalid_argument("layers: expected 1 to " + std::to_string(kMaxLayers) + ", got " +
                                    std::to_string(h.layers.size()));
    gpu::DeviceGuard guard(where.device);
    SmallArgs args = {};
    fill_ends(args, h, batch);
    args.barrier = at<unsigned>(barrier);
    int n = 0;
    for (const Layer& layer : h.layers) {
        if (layer.phase != args.n_phases - 1 && layer.phase != args.n_phases)
            throw std::invalid_argument("layers: expected ascending phases without gaps");
        if (layer.phase == args.n_phases) {
            if (args.n_phases == kMaxPhases)
                throw std::invalid_argument("layers: expected at most " + std::to_string(kMaxPhases) + " phases");
            args.first_layer[args.n_phases++] = n;
        }
        args.layers[n++] = {at<bf16>(layer.x),
                            layer.x_pitch,
                            at<bf16>(layer.weight),
                            layer_pitch(layer.d_in),
                            at<float>(layer.bias),
                            static_cast<int>(layer.d_out),
                            layer.relu,
                            layer.last ? nullptr : at<bf16>(layer.y),
                            layer.y_pitch,
                            layer.last ? at<float>(layer.y) : nullptr};
    }
    args.first_layer[args.n_phases] = n;
    run_small(args, blocks, to_stream(where));
}

void transform_large_rows(const Network& h, const Batch& batch, uintptr_t workspace, size_t workspace_bytes,
                          const Where& where) {
    refuse_after_fork();
    gpu::DeviceGuard guard(where.device);
    RowArgs args = {};
    fill_ends(args, h, batch);
    run_convert(args, to_stream(where));
    for (const Layer& layer : h.layers) cublaslt_layer(layer, batch.out.n, workspace, workspace_bytes, where);
    run_finish(args, to_stream(where));
}

}  // namespace fct::cuda
