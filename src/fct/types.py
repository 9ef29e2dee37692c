"""The names that arguments are chosen by, and what may stand where a gallery, a transformation or a filesystem does."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

__all__ = [
    "CodeArray",
    "CodeNumber",
    "DType",
    "FileSystem",
    "Format",
    "GalleryLike",
    "Metric",
    "Precision",
    "TransformationLike",
    "VectorFormat",
]

Metric: TypeAlias = Literal["l2", "ip", "cosine"]
Precision: TypeAlias = Literal["auto", "fp32", "bf16", "int8", "fp16", "fp8"]
DType: TypeAlias = Literal["float32", "float16"]
Format: TypeAlias = Literal["npy", "bin", "parquet", "arrow", "lance", "delta"]
VectorFormat: TypeAlias = Literal["fixed_size_list", "list", "binary"]

if TYPE_CHECKING:
    import fsspec
    import numpy as np
    import pyarrow as pa
    import pyarrow.dataset as ds
    import pyarrow.fs

    from fct.artifact.transformation import Transformation
    from fct.gallery.interfaces import Source
    from fct.gallery.location import Location

    GalleryLike: TypeAlias = str | os.PathLike[str] | Source | Location | ds.Dataset | pa.Table | Callable[[], object]
    TransformationLike: TypeAlias = str | os.PathLike[str] | Transformation
    CodeArray: TypeAlias = str | os.PathLike[str] | np.ndarray[Any, Any] | Sequence[Sequence[float]]
    CodeNumber: TypeAlias = float | str | os.PathLike[str] | np.ndarray[Any, Any] | Sequence[float]
    FileSystem: TypeAlias = fsspec.AbstractFileSystem | pyarrow.fs.FileSystem
else:  # at run time an argument's check says what it expected; nothing heavy is loaded for a name
    CodeArray = CodeNumber = GalleryLike = TransformationLike = FileSystem = Any
