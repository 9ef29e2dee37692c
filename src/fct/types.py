"""The names that arguments are chosen by, and what may stand where a gallery, a transformation or a filesystem does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

__all__ = [
    "Array",
    "Bools",
    "CodeArray",
    "CodeNumber",
    "DType",
    "FileSystem",
    "Floats",
    "Format",
    "GalleryLike",
    "Indices",
    "JsonDict",
    "LabelsLike",
    "Metric",
    "Precision",
    "RowsLike",
    "StorageOptions",
    "SupportsDLPack",
    "TransformationLike",
    "Values",
    "VectorFormat",
]

Metric: TypeAlias = Literal["l2", "ip", "cosine"]
Precision: TypeAlias = Literal["auto", "fp32", "bf16", "int8", "fp16", "fp8"]
DType: TypeAlias = Literal["float32", "float16"]
Format: TypeAlias = Literal["npy", "bin", "parquet", "arrow", "lance", "delta"]
VectorFormat: TypeAlias = Literal["fixed_size_list", "list", "binary"]

JsonDict: TypeAlias = dict[str, Any]  # a JSON object, or the state of a pickled one: its reader checks the values
StorageOptions: TypeAlias = Mapping[str, Any]  # what fsspec passes on to a store


class SupportsDLPack(Protocol):
    """An array of another library: CuPy, JAX, ..."""

    def __dlpack__(self, *, stream: Any = ...) -> object: ...
    def __dlpack_device__(self) -> tuple[Any, Any]: ...


if TYPE_CHECKING:
    import fsspec
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    import pyarrow.dataset as ds
    import pyarrow.fs
    import torch

    from fct.artifact.transformation import Transformation
    from fct.codes import ScaledInt8
    from fct.gallery.interfaces import Source
    from fct.gallery.location import Location
    from fct.packed_int4 import PackedInt4

    Array: TypeAlias = npt.NDArray[Any]  # of any dtype; the docstring says which
    Floats: TypeAlias = npt.NDArray[np.floating[Any]]
    Indices: TypeAlias = npt.NDArray[np.integer[Any]]
    Bools: TypeAlias = npt.NDArray[np.bool_]
    # What comes in at the gate, and what lies behind it: on a CPU numpy arrays, on a GPU torch tensors.
    RowsLike: TypeAlias = Array | torch.Tensor | ScaledInt8 | PackedInt4 | SupportsDLPack
    LabelsLike: TypeAlias = npt.ArrayLike | torch.Tensor
    Values: TypeAlias = Any
    GalleryLike: TypeAlias = str | os.PathLike[str] | Source | Location | ds.Dataset | pa.Table | Callable[[], object]
    TransformationLike: TypeAlias = str | os.PathLike[str] | Transformation
    CodeArray: TypeAlias = str | os.PathLike[str] | Array | Sequence[Sequence[float]]
    CodeNumber: TypeAlias = float | str | os.PathLike[str] | Array | Sequence[float]
    FileSystem: TypeAlias = fsspec.AbstractFileSystem | pyarrow.fs.FileSystem
else:  # at run time an argument's check says what it expected; nothing heavy is loaded for a name
    Array = Floats = Indices = Bools = RowsLike = LabelsLike = Values = Any
    CodeArray = CodeNumber = GalleryLike = TransformationLike = FileSystem = Any
