"""h as an ONNX graph, for servers that speak ONNX and for holding our kernels against other runtimes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fct.artifact.layers import BRANCHES, SKIP, Layer, Network
from fct.atomic_files import write_bytes
from fct.checks import check_path
from fct.extras import need

if TYPE_CHECKING:
    import onnx


__all__ = ["onnx_model", "save_onnx"]

_OPSET = 17


def onnx_model(h: Network) -> onnx.ModelProto:
    """An ``onnx.ModelProto``: inputs "old" (n, d_old) and, with side-information, "side_info" (n, d_side), float32;
    output "new" (n, d_new) float32."""
    need("onnx", "to_onnx")
    from onnx import TensorProto, checker, helper, numpy_helper

    nodes, weights = [], []

    def linear(layer: Layer, name: str, x: str) -> str:
        weights.append(numpy_helper.from_array(layer.weight, f"{name}.weight"))
        weights.append(numpy_helper.from_array(layer.bias, f"{name}.bias"))
        nodes.append(helper.make_node("Gemm", [x, f"{name}.weight", f"{name}.bias"], [f"{name}.out"], transB=1))
        if not layer.relu:
            return f"{name}.out"
        nodes.append(helper.make_node("Relu", [f"{name}.out"], [f"{name}.relu"]))
        return f"{name}.relu"

    def chain(branch: str, x: str) -> str:
        for i, layer in enumerate(getattr(h, branch)):
            x = linear(layer, f"{branch}.{i}", x)
        return x

    side_input = "side_info" if h.uses_side_info else "old"
    ends = [chain(branch, x) for branch, x in zip(BRANCHES[:2], ("old", side_input), strict=True)]
    nodes.append(helper.make_node("Concat", ends, ["joined"], axis=1))
    out = chain("mixer", "joined")
    if h.skip is not None:
        rows = "old"
        if h.uses_side_info:
            nodes.append(helper.make_node("Concat", ["old", "side_info"], ["rows"], axis=1))
            rows = "rows"
        nodes.append(helper.make_node("Add", [out, linear(h.skip, SKIP, rows)], ["added"]))
        out = "added"
    if h.normalise:
        # A zero row stays zero, as in the reference.
        weights.append(numpy_helper.from_array(np.array([np.finfo(np.float32).tiny], np.float32), "tiny"))
        nodes.append(helper.make_node("ReduceL2", [out], ["norm"], axes=[1], keepdims=1))
        nodes.append(helper.make_node("Max", ["norm", "tiny"], ["norm_or_tiny"]))
        nodes.append(helper.make_node("Div", [out, "norm_or_tiny"], ["unit"]))
        weights.append(numpy_helper.from_array(np.array([h.length], np.float32), "length"))
        nodes.append(helper.make_node("Mul", ["unit", "length"], ["new"]))
    else:
        nodes.append(helper.make_node("Identity", [out], ["new"]))

    def value(name: str, width: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])

    inputs = [value("old", h.old[0].d_in)] + ([value("side_info", h.side[0].d_in)] if h.uses_side_info else [])
    graph = helper.make_graph(nodes, "fct_transformation", inputs, [value("new", h.mixer[-1].d_out)], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], producer_name="fct")
    model.ir_version = 9  # what runtimes of the last years read
    helper.set_model_props(model, {"fct.fingerprint": h.fingerprint})
    checker.check_model(model)
    return model


def save_onnx(h: Network, path: str | os.PathLike[str]) -> Path:
    """Writes :func:`onnx_model` to ``path``; raises ImportError where onnx is not installed."""
    target = check_path(path, "path")
    write_bytes(target, onnx_model(h).SerializeToString())
    return target
