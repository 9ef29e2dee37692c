"""Import of checkpoints of the paper's published code (Apple's ml-fct).

Its transformation keeps 1x1 convolutions with batch norm: ``p1`` reads the old embedding, ``p2`` the
side-information, ``mixer`` both; the last mixer layer is a convolution with bias. Dimensions are read off the shapes.
That code also writes ``*_transformed.pt``, one TorchScript archive of the old model, the side-information's model and
h: h is taken out of it. TorchScript archives are read as data (``torchscript_tensors``), without ``torch.jit.load``,
which torch has deprecated.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fct.artifact.layers import Layer, fold_norm
from fct.artifact.torchscript_tensors import is_torchscript, torchscript_tensors
from fct.checks import check_path
from fct.errors import ArtifactError
from fct.extras import need
from fct.types import Floats

if TYPE_CHECKING:
    pass


__all__ = ["ML_FCT_KEYS", "chains_of_state", "load_ml_fct"]

Chains = tuple[tuple[Layer, ...], tuple[Layer, ...], tuple[Layer, ...]]

_INSIDE = "transformation."  # where h lies in that code's *_transformed.pt
_NORM_EPS = 1e-5  # torch's default, which that code keeps
_NORM = ("weight", "bias", "running_mean", "running_var")
_BLOCKS = ("p1.0", "p1.1", "p2.0", "p2.1", "mixer.0", "mixer.1")

ML_FCT_KEYS = (
    *(
        key
        for block in _BLOCKS
        for key in (
            f"{block}.conv.weight",
            *(f"{block}.normalizer.{name}" for name in (*_NORM, "num_batches_tracked")),
        )
    ),
    "mixer.2.conv.weight",
    "mixer.2.conv.bias",
)
"""Every key of such a state dict; ``num_batches_tracked`` may be absent, nothing else may."""


def load_ml_fct(path: str | os.PathLike[str], *, allow_torchscript: bool = False) -> Chains:
    """The (old, side, mixer) chains of an ml-fct checkpoint: what :meth:`fct.Transformation.from_ml_fct` is made of.

    Args:
        path: a state dict saved with ``torch.save``, or a TorchScript archive.
        allow_torchscript: take the tensors out of a TorchScript archive too; none of its code runs.

    Raises:
        FileNotFoundError: no such file. ArtifactError: not such a checkpoint; the missing or surplus key is named.
        PermissionError: a TorchScript archive without ``allow_torchscript=True``.
    """
    source = check_path(path, "path")
    if not source.is_file():
        raise FileNotFoundError(f"path: expected an ml-fct checkpoint, found no file at {source}")
    if is_torchscript(source):
        if not allow_torchscript:
            raise PermissionError(
                f"path: expected a state dict, {source} is a TorchScript archive, a program with tensors in it; pass "
                "allow_torchscript=True to take them out (none of its code runs)"
            )
        state: Mapping[str, Any] = torchscript_tensors(source)
    else:
        state = _pickled_state(source)
    return chains_of_state(state, source=str(source))


def _pickled_state(path: Path) -> Mapping[str, Any]:
    torch = need("torch", "from_ml_fct")

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"path: expected a state dict saved with torch.save, {path} is not: {reason}") from error
    for name in ("state_dict", "model"):  # training scripts wrap it
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping):
        raise ArtifactError(f"path: expected a state dict, {path} holds a {type(state).__name__}")
    return state


def _of_h(state: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The arrays of h by the reference code's names; raises ArtifactError where one lacks or is too many."""
    prefixed = bool(state) and all(str(name).startswith("module.") for name in state)
    arrays = {str(name).removeprefix("module.") if prefixed else str(name): value for name, value in state.items()}
    inside = {name: value for name, value in arrays.items() if name.startswith(_INSIDE)}
    if inside:  # the transformed model: old model, side-information's model and h in one
        arrays = {name.removeprefix(_INSIDE): value for name, value in inside.items()}
    required = [key for key in ML_FCT_KEYS if not key.endswith("num_batches_tracked")]
    missing = [key for key in required if key not in arrays]
    surplus = [key for key in arrays if key not in ML_FCT_KEYS]
    if missing or surplus:
        reasons = [f"missing {', '.join(missing)}"] if missing else []
        reasons += [f"surplus {', '.join(surplus)}"] if surplus else []
        raise ArtifactError(f"path: expected the keys of an ml-fct transformation in {source}: {'; '.join(reasons)}")
    return arrays


@dataclass(frozen=True, slots=True)
class _State:
    """Reads h's layers; what does not fit is an ArtifactError that names the file and the key."""

    arrays: Mapping[str, Any]
    source: str

    def array(self, key: str) -> Floats:
        value = self.arrays[key]
        values = np.asarray(value.detach().cpu().double().numpy() if hasattr(value, "detach") else value, np.float64)
        if not np.isfinite(values).all():
            raise ArtifactError(f"path: expected finite values in {self.source}, {key} holds NaN or infinity")
        return values

    def matrix(self, key: str) -> Floats:
        weight = self.array(key)
        if weight.ndim == 4 and weight.shape[2:] == (1, 1):
            weight = weight[:, :, 0, 0]
        if weight.ndim != 2:
            raise ArtifactError(f"path: expected {key} of shape (out, in, 1, 1), got {weight.shape}")
        return weight

    def block(self, name: str) -> Layer:
        weight = self.matrix(f"{name}.conv.weight")
        norm = {part: self.array(f"{name}.normalizer.{part}") for part in _NORM}
        for part, values in norm.items():
            if values.shape != weight.shape[:1]:
                raise ArtifactError(
                    f"path: expected {name}.normalizer.{part} of shape ({weight.shape[0]},), got {values.shape}"
                )
        if (norm["running_var"] < 0).any():
            raise ArtifactError(f"path: expected variances of at least 0 in {name}.normalizer.running_var")
        return Layer(*fold_norm(weight, norm, _NORM_EPS), True)


def chains_of_state(state: Mapping[str, Any], *, source: str = "state dict") -> Chains:
    """The same from a state dict (name -> tensor or array); batch norm is folded in float64."""
    read = _State(_of_h(state, source), source)
    try:
        last = Layer(read.matrix("mixer.2.conv.weight"), read.array("mixer.2.conv.bias"), False)
        old, side = (read.block("p1.0"), read.block("p1.1")), (read.block("p2.0"), read.block("p2.1"))
        return old, side, (read.block("mixer.0"), read.block("mixer.1"), last)
    except ArtifactError:
        raise
    except ValueError as error:
        raise ArtifactError(f"path: the layers in {source} do not fit together: {error}") from error
