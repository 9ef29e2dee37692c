"""What brings the old vectors back where they are stored as codes: row = code * scale + offset."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import numpy as np
import pyarrow as pa

from fct.backfilling.job import Job
from fct.gallery.vector_types import plain_type
from fct.gallery.vectors import VectorBlock
from fct.options.groups import Columns
from fct.types import Array, CodeArray

if TYPE_CHECKING:
    pass


__all__ = ["JobCoding", "code_columns", "decoded", "job_coding", "taken_as_they_are"]

_CODES = (pa.int8(), pa.uint8())


class JobCoding(TypedDict):
    """The fields of a job that say how its codes are read."""

    scale: float
    offset: float
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    scale_column: str
    offset_column: str


def job_coding(columns: Columns, schema: pa.Schema, vector: str, d: int) -> JobCoding:
    """What the options mean for this gallery.

    Raises:
        ValueError: both ``code_ranges`` and a scale or an offset; a number of dimensions that is not d; a column that
        is not there or holds no numbers.
    """
    scale, offset = columns.scale, columns.offset
    if columns.code_ranges is not None:
        if scale != 1.0 or offset != 0.0:
            raise ValueError("code_ranges: expected it alone, since scale and offset follow from it")
        scale, offset = _of_ranges(columns.code_ranges, schema.field(vector).type)
    made = JobCoding(scale=1.0, offset=0.0, scales=(), offsets=(), scale_column="", offset_column="")
    for name, value in (("scale", scale), ("offset", offset)):
        if isinstance(value, tuple):
            if len(value) != d:
                raise ValueError(f"{name}: expected {d} numbers, one for each dimension, got {len(value)}")
            made[f"{name}s"] = value  # type: ignore[literal-required]
        elif isinstance(value, str):
            made[f"{name}_column"] = _number_column(schema, value, name)  # type: ignore[literal-required]
        else:
            made[name] = value  # type: ignore[literal-required]
    return made


def _of_ranges(ranges: CodeArray, kind: pa.DataType) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(scales, offsets) of the ranges that sentence-transformers' ``quantize_embeddings`` cuts into 255 steps: uint8
    codes count from the lowest value, int8 codes from 128 steps above it."""
    low, high = (np.asarray(row, np.float64) for row in np.asarray(ranges, np.float64))
    step = (high - low) / 255
    element = getattr(plain_type(kind), "value_type", None)
    if element not in _CODES:
        raise ValueError(f"code_ranges: expected a gallery of int8 or uint8 codes, got {kind}")
    offset = low if element == pa.uint8() else low + 128 * step
    return tuple(step.tolist()), tuple(offset.tolist())


def _number_column(schema: pa.Schema, name: str, what: str) -> str:
    if name not in schema.names:
        raise ValueError(
            f"{what}: expected a number, an .npy file with one for each dimension, or a column of the gallery "
            f"({', '.join(schema.names)}), got {name!r}"
        )
    kind = schema.field(name).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise ValueError(f"{what}: expected a column of numbers, {name!r} is {kind}")
    return name


def code_columns(job: JobCoding) -> tuple[str, str]:
    """The columns that hold a scale and an offset for each row; "" for none."""
    return job["scale_column"], job["offset_column"]


def taken_as_they_are(job: Job, schema: pa.Schema) -> bool:
    """Whether 8-bit codes are read without any scale or offset."""
    element = getattr(plain_type(schema.field(job.vector).type), "value_type", None)
    plain = job.scale == 1.0 and job.offset == 0.0
    return element in _CODES and plain and not (job.scales or job.offsets or job.scale_column or job.offset_column)


def decoded(job: Job, block: VectorBlock, batch: pa.RecordBatch) -> tuple[Array, dict[int, str]]:
    """(the block's rows as the vectors that they stand for, in float32; reasons by row of the batch)."""
    values = block.values
    bad: dict[int, str] = {}
    with np.errstate(over="ignore", invalid="ignore"):
        for name, each, column in (("scale", job.scales, job.scale_column), ("offset", job.offsets, job.offset_column)):
            number = getattr(job, name)
            if column:
                rows, odd = _of_rows(batch.column(column), name, column, block.rows)
                bad |= odd
            elif each:
                rows = np.asarray(each, np.float32)
            elif number != (1.0 if name == "scale" else 0.0):
                rows = np.float32(number)
            else:
                continue
            values = values * rows if name == "scale" else values + rows
    return values, bad


def _of_rows(column: pa.Array, what: str, name: str, rows: Array | None) -> tuple[Array, dict[int, str]]:
    """((m, 1) numbers of the rows, reasons for those that are none)."""
    numbers = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    narrow = numbers.astype(np.float32)
    fine = np.isfinite(narrow) & (narrow > 0 if what == "scale" else True)
    kind = "a positive finite number" if what == "scale" else "a finite number"
    odd = {int(i): f"{what} ({name}): expected {kind}, got {column[int(i)].as_py()}" for i in np.flatnonzero(~fine)}
    return (narrow if rows is None else narrow[rows])[:, None], odd
