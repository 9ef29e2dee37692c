"""RowMapper: one batch through h, bad rows aside, every other column as it came."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa

from fct.artifact.transformation import Transformation
from fct.backfilling.coding import decoded
from fct.backfilling.input_digest import InputDigest
from fct.backfilling.job import Job
from fct.gallery.interfaces import JOB_KEY, TRUE_KEY, VECTOR_KEY
from fct.gallery.matrix_files import ROW
from fct.gallery.recycler import Recycler
from fct.gallery.space_tags import SPACE_KEY, with_space
from fct.gallery.vectors import VectorBlock, column_type, vector_array, vector_block
from fct.rows import nonfinite_rows, rows_of
from fct.transform import transform_finite
from fct.types import Array, JsonDict

__all__ = ["RowMapper", "output_schema"]


def output_schema(job: Job, schema: pa.Schema) -> pa.Schema:
    """The source's columns in their order, the vectors replaced; a row number where there is no other column."""
    d, kind = job.new_space.dim, job.vector_format
    fields = []
    for entry in schema:
        if entry.name == job.vector:
            fields.append(pa.field(job.vector, column_type(d, job.dtype, kind), nullable=False))
        elif not job.side_column or entry.name != job.side_column or job.keep_side:  # a column may be named ""
            fields.append(entry)
    if len(fields) == 1:
        fields.insert(0, pa.field(ROW, pa.int64(), nullable=False))
    if job.true_column:
        fields.append(pa.field(job.true_column, pa.bool_(), nullable=False, metadata={TRUE_KEY: b"1"}))
    metadata = {k: v for k, v in (schema.metadata or {}).items() if k not in (b"huggingface", SPACE_KEY)}
    metadata |= {VECTOR_KEY: job.vector.encode(), JOB_KEY: job.fingerprint.encode()}
    return with_space(pa.schema(fields, metadata=metadata), job.new_space)


