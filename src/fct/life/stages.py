"""Stages of the quickstart that work on a gallery's file: write, upgrade by the product, read, count the costs."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import fct
from fct.artifact.transformation import Transformation
from fct.atomic_files import atomic_path
from fct.errors import BackfillError
from fct.spaces import EmbeddingSpace

__all__ = ["Costs", "Gallery", "model_flop", "read_gallery", "upgrade_gallery", "write_gallery"]

SPACE_KEY = b"fct.space"
VECTORS = "embedding"  # a backfill keeps the column's name, so it names neither model
_RESNET50_GFLOP = 8.2  # 4.1 GMAC an image of 224 x 224 (He et al., CVPR 2016)
_BILLION = 1e9


@dataclass(frozen=True, slots=True)
class Gallery:
    """What a gallery holds: ids, (n, d) float32 vectors, labels; no images."""

    ids: Any
    vectors: Any
    labels: Any


def _vectors(values: Any) -> pa.Array:
    flat = np.ascontiguousarray(values, np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])


def write_gallery(path: Path, vectors: Any, side_info: Any, labels: Any, space: EmbeddingSpace) -> None:
    """id, embedding, side_info, label as one Parquet file that says which model made its vectors."""
    columns = {VECTORS: _vectors(vectors), "side_info": _vectors(side_info)}
    table = pa.table({"id": pa.array(np.arange(len(labels))), **columns, "label": pa.array(labels)})
    metadata = {SPACE_KEY: json.dumps(space.to_dict(), sort_keys=True).encode()}
    with atomic_path(path) as part:
        pq.write_table(table.replace_schema_metadata(metadata), part, row_group_size=1024)


def read_gallery(path: Path) -> Gallery:
    """A Parquet file or a folder of them, in the order of its ids."""
    table = pq.read_table(path).sort_by("id").combine_chunks()
    column = table[VECTORS].combine_chunks()
    matrix = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return Gallery(table["id"].to_numpy(), matrix, table["label"].to_numpy())


def clear_upgraded(path: Path) -> None:
    """Removes the destination of an earlier run's backfill, and nothing that is not one."""
    if (path / "_fct" / "job.json").is_file():
        shutil.rmtree(path)


def upgrade_gallery(source: Path, destination: Path, h: Transformation, *, progress: bool) -> tuple[Any, Any, Any]:
    """(plan, report, verification) of a backfill from Parquet to Parquet.

    Raises:
        BackfillError: the plan refuses, or what was written is not proven to be the source's.
    """
    columns = {"vector_column": VECTORS, "id_column": "id"}
    if h.uses_side_info:
        columns["side_column"] = "side_info"
    plan = fct.plan_backfill(source, destination, h, **columns)  # type: ignore[arg-type]
    if plan.refusals:
        raise BackfillError("; ".join(plan.refusals))
    report = fct.backfill(source, destination, h, progress=progress, **columns)  # type: ignore[arg-type]
    checked = fct.verify_gallery(destination, source=source)
    if not checked.proven:
        raise BackfillError("; ".join((*checked.problems, *checked.unproven)))
    return plan, report, checked


def model_flop(model: torch.nn.Module, image: Any) -> int:
    """FLOP of one image (1, 1, h, w) through the convolutions and linear layers: two for each multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(torch.as_tensor(image, dtype=torch.float32))
    return int(counter.get_total_flops())


@dataclass(frozen=True, slots=True)
class Costs:
    """What one item costs by h and by re-embedding. h_flop, model_flop: FLOP an item; the rates: items a second."""

    h_flop: int
    model_flop: int
    h_rate: float
    backfill_rate: float
    model_rate: float

    def facts(self) -> dict[str, float]:
        return {
            "h, MFLOP an item": round(self.h_flop / 1e6, 3),
            "new model, MFLOP an item": round(self.model_flop / 1e6, 3),
            "h alone, rows a second": round(self.h_rate),
        }

    def sentences(self) -> tuple[str, str]:
        speed = self.model_flop * self.model_rate
        large = _RESNET50_GFLOP * 1e9 / speed * _BILLION
        hours = [_BILLION / rate / 3600 for rate in (self.backfill_rate, self.model_rate)]
        return (
            f"One item: {self.h_flop / 1e6:,.2f} MFLOP by h, {self.h_rate:,.0f} rows a second measured "
            f"({self.backfill_rate:,.0f} with reading and writing); {self.model_flop / 1e6:,.2f} MFLOP by the new "
            f"model, {self.model_rate:,.0f} images a second measured, decoding not counted.",
            f"A billion items, by arithmetic from these rates on this machine: {hours[0]:,.1f} hours by h, "
            f"{hours[1]:,.1f} hours by this toy model, {large / 86400:,.0f} days by a ResNet-50 (4.1 GMAC = "
            f"{_RESNET50_GFLOP} GFLOP an image) at the {speed / 1e9:,.0f} GFLOP/s that the toy model reached here.",
        )
