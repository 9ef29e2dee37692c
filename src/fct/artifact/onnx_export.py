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
from fct.types import Floats

if TYPE_CHECKING:
    import onnx


__all__ = ["onnx_model", "save_onnx"]

_OPSET = 17


def onnx_model(h: Network) -> onnx.ModelProto:
    """An ``onnx.ModelProto``: inputs "old" (n, d_old) and, with side-information, "side_info" (n, d_side), float32;
    output "new" (n, d_new) float32."""
    need("onnx", "to_onnx")
    from onnx import TensorProto, checker, helper

    drawn = _Graph()
    side_input = "side_info" if h.uses_side_info else "old"
    ends = [drawn.chain(h, branch, x) for branch, x in zip(BRANCHES[:2], ("old", side_input), strict=True)]
    out = drawn.chain(h, "mixer", drawn.node("Concat", ends, "joined", axis=1))
    if h.skip is not None:
        rows = drawn.node("Concat", ["old", "side_info"], "rows", axis=1) if h.uses_side_info else "old"
        out = drawn.node("Add", [out, drawn.linear(h.skip, SKIP, rows)], "added")
    if h.normalise:
        drawn.normalised(out, h.length, "new")
    else:
        drawn.node("Identity", [out], "new")

    def value(name: str, width: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])

    inputs = [value("old", h.old[0].d_in)] + ([value("side_info", h.side[0].d_in)] if h.uses_side_info else [])
    outputs = [value("new", h.mixer[-1].d_out)]
    graph = helper.make_graph(drawn.nodes, "fct_transformation", inputs, outputs, drawn.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], producer_name="fct")
    model.ir_version = 9  # what runtimes of the last years read
    helper.set_model_props(model, {"fct.fingerprint": h.fingerprint})
    checker.check_model(model)
    return model


class _Graph:
    """Nodes and weights of a graph that grows; every method gives the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def node(self, operator: str, inputs: list[str], output: str, **attributes: int | list[int]) -> str:
        from onnx import helper

        node = helper.make_node(operator, inputs, [output])
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        self.nodes.append(node)
        return output

    def weight(self, values: Floats, name: str) -> str:
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def linear(self, layer: Layer, name: str, x: str) -> str:
        inputs = [x, self.weight(layer.weight, f"{name}.weight"), self.weight(layer.bias, f"{name}.bias")]
        out = self.node("Gemm", inputs, f"{name}.out", transB=1)
        return self.node("Relu", [out], f"{name}.relu") if layer.relu else out

    def chain(self, h: Network, branch: str, x: str) -> str:
        for i, layer in enumerate(getattr(h, branch)):
            x = self.linear(layer, f"{branch}.{i}", x)
        return x

    def normalised(self, x: str, length: float, output: str) -> str:
        """Rows of one length; a zero row stays zero, as in the reference."""
        tiny = self.weight(np.array([np.finfo(np.float32).tiny], np.float32), "tiny")
        norm = self.node("ReduceL2", [x], "norm", axes=[1], keepdims=1)
        unit = self.node("Div", [x, self.node("Max", [norm, tiny], "norm_or_tiny")], "unit")
        return self.node("Mul", [unit, self.weight(np.array([length], np.float32), "length")], output)


def save_onnx(h: Network, path: str | os.PathLike[str]) -> Path:
    """Writes :func:`onnx_model` to ``path``; raises ImportError where onnx is not installed."""
    target = check_path(path, "path")
    write_bytes(target, onnx_model(h).SerializeToString())
    return target
