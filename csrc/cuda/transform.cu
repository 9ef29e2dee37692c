#include "convert.h"
#include "cuda_ops.h"
#include "transform.cuh"

namespace fct::cuda {

int layer_row_elements(int64_t d) { return layer_pitch(d); }

void transform_small_rows(const Small& small, const Where& where) {
    refuse_after_fork();
    if (small.layers.empty() || small.layers.size() > kMaxLayers)
        throw std::invalid_argument("layers: expected 1 to " + std::to_string(kMaxLayers) + ", got " +
                                    std::to_string(small.layers.size()));
    gpu::DeviceGuard guard(where.device);
    SmallArgs args = {};
    args.old_rows = to_rows(small.old_rows);
    args.side_rows = to_rows(small.side_rows);
    args.out = to_rows(small.out);
    args.old_bf16 = at<bf16>(small.old_bf16);
    args.side_bf16 = at<bf16>(small.side_bf16);
    args.split = small.split;
    args.old_pitch = layer_pitch(small.old_rows.d) * (small.split ? 3 : 1);
    args.side_pitch = layer_pitch(small.side_rows.d) * (small.split ? 3 : 1);
    args.last = at<float>(small.last);
    args.normalise = small.normalise;
    args.barrier = at<unsigned>(small.barrier);
    int n = 0;
    for (const Layer& layer : small.layers) {
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
    run_small(args, small.blocks, to_stream(where));
}

void convert_rows_to_bf16(const RowsAt& rows, uintptr_t dst, int64_t pitch, bool split, const Where& where) {
    refuse_after_fork();
    gpu::DeviceGuard guard(where.device);
    run_convert(to_rows(rows), at<bf16>(dst), pitch, split, to_stream(where));
}

void finish_rows_from_fp32(uintptr_t src, const RowsAt& out, bool normalise, const Where& where) {
    refuse_after_fork();
    gpu::DeviceGuard guard(where.device);
    run_finish(at<float>(src), to_rows(out), normalise, to_stream(where));
}

}  // namespace fct::cuda