class RowMapper:
    """Maps one batch: vectors out, bad rows aside, h, the new column in. Used by the pipeline and by whoever needs
    the same rows without writing them."""

    def __init__(self, job: Job, schema: pa.Schema, h: Transformation, *, threads: int | None, device: str) -> None:
        self.job, self.h, self.threads, self.device = job, h, threads, device
        self.schema = output_schema(job, schema)
        self._memory = Recycler()

    def __call__(
        self, batch: pa.RecordBatch, side: pa.RecordBatch | None, first: int, digest: InputDigest | None = None
    ) -> tuple[pa.RecordBatch, list[JsonDict]]:
        """(mapped rows, rejects). first: the number of the batch's first row in the gallery."""
        job, n = self.job, batch.num_rows
        arrays, bad = self._read(batch, side, digest)
        if digest is not None:
            digest.rest(self._rest(batch))
        keep = _others(n, bad)
        if keep is not None:
            arrays = [(values[keep if rows is None else keep[rows]], None) for values, rows in arrays]
        out = self._memory.empty((len(arrays[0][0]), job.new_space.dim), job.dtype)
        with np.errstate(over="ignore"):
            self._map(arrays[0][0], arrays[1][0] if len(arrays) > 1 else None, out)
        wild = nonfinite_rows(rows_of(out, "output", finite=False))
        if wild.any():
            where = np.arange(n) if keep is None else np.flatnonzero(keep)
            bad |= dict.fromkeys(where[wild].tolist(), f"h's output is not finite in {job.dtype}")
            keep, out = _others(n, bad), out[~wild]
        ids = batch.column(job.id_column) if job.id_column else None
        rejects = [
            {"id": _plain(ids[row]) if ids is not None else first + row, "row": first + row, "reason": why}
            for row, why in sorted(bad.items())
        ]
        return self._written(batch, out, keep, first), rejects

    def _read(
        self, batch: pa.RecordBatch, side: pa.RecordBatch | None, digest: InputDigest | None
    ) -> tuple[list[tuple[Array, Array | None]], dict[int, str]]:
        """(values and the rows that they are of, for the vectors and for side-information; what cannot be mapped, with
        the reason). What is read goes into the digest."""
        job = self.job
        old, other = self._blocks(batch, side)
        blocks = [(old, job.vector)] + ([(other, "side-information")] if other else [])
        bad: dict[int, str] = {}
        for block, name in blocks:
            for row, why in block.bad.items():
                bad.setdefault(row, f"{name}: {why}")
        arrays = []
        for i, (block, name) in enumerate(blocks):
            values, rows = block.values, block.rows
            stream = None if digest is None else digest.block(i, block, batch.num_rows)
            wild = nonfinite_rows(rows_of(values, name, finite=False), stream)
            if i == 0:
                values, odd = decoded(job, block, batch)
                for row, why in odd.items():
                    bad.setdefault(row, f"{name}: {why}")
                if values is not block.values:
                    wild |= nonfinite_rows(rows_of(values, name, finite=False))
            for row in np.flatnonzero(wild).tolist():
                bad.setdefault(int(row if rows is None else rows[row]), f"{name}: not finite")
            arrays.append((values, rows))
        return arrays, bad

    def _written(self, batch: pa.RecordBatch, out: Array, keep: Array | None, first: int) -> pa.RecordBatch:
        """The rows that were mapped, with every other column as it came."""
        job, columns = self.job, []
        mask = None if keep is None else pa.array(keep)
        for entry in self.schema:
            if entry.name == job.vector:
                columns.append(vector_array(out, job.vector_format))
            elif job.true_column and entry.name == job.true_column:
                columns.append(pa.array(np.zeros(len(out), bool)))
            elif entry.name == ROW and ROW not in batch.schema.names:
                numbers = np.arange(first, first + batch.num_rows, dtype=np.int64)
                columns.append(pa.array(numbers if keep is None else numbers[keep]))
            else:
                column = batch.column(entry.name)
                columns.append(column if mask is None else column.filter(mask))
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def _map(self, old: Array, side: Array | None, out: Array) -> None:
        job = self.job
        transform_finite(
            old, side, self.h, out=out, device=self.device, precision=job.precision, backend=job.backend,
            threads=self.threads,
        )  # fmt: skip

    def _blocks(self, batch: pa.RecordBatch, side: pa.RecordBatch | None) -> tuple[VectorBlock, VectorBlock | None]:
        job = self.job
        old = vector_block(batch.column(job.vector), job.old_space.dim, job.binary_dtype)
        if side is not None:
            return old, vector_block(side.column(job.side_vector), self.h.d_side, job.binary_dtype)
        if job.side_column:
            return old, vector_block(batch.column(job.side_column), self.h.d_side, job.binary_dtype)
        return old, None

    def digest(self, batch: pa.RecordBatch, side: pa.RecordBatch | None, digest: InputDigest) -> None:
        """Adds what was read to a checksum: the vectors and every other column."""
        for i, block in enumerate(b for b in self._blocks(batch, side) if b is not None):
            stream = digest.block(i, block, batch.num_rows)
            if block.values.size:
                values = np.ascontiguousarray(block.values)
                stream.update(int(values.ctypes.data), values.nbytes)
        digest.rest(self._rest(batch))

    def _rest(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return batch.drop_columns([n for n in (self.job.vector, self.job.side_column) if n])


def _plain(scalar: pa.Scalar) -> object:
    """An id as it stands in rejects/: Arrow holds dates and time zones that Python has no objects for."""
    try:
        value = scalar.as_py()
    except (ValueError, OverflowError, pa.ArrowException, KeyError, UnicodeDecodeError):
        return f"{getattr(scalar, 'value', scalar.type)} ({scalar.type})"
    plain = isinstance(value, (str, int, bool, type(None))) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else str(value)  # JSON has no NaN


def _others(n: int, bad: dict[int, str]) -> Array | None:
    """Which of n rows are not bad, as a mask; None where all are good."""
    if not bad:
        return None
    keep = np.ones(n, dtype=bool)
    keep[list(bad)] = False
    return keep
