"""What only some things need: which extra brings a package, and the one sentence that says so where it is missing."""

from __future__ import annotations

import functools
import importlib
from importlib.util import find_spec
from types import ModuleType

from fct.errors import MissingExtraError

__all__ = ["explained", "need", "why_missing"]

# module -> the extra that brings it (pyproject.toml)
EXTRAS = {
    "torch": "train",
    "torchvision": "train",
    "pytorch_metric_learning": "train",
    "matplotlib": "train",
    "PIL": "train",
    "yaml": "train",
    "timm": "timm",
    "sentence_transformers": "sentence-transformers",
    "triton": "gpu",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "faiss": "faiss",
    "lance": "lance",
    "lancedb": "lance",
    "ray": "ray",
    "s3fs": "s3",
    "gcsfs": "gs",
    "deltalake": "delta",
    "pyiceberg": "iceberg",
    "h5py": "hdf5",
    "zarr": "zarr",
    "vortex": "vortex",
    "psycopg": "postgres",
    "qdrant_client": "qdrant",
    "pymilvus": "milvus",
    "milvus_lite": "milvus",
    "chromadb": "chroma",
}
# module -> its distribution, where the two names differ
_DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "lance": "pylance", "faiss": "faiss-cpu", "vortex": "vortex-data"}


def _sentence(module: str) -> str:
    name = _DISTRIBUTIONS.get(module, module.replace("_", "-"))
    return f"needs {name}, which is not installed: pip install 'fct-embeddings[{EXTRAS[module]}]'"


def need(module: str, what: str) -> ModuleType:
    """The module, imported. what: the argument or command that needs it, for the message.

    Raises:
        MissingExtraError: it is not installed; says which extra brings it.

    Examples:
        >>> from fct.extras import need
        >>> need("json", "example").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name not in (module, top) or top not in EXTRAS:
            raise
        raise MissingExtraError(f"{what}: {_sentence(top)}", name=error.name) from error


@functools.cache
def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def why_missing(module: str) -> list[str]:
    """The sentence, for a backend's ``why_not``; empty where the module is installed. Imports nothing."""
    return [] if _is_there(module) else [_sentence(module)]


def explained(error: ImportError, what: str) -> ImportError:
    """``error`` itself, or the MissingExtraError that says what to install where a module of an extra is missing.

    For whole rooms that import such a module at their top.
    """
    top = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and top in EXTRAS:
        return MissingExtraError(f"{what}: {_sentence(top)}", name=error.name)
    return error
