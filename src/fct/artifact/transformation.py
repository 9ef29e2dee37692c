"""The artifact h: the transformation's layers, both spaces, how it was fitted, and its one-file form.

A transformation is two branches and a mixer, each a chain of ``relu(x @ weight.T + bias)``; the last layer of the
mixer has no ReLU. Batch norm and input/target scaling are folded into weights and biases, in float64, when an
artifact is made (Ramanujan et al., CVPR 2022, arXiv:2112.02805, section 3.3 for the shape).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fct.atomic_files import write_bytes
from fct.checks import check_flag, check_path, check_seed, check_whole
from fct.errors import ArtifactError
from fct.spaces import EmbeddingSpace

__all__ = ["BRANCHES", "Layer", "PrecisionEffect", "Tolerance", "Transformation", "fold_norm", "fold_scaling"]

BRANCHES = ("old", "side", "mixer")
FORMAT = "fct-transformation"
FORMAT_VERSION = 1

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, eq=False)
class Layer:
    """``relu(x @ weight.T + bias)``, or without the ReLU.

    weight: (d_out, d_in) float32, C-contiguous. bias: (d_out,) float32.
    """

    weight: Any
    bias: Any
    relu: bool = True

    def __post_init__(self) -> None:
        weight = np.ascontiguousarray(self.weight, dtype=np.float32)
        bias = np.ascontiguousarray(self.bias, dtype=np.float32)
        if weight.ndim != 2 or 0 in weight.shape:
            raise ValueError(f"weight: expected (d_out, d_in), got shape {weight.shape}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected ({weight.shape[0]},) to match the weight, got shape {bias.shape}")
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise ValueError("weight, bias: expected finite values, got NaN or infinity")
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "bias", bias)

    @property
    def d_in(self) -> int:
        return int(self.weight.shape[1])

    @property
    def d_out(self) -> int:
        return int(self.weight.shape[0])


def fold_norm(weight: Any, norm: Mapping[str, Any], eps: float) -> tuple[Any, Any]:
    """Batch norm folded into the linear layer before it: float64 (weight, bias).

    weight: (d_out, d_in), no bias. norm: "weight", "bias", "running_mean", "running_var", (d_out,) each.
    """
    mean, var = np.asarray(norm["running_mean"], np.float64), np.asarray(norm["running_var"], np.float64)
    gain = np.asarray(norm["weight"], np.float64) / np.sqrt(var + eps)
    return np.asarray(weight, np.float64) * gain[:, None], np.asarray(norm["bias"], np.float64) - mean * gain


def fold_scaling(weight: Any, bias: Any, mean: Any, scale: Any) -> tuple[Any, Any]:
    """A layer that expects (x - mean) / scale, as one that takes x: float64 (weight, bias)."""
    scaled = np.asarray(weight, np.float64) / np.asarray(scale, np.float64)
    return scaled, np.asarray(bias, np.float64) - scaled @ np.broadcast_to(mean, scaled.shape[1:]).astype(np.float64)


@dataclass(frozen=True)
class PrecisionEffect:
    """How a precision changes retrieval, against fp32, on the validation pairs of the fit.

    top10_kept: mean share of a query's fp32 top-10 that is still in its top-10.
    map_change: mAP minus fp32's mAP (labels: the query's own item where the fit had none).
    cmc1_change: CMC top-1 minus fp32's.
    """

    top10_kept: float
    map_change: float
    cmc1_change: float


@dataclass(frozen=True)
class Tolerance:
    """What ``precision="auto"`` may cost: at most 0.1 point of mAP, and 99 % of the top-10 kept, unless told."""

    map_drop: float = 0.001
    top10_kept: float = 0.99

    def allows(self, effect: PrecisionEffect) -> bool:
        return effect.map_change >= -self.map_drop and effect.top10_kept >= self.top10_kept


@dataclass(frozen=True, eq=False)
class Transformation:
    """h(old, side-information) in the new space.

    Args:
        old, side, mixer: the chains of layers; the mixer reads the old branch's output and the side branch's, in
            this order, side by side.
        old_space, new_space: what goes in and what comes out.
        side_model: id of the model that makes the side-information; None where the old embedding takes its place.
        normalise: whether the output is brought to unit length.
        calibration: activation ranges for int8, by layer name ("old.0", "side.1", "mixer.2"): (2, d_in) float32,
            the lowest and the highest value of each input channel over the calibration rows.
        precisions: measured effect of each faster precision; empty where nobody measured.
        tolerance: what ``precision="auto"`` may cost.
        info: what it was trained on, its validation figures, the configuration: plain JSON values.

    Example:
        >>> import numpy as np, fct
        >>> h = fct.Transformation.random(16, 8, 32, inner=64)
        >>> fct.transform_batch(np.ones((4, 16), np.float32), np.ones((4, 8), np.float32), h).shape
        (4, 32)
    """

    old: tuple[Layer, ...]
    side: tuple[Layer, ...]
    mixer: tuple[Layer, ...]
    old_space: EmbeddingSpace
    new_space: EmbeddingSpace
    side_model: str | None = None
    normalise: bool = False
    calibration: Mapping[str, Array] = field(default_factory=dict)
    precisions: Mapping[str, PrecisionEffect] = field(default_factory=dict)
    tolerance: Tolerance = Tolerance()
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in BRANCHES:
            chain = tuple(getattr(self, name))
            if not chain:
                raise ValueError(f"{name}: expected at least one layer, got none")
            for i, (a, b) in enumerate(itertools.pairwise(chain)):
                if a.d_out != b.d_in:
                    raise ValueError(f"{name}.{i + 1}: expected {a.d_out} inputs to match {name}.{i}, got {b.d_in}")
            object.__setattr__(self, name, chain)
        joined = self.old[-1].d_out + self.side[-1].d_out
        if self.mixer[0].d_in != joined:
            raise ValueError(f"mixer.0: expected {joined} inputs, the branches' outputs, got {self.mixer[0].d_in}")
        if self.old_space.dim != self.d_old:
            raise ValueError(f"old_space: expected dim {self.d_old} to match the layers, got {self.old_space}")
        if self.new_space.dim != self.d_new:
            raise ValueError(f"new_space: expected dim {self.d_new} to match the layers, got {self.new_space}")
        if self.side_model is None and self.d_side != self.d_old:
            raise ValueError(
                f"side: expected {self.d_old} inputs, since the old embedding takes the side-information's place, "
                f"got {self.d_side}"
            )
        for name, ranges in self.calibration.items():
            layer = dict(self.layers()).get(name)
            if layer is None or np.shape(ranges) != (2, layer.d_in):
                want = f"(2, {layer.d_in})" if layer else "the name of a layer"
                raise ValueError(f"calibration[{name!r}]: expected {want}, got shape {np.shape(ranges)}")

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: packed weights and other things kept beside them stay in this process."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    # ---- shape and cost ----
    @property
    def d_old(self) -> int:
        return self.old[0].d_in

    @property
    def d_side(self) -> int:
        """Width of the side-information (of the old embedding again where there is none)."""
        return self.side[0].d_in

    @property
    def d_new(self) -> int:
        return self.mixer[-1].d_out

    @property
    def uses_side_info(self) -> bool:
        return self.side_model is not None

    def layers(self) -> Iterator[tuple[str, Layer]]:
        """("old.0", layer), ... in the order they are computed and stored."""
        for branch in BRANCHES:
            for i, layer in enumerate(getattr(self, branch)):
                yield f"{branch}.{i}", layer

    @property
    def parameters(self) -> int:
        return sum(layer.weight.size + layer.bias.size for _, layer in self.layers())

    @property
    def flop_per_row(self) -> int:
        """Floating-point operations of the matrix products for one row, a multiply-add counted as two."""
        return sum(2 * layer.weight.size for _, layer in self.layers())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what changes the output's meaning: layers, both spaces, side_model, normalise."""
        digest = hashlib.sha256()
        digest.update(json.dumps(self._meaning(), sort_keys=True).encode())
        for name, layer in self.layers():
            digest.update(f"{name}:{layer.weight.shape}:{layer.relu}".encode())
            digest.update(layer.weight.tobytes())
            digest.update(layer.bias.tobytes())
        return digest.hexdigest()

    def _meaning(self) -> dict[str, Any]:
        return {
            "old_space": self.old_space.to_dict(),
            "new_space": self.new_space.to_dict(),
            "side_model": self.side_model,
            "normalise": self.normalise,
        }

    def __repr__(self) -> str:
        side = f"side {self.d_side} from {self.side_model!r}" if self.uses_side_info else "no side-information"
        return (
            f"Transformation({self.old_space} -> {self.new_space}, {side}, "
            f"{self.parameters:,} parameters, {self.flop_per_row / 1e6:.1f} MFLOP a row)"
        )

    # ---- precision ----
    def allows(self, precision: str) -> bool:
        """Whether ``precision`` was measured and stays inside the tolerance; "fp32" always does."""
        if precision == "fp32":
            return True
        effect = self.precisions.get(precision)
        return effect is not None and self.tolerance.allows(effect)

    def with_(self, **changes: Any) -> Transformation:
        """A copy with some fields changed (calibration, precisions, tolerance, info, spaces)."""
        return replace(self, **changes)

    # ---- one file ----
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the artifact to one ``.safetensors`` file; an old file there survives until the new one is whole."""
        from safetensors.numpy import save

        target = check_path(path, "path")
        tensors: dict[str, Array] = {}
        for name, layer in self.layers():
            tensors[f"{name}.weight"] = layer.weight
            tensors[f"{name}.bias"] = layer.bias
        for name, ranges in self.calibration.items():
            tensors[f"calibration.{name}"] = np.ascontiguousarray(ranges, dtype=np.float32)
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "plan": {b: [layer.relu for layer in getattr(self, b)] for b in BRANCHES},
            **self._meaning(),
            "fingerprint": self.fingerprint,
            "precisions": {k: vars(v) for k, v in self.precisions.items()},
            "tolerance": vars(self.tolerance),
            "info": dict(self.info),
        }
        write_bytes(target, save(tensors, metadata={"fct": json.dumps(header)}))
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Transformation:
        """Reads an artifact written by :meth:`save`. Nothing is unpickled.

        Raises:
            FileNotFoundError: no such file. ArtifactError: truncated, foreign, or its weights do not match its
                fingerprint.
        """
        from safetensors import SafetensorError, safe_open

        source = check_path(path, "path")
        if not source.is_file():
            raise FileNotFoundError(f"transformation: expected a .safetensors file, found none at {source}")
        try:
            with safe_open(str(source), framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(
                f"transformation: expected a whole .safetensors file, {source} is not: {error}"
            ) from error
        if "fct" not in metadata:
            raise ArtifactError(
                f"transformation: {source} is a .safetensors file but not one of fct's; "
                "for Apple's ml-fct checkpoints use Transformation.from_ml_fct"
            )
        try:
            header = json.loads(metadata["fct"])
            if header.get("format") != FORMAT or header.get("version") != FORMAT_VERSION:
                raise ArtifactError(
                    f"transformation: expected {FORMAT} version {FORMAT_VERSION}, {source} is "
                    f"{header.get('format')} version {header.get('version')}"
                )
            h = cls(
                **{
                    branch: tuple(
                        Layer(tensors[f"{branch}.{i}.weight"], tensors[f"{branch}.{i}.bias"], bool(relu))
                        for i, relu in enumerate(header["plan"][branch])
                    )
                    for branch in BRANCHES
                },
                old_space=EmbeddingSpace.from_dict(header["old_space"]),
                new_space=EmbeddingSpace.from_dict(header["new_space"]),
                side_model=header["side_model"],
                normalise=header["normalise"],
                calibration={
                    name.removeprefix("calibration."): value
                    for name, value in tensors.items()
                    if name.startswith("calibration.")
                },
                precisions={k: PrecisionEffect(**v) for k, v in header["precisions"].items()},
                tolerance=Tolerance(**header["tolerance"]),
                info=header["info"],
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, ValueError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"transformation: {source} is damaged: {error!r}") from error
        if h.fingerprint != header["fingerprint"]:
            raise ArtifactError(
                f"transformation: the weights in {source} do not match its fingerprint: the file was changed"
            )
        return h

    @classmethod
    def from_ml_fct(
        cls,
        path: str | os.PathLike[str],
        *,
        allow_torchscript: bool = False,
        old_space: EmbeddingSpace | None = None,
        new_space: EmbeddingSpace | None = None,
        side_model: str = "ml-fct",
        normalise: bool = False,
    ) -> Transformation:
        """Imports a checkpoint of the paper's published code; see :mod:`fct.artifact.ml_fct`."""
        from fct.artifact.ml_fct import load_ml_fct

        return load_ml_fct(
            path,
            allow_torchscript=allow_torchscript,
            old_space=old_space,
            new_space=new_space,
            side_model=side_model,
            normalise=normalise,
        )

    def to_onnx(self, path: str | os.PathLike[str]) -> Path:
        """Exports to ONNX; see :mod:`fct.artifact.onnx_export`. Needs ``pip install 'fct-embeddings[onnx]'``."""
        from fct.artifact.onnx_export import save_onnx

        return save_onnx(self, path)

    @classmethod
    def random(
        cls,
        d_old: int,
        d_side: int,
        d_new: int,
        *,
        inner: int = 2048,
        seed: int = 0,
        normalise: bool = False,
        side_info: bool = True,
    ) -> Transformation:
        """An untrained h of the paper's shape, for benchmarks and tests; activations keep about unit variance."""
        for name, value in (("d_old", d_old), ("d_side", d_side), ("d_new", d_new), ("inner", inner)):
            check_whole(value, name, 1)
        d_old, d_side, d_new, inner = (int(value) for value in (d_old, d_side, d_new, inner))
        check_seed(seed)
        check_flag(normalise, "normalise")
        check_flag(side_info, "side_info")
        if not side_info and d_side != d_old:
            raise ValueError(
                f"d_side: expected {d_old}, the old embedding's width, without side-information, got {d_side}"
            )
        rng = np.random.default_rng(seed)

        def chain(widths: Sequence[int], last_relu: bool) -> tuple[Layer, ...]:
            layers = []
            for i, (a, b) in enumerate(itertools.pairwise(widths)):
                weight = rng.standard_normal((b, a), dtype=np.float32) * np.float32(np.sqrt(2 / a))
                bias = rng.standard_normal(b, dtype=np.float32) * np.float32(0.1)
                layers.append(Layer(weight, bias, last_relu or i + 2 < len(widths)))
            return tuple(layers)

        return cls(
            old=chain((d_old, 2 * d_old, 2 * d_new), True),
            side=chain((d_side, 2 * d_side, 2 * d_new), True),
            mixer=chain((4 * d_new, inner, inner, d_new), False),
            old_space=EmbeddingSpace("random-old", d_old),
            new_space=EmbeddingSpace("random-new", d_new, normalised=normalise),
            side_model="random-side" if side_info else None,
            normalise=normalise,
            info={"untrained": True, "seed": seed},
        )
