"""The stages that work on a gallery's file: write, upgrade by the product, read."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import fct
from fct.artifact.transformation import Transformation
from fct.atomic_files import atomic_path
from fct.backfilling.plan import BackfillPlan
from fct.backfilling.run import BackfillReport
from fct.backfilling.verify import VerifyReport
from fct.errors import BackfillError
from fct.packed_int4 import PackedInt4
from fct.spaces import EmbeddingSpace
from fct.types import Array, Floats

__all__ = ["Gallery", "clear_upgraded", "read_gallery", "upgrade_gallery", "write_gallery"]

SPACE_KEY = b"fct.space"
VECTORS = "embedding"  # a backfill keeps the column's name, so it names neither model


@dataclass(frozen=True, slots=True)
class Gallery:
    """What a gallery holds: ids, (n, d) float32 vectors, labels; no images."""

    ids: Array
    vectors: Floats
    labels: Array


def _vectors(values: Floats) -> pa.Array:
    flat = np.ascontiguousarray(values, np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])


def _packed(codes: PackedInt4) -> pa.Array:
    values = np.ascontiguousarray(codes.values)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(values.shape[1]), len(values), [None, pa.py_buffer(values)])


def write_gallery(path: Path, vectors: Floats, side_info: PackedInt4, labels: Array, space: EmbeddingSpace) -> None:
    """id, embedding, side_info, label as one Parquet file that says which model made its vectors."""
    columns = {VECTORS: _vectors(vectors), "side_info": _packed(side_info)}
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


def upgrade_gallery(
    source: Path, destination: Path, h: Transformation, *, progress: bool
) -> tuple[BackfillPlan, BackfillReport, VerifyReport]:
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
