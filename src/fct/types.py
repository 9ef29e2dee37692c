"""The names that arguments are chosen by, and what may stand where a gallery, a transformation or a filesystem does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypedDict, TypeVar
from uuid import UUID

__all__ = [
    "Access",
    "Array",
    "Bools",
    "CodeArray",
    "CodeNumber",
    "DType",
    "FileSystem",
    "Float32s",
    "Floats",
    "Format",
    "GalleryLike",
    "Id",
    "Indices",
    "Int64s",
    "JsonDict",
    "LabelsLike",
    "Metric",
    "NumpyDType",
    "OneKind",
    "Precision",
    "RowsLike",
    "StorageAccess",
    "StorageOptions",
    "SupportsDLPack",
    "TransformationLike",
    "Values",
    "VectorFormat",
]

Metric: TypeAlias = Literal["l2", "ip", "cosine"]
Precision: TypeAlias = Literal["auto", "fp32", "bf16", "int8", "fp16", "fp8"]
DType: TypeAlias = Literal["float32", "float16"]
Format: TypeAlias = Literal["npy", "bin", "parquet", "arrow", "vortex", "lance", "delta"]
VectorFormat: TypeAlias = Literal["fixed_size_list", "list", "binary"]

JsonDict: TypeAlias = dict[str, Any]  # a JSON object, or the state of a pickled one: its reader checks the values
StorageOptions: TypeAlias = Mapping[str, object]  # what fsspec passes on to a store
Id: TypeAlias = str | int | bytes | UUID  # what a column of ids holds


class SupportsDLPack(Protocol):
    """An array of another library: CuPy, JAX, ..."""

    def __dlpack__(self, *, stream: int | None = ...) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


class StorageAccess(TypedDict):
    """What the command line says of a store."""

    storage_options: StorageOptions | None


class Access(TypedDict, total=False):
    """How a store is opened: the keywords of :func:`fct.gallery.open_source`."""

    filesystem: FileSystem | None
    storage_options: StorageOptions | None
    retry_policy: RetryPolicy | None


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
    from fct.gallery.location import Location, RetryPolicy
    from fct.packed_int4 import PackedInt4

    Array: TypeAlias = npt.NDArray[Any]  # of any dtype; the docstring says which
    Floats: TypeAlias = npt.NDArray[np.floating[Any]]
    Float32s: TypeAlias = npt.NDArray[np.float32]
    Int64s: TypeAlias = npt.NDArray[np.int64]
    NumpyDType: TypeAlias = np.dtype[np.generic]
    Indices: TypeAlias = npt.NDArray[np.integer[Any]]
    Bools: TypeAlias = npt.NDArray[np.bool_]
    # What comes in at the gate; and what lies behind it: numpy arrays on a CPU, torch tensors on a GPU. Where one code
    # calculates with both through the operators that the two share, which no type of theirs has in common, these are
    # Values; where what goes out is of the kind that came in, OneKind.
    OneKind = TypeVar("OneKind", npt.NDArray[Any], torch.Tensor)
    RowsLike: TypeAlias = Array | torch.Tensor | ScaledInt8 | PackedInt4 | SupportsDLPack
    LabelsLike: TypeAlias = npt.ArrayLike | torch.Tensor
    Values: TypeAlias = Any
    GalleryLike: TypeAlias = str | os.PathLike[str] | Source | Location | ds.Dataset | pa.Table | Callable[[], object]
    TransformationLike: TypeAlias = str | os.PathLike[str] | Transformation
    CodeArray: TypeAlias = str | os.PathLike[str] | Array | Sequence[Sequence[float]]
    CodeNumber: TypeAlias = float | str | os.PathLike[str] | Array | Sequence[float]
    FileSystem: TypeAlias = fsspec.AbstractFileSystem | pyarrow.fs.FileSystem
else:  # at run time an argument's check says what it expected; nothing heavy is loaded for a name
    Array = Floats = Float32s = Int64s = NumpyDType = Indices = Bools = RowsLike = LabelsLike = Values = Any
    CodeArray = CodeNumber = GalleryLike = TransformationLike = FileSystem = OneKind = Any
