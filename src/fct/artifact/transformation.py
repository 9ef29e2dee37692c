"""The artifact h: the transformation's layers, both spaces, how it was fitted.

A transformation is two branches and a mixer, each a chain of ``relu(x @ weight.T + bias)``; the last layer of the
mixer has no ReLU. A linear skip from what goes in may be added to what comes out. Batch norm and input/target scaling
are folded into weights and biases, in float64, when an artifact is made (Ramanujan et al., CVPR 2022,
arXiv:2112.02805, section 3.3 for the shape).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fct.artifact.composition import composed_fields
from fct.artifact.file_format import read_artifact, require_whole, write_artifact
from fct.artifact.layers import BRANCHES, SKIP, Layer, check_chain, check_skip, fold_norm, fold_scaling
from fct.artifact.ml_fct import load_ml_fct
from fct.artifact.onnx_export import save_onnx
from fct.artifact.tolerance import PrecisionEffect, Tolerance
from fct.artifact.untrained import untrained_fields
from fct.checks import check_flag, check_kind, check_mapping, check_positive, check_text
from fct.errors import ArtifactError
from fct.spaces import EmbeddingSpace
from fct.types import Float32s, JsonDict

if TYPE_CHECKING:
    from fct.arrow_mapper import ArrowMapper
    from fct.types import CodeNumber

__all__ = [
    "BRANCHES",
    "SKIP",
    "Layer",
    "PrecisionEffect",
    "Tolerance",
    "Transformation",
    "fold_norm",
    "fold_scaling",
]

_DEFAULT_TOLERANCE = Tolerance()


@dataclass(frozen=True, eq=False)
class Transformation:
    """h(old, side-information) in the new space.

    Args:
        old, side, mixer: the chains of layers, each of any depth from one on; the mixer reads the old branch's output
            and the side branch's, in this order, side by side.
        old_space, new_space: what goes in and what comes out.
        side_model: id of the model that makes the side-information; None where the old embedding takes its place.
        normalise: whether the output is brought to unit length (or to ``length``).
        calibration: activation ranges for int8, by layer name ("old.0", "side.1", "mixer.2", "skip"): (2, d_in)
            float32, the lowest and the highest value of each input channel over the calibration rows.
        precisions: measured effect of each faster precision; empty where nobody measured.
        tolerance: what ``precision="auto"`` may cost.
        info: what it was trained on, its validation figures, the configuration: plain JSON values.
        skip: a linear layer, weight (d_new, d_old + d_side), or (d_new, d_old) where there is no side-information,
            whose output on [old, side] is added to the mixer's before normalising. None: no skip.
        length: what a normalised output is brought to, a little under 1 for rows that are searched among true ones by
            inner product. 1.0 where ``normalise`` is False.

    Examples:
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
    calibration: Mapping[str, Float32s] = field(default_factory=dict)
    precisions: Mapping[str, PrecisionEffect] = field(default_factory=dict)
    tolerance: Tolerance = _DEFAULT_TOLERANCE
    info: Mapping[str, Any] = field(default_factory=dict)
    skip: Layer | None = None
    length: float = 1.0

    def __post_init__(self) -> None:
        for name in BRANCHES:
            object.__setattr__(self, name, check_chain(getattr(self, name), name))
        self._check_kinds()
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
        check_skip(self.skip, self.d_in, self.d_new)
        object.__setattr__(self, "length", check_positive(self.length, "length"))
        if self.length != 1.0 and not self.normalise:
            raise ValueError(f"length: expected 1.0 for outputs that are not normalised, got {self.length}")
        for name, ranges in self.calibration.items():
            layer = dict(self.layers()).get(name)
            if layer is None or np.shape(ranges) != (2, layer.d_in):
                want = f"(2, {layer.d_in})" if layer else "the name of a layer"
                raise ValueError(f"calibration[{name!r}]: expected {want}, got shape {np.shape(ranges)}")

    def _check_kinds(self) -> None:
        for name in ("old_space", "new_space"):
            check_kind(getattr(self, name), name, EmbeddingSpace, "an fct.EmbeddingSpace")
        for name in ("calibration", "precisions", "info"):
            check_mapping(getattr(self, name), name, "a mapping")
        for name, effect in self.precisions.items():
            check_kind(effect, f"precisions[{name!r}]", PrecisionEffect, "a PrecisionEffect")
        check_kind(self.tolerance, "tolerance", Tolerance, "a Tolerance")
        object.__setattr__(self, "normalise", check_flag(self.normalise, "normalise"))
        if self.side_model is not None:
            check_text(self.side_model, "side_model", "the id of a model, or None")

    def __getstate__(self) -> JsonDict:
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
    def d_in(self) -> int:
        """Columns of what the skip reads: the old embedding, and the side-information where there is one."""
        return self.d_old + (self.d_side if self.uses_side_info else 0)

    @property
    def uses_side_info(self) -> bool:
        return self.side_model is not None

    def layers(self) -> Iterator[tuple[str, Layer]]:
        """("old.0", layer), ..., the skip last as "skip", in the order they are stored."""
        for branch in BRANCHES:
            for i, layer in enumerate(getattr(self, branch)):
                yield f"{branch}.{i}", layer
        if self.skip is not None:
            yield SKIP, self.skip

    @property
    def parameters(self) -> int:
        return sum(layer.weight.size + layer.bias.size for _, layer in self.layers())

    @property
    def flop_per_row(self) -> int:
        """Floating-point operations of the matrix products for one row, a multiply-add counted as two."""
        return sum(2 * layer.weight.size for _, layer in self.layers())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what changes the output's meaning: layers, both spaces, side_model, normalise, length."""
        digest = hashlib.sha256()
        digest.update(json.dumps(self._meaning(), sort_keys=True).encode())
        for name, layer in self.layers():
            digest.update(f"{name}:{layer.weight.shape}:{layer.relu}".encode())
            digest.update(layer.weight.tobytes())
            digest.update(layer.bias.tobytes())
        return digest.hexdigest()

    def _meaning(self) -> JsonDict:
        return {
            "old_space": self.old_space.to_dict(),
            "new_space": self.new_space.to_dict(),
            "side_model": self.side_model,
            "normalise": self.normalise,
            **({} if self.length == 1.0 else {"length": self.length}),
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
        """Writes the artifact to one ``.safetensors`` file; an old file there survives until the new one is whole.

        Versions before 0.2 refuse, by its format version, an artifact with a skip or a length.
        """
        tensors: dict[str, Float32s] = {}
        for name, layer in self.layers():
            tensors[f"{name}.weight"] = layer.weight
            tensors[f"{name}.bias"] = layer.bias
        for name, ranges in self.calibration.items():
            tensors[f"calibration.{name}"] = np.ascontiguousarray(ranges, dtype=np.float32)
        header = {
            "plan": {b: [layer.relu for layer in getattr(self, b)] for b in BRANCHES}
            | ({} if self.skip is None else {SKIP: [False]}),
            **self._meaning(),
            "fingerprint": self.fingerprint,
            "precisions": {k: vars(v) for k, v in self.precisions.items()},
            "tolerance": vars(self.tolerance),
            "info": dict(self.info),
        }
        return write_artifact(path, header, tensors, version=1 if self.skip is None and self.length == 1.0 else 2)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Transformation:
        """Reads an artifact written by :meth:`save`. Nothing is unpickled.

        Raises:
            FileNotFoundError: no such file. ArtifactError: truncated, foreign, or its weights do not match its
                fingerprint.
        """
        source, header, tensors = read_artifact(path)

        def layer(name: str, relu: bool) -> Layer:
            return Layer(tensors[f"{name}.weight"], tensors[f"{name}.bias"], bool(relu))

        try:
            plan = header["plan"]
            h = cls(
                **{b: tuple(layer(f"{b}.{i}", relu) for i, relu in enumerate(plan[b])) for b in BRANCHES},
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
                skip=layer(SKIP, False) if SKIP in plan else None,
                length=header.get("length", 1.0),
            )
        except ArtifactError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ArtifactError(f"transformation: {source} is damaged: {error!r}") from error
        if h.fingerprint != header.get("fingerprint"):
            raise ArtifactError(
                f"transformation: the weights in {source} do not match its fingerprint: the file was changed"
            )
        require_whole(header, tensors, source)
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
        """Imports a checkpoint of the paper's published code.

        Args:
            path: a state dict saved with ``torch.save``, or a TorchScript archive; of h, or of the whole transformed
                model (``*_transformed.pt``), whose h is taken.
            allow_torchscript: take the tensors out of a TorchScript archive too; none of its code runs.
            old_space, new_space: whose vectors these are; by default named "ml-fct old" and "ml-fct new".
            side_model: the id of the model that makes the side-information.
            normalise: bring h's output to unit length.

        Raises:
            FileNotFoundError: no such file. ArtifactError: not such a checkpoint; the missing or surplus key is named.
            PermissionError: a TorchScript archive without ``allow_torchscript=True``.
        """
        old, side, mixer = load_ml_fct(path, allow_torchscript=allow_torchscript)
        try:
            return cls(
                old=old,
                side=side,
                mixer=mixer,
                old_space=old_space or EmbeddingSpace("ml-fct old", old[0].d_in),
                new_space=new_space or EmbeddingSpace("ml-fct new", mixer[-1].d_out, normalised=normalise),
                side_model=side_model,
                normalise=normalise,
                info={"imported_from": "ml-fct"},
            )
        except ArtifactError:
            raise
        except ValueError as error:
            raise ArtifactError(f"path: the layers in {path} do not fit together: {error}") from error

    @classmethod
    def compose(cls, first: Transformation, second: Transformation) -> Transformation:
        """``second`` after ``first`` as one h: v1 -> v2 and v2 -> v3 as v1 -> v3, without pairs of v1 and v3.

        Exact to fp32's rounding, where ``first`` does not normalise. It reads both side-informations, side by side
        ("a + b"), or once where one model makes it. It runs in fp32: no activations were measured for int8.

        Raises:
            SpaceMismatchError: ``second`` does not read what ``first`` gives. ValueError: ``first`` normalises.

        Examples:
            >>> import fct
            >>> a, b = (fct.Transformation.random(*d, inner=8, side_info=False) for d in ((2, 2, 3), (3, 3, 4)))
            >>> b = b.with_(old_space=a.new_space)
            >>> fct.Transformation.compose(a, b).d_new
            4
        """
        for name, part in (("first", first), ("second", second)):
            check_kind(part, name, Transformation, "an fct.Transformation")
        return cls(**composed_fields(first, second), tolerance=second.tolerance)

    def arrow_mapper(
        self,
        *,
        vector: str,
        side: str | None = None,
        out: str = "embedding_v2",
        on_bad: str = "null",
        why: str | None = None,
        vector_format: str = "auto",
        dtype: str = "float32",
        binary_dtype: str = "float32",
        scale: CodeNumber = 1.0,
        offset: CodeNumber = 0.0,
        precision: str = "auto",
        backend: str | None = None,
        threads: int = 1,
    ) -> ArrowMapper:
        """h as one picklable callable over Arrow batches, for Spark, Ray Data, daft, Dask and pandas.

        docs/engines.md has a line for each, and what is lost against :func:`fct.backfill`.

        Args:
            vector, side: columns of the old vectors (d_old a row) and of the side-information (d_side a row; None for
                an h without). Lists or binary, as a gallery's columns.
            out: the column to add; the name of ``vector`` to put the new vectors in its place.
            on_bad: what becomes of a null, NaN or otherwise unusable row: "null" leaves a null and counts it
                (``mapper.bad``, by reason, in that process); "raise" raises ValueError.
            why: a column to add that says of each null why; None for none.
            vector_format: "fixed_size_list", "list", "binary"; "auto": as the old vectors'. dtype: float32 or float16.
            binary_dtype: what binary columns hold. scale, offset: the old vectors are multiplied
                by the one, and then the other is added: a number or one for each dimension, (d_old,).
            precision, backend: as :func:`fct.transform_batch` has them.
            threads: of one call; engines start a process for each processor, so one.

        Returns:
            fct.ArrowMapper: takes a RecordBatch, a Table or an iterable of RecordBatches, and gives the same.

        Raises:
            ValueError: side missing or too many; when called, a missing column or one of another length.

        Examples:
            >>> import fct, pyarrow as pa
            >>> h = fct.Transformation.random(2, 2, 3, inner=4, side_info=False)
            >>> table = pa.table({"v": pa.array([[1.0, 2.0], None], pa.list_(pa.float32()))})
            >>> mapped = h.arrow_mapper(vector="v")(table)
            >>> mapped.schema.field("embedding_v2").type, mapped["embedding_v2"].null_count
            (ListType(list<item: float>), 1)
        """
        from fct import ArrowMapper

        return ArrowMapper(
            self,
            vector=vector,
            side=side,
            out=out,
            on_bad=on_bad,
            why=why,
            vector_format=vector_format,
            dtype=dtype,
            binary_dtype=binary_dtype,
            scale=scale,
            offset=offset,
            precision=precision,
            backend=backend,
            threads=threads,
        )

    def to_onnx(self, path: str | os.PathLike[str]) -> Path:
        """Exports to ONNX; see :mod:`fct.artifact.onnx_export`. Needs ``pip install 'fct-embeddings[onnx]'``."""
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
        branch: int | None = None,
        blocks: int = 2,
        skip: bool = False,
    ) -> Transformation:
        """An untrained h, for benchmarks and tests; activations keep about unit variance.

        Args:
            d_old, d_side, d_new: columns of the old embedding, the side-information, the output.
            inner: width of the mixer's blocks.
            seed: of the weights.
            normalise: bring the output to unit length.
            side_info: False: the old embedding stands in for the side-information.
            branch: width of the one block that a branch has; None: the paper's two blocks.
            blocks: how many blocks the mixer has before its linear layer.
            skip: add a linear skip.
        """
        found = untrained_fields(
            d_old, d_side, d_new, inner=inner, seed=seed, side_info=side_info, branch=branch, blocks=blocks, skip=skip
        )
        check_flag(normalise, "normalise")
        return cls(
            **found,
            old_space=EmbeddingSpace("random-old", int(d_old)),
            new_space=EmbeddingSpace("random-new", int(d_new), normalised=normalise),
            normalise=normalise,
        )
