"""Modules that version 0.1 had under other names still import, with a DeprecationWarning that says the new one.

One finder instead of a file for each.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

__all__ = ["MOVED", "install"]

MOVED = {
    "fct.arrays": "fct.rows",
    "fct.files": "fct.atomic_files",
    "fct.ml_fct": "fct.artifact.ml_fct",
    "fct.onnx_export": "fct.artifact.onnx_export",
    "fct.transformation": "fct.artifact.transformation",
    "fct.retrieval": "fct.search",
    "fct.quickstart": "fct.life.quickstart",
    "fct.reproduce": "fct.life",
    "fct.training": "fct.fit",
    "fct.training.config": "fct.fit.recipes",
    "fct.training.precision": "fct.fit.precision_choice",
    "fct.training.transformation": "fct.fit.transformation_fit",
    "fct.training.device": "fct.fit.training_device",
    "fct.training.images": "fct.fit.images",
    "fct.training.loop": "fct.fit.loop",
    "fct.training.supervised": "fct.fit.supervised",
    "fct.training.side_info": "fct.fit.side_info",
    "fct.training.model_file": "fct.fit.model_file",
    "fct.training.backbones": "fct.fit.backbones",
    "fct.training.bct": "fct.fit.bct",
    "fct.training.module": "fct.fit.module",
    "fct.training.pairs": "fct.fit.pairs",
    "fct.ops.dispatch": "fct.ops.registry",
    "fct.ops.selfproof": "fct.ops.proof",
    "fct.ops.quantise": "fct.ops.numerics.quantise",
    "fct.ops.rounding": "fct.ops.numerics.rounding",
    "fct.gallery.base": "fct.gallery.interfaces",
    "fct.gallery.raw": "fct.gallery.matrix_files",
    "fct.gallery.parquet": "fct.gallery.parquet_files",
    "fct.gallery.arrow": "fct.gallery.arrow_files",
    "fct.gallery.lance": "fct.gallery.lance_dataset",
    "fct.gallery.faiss": "fct.gallery.faiss_index",
    "fct.gallery.files": "fct.gallery.file_gallery",
    "fct.gallery.spaces": "fct.gallery.space_tags",
    "fct.report.bench": "fct.bench.throughput",
    "fct.report.measure": "fct.bench.measure",
    "fct.report.peers": "fct.bench.peers",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked first, so that a module of a moved package is not loaded a second time from the package's new folder."""

    def __init__(self) -> None:
        self._specs: dict[int, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        text = f"{spec.name} is {new} since fct 0.2; the old name goes with 0.3"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._specs[id(module)] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It was executed under its own name, whose specification the import machinery has just replaced."""
        module.__spec__ = self._specs.pop(id(module))


def install() -> None:
    """Puts the finder in front of the others, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
