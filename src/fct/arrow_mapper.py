"""h as one callable over Arrow batches, for engines that already run: Spark, Ray Data, daft, Dask, pandas."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fct.artifact.transformation import Transformation
from fct.checks import check_choice, check_text, check_whole
from fct.gallery.vectors import VECTOR_FORMATS, vector_array, vector_block, vector_type
from fct.ops.backend import check_precision
from fct.options.code_options import code_number
from fct.rows import nonfinite_rows, rows_of
from fct.transform import transform_finite
from fct.types import CodeNumber, Floats, JsonDict

__all__ = ["ArrowMapper"]

_KEPT = 4  # transformations whose packed weights a process keeps
_TAKEN = "a pyarrow RecordBatch, a Table or an iterable of RecordBatches"
_ROWS = 1024  # rows that are enough for one call of h
_here: OrderedDict[str, Transformation] = OrderedDict()


def _one_here(h: Transformation, fingerprint: str) -> Transformation:
    """This process's own copy of h, so that each task that brings h along finds its weights packed."""
    kept = _here.setdefault(fingerprint, h)
    _here.move_to_end(fingerprint)
    while len(_here) > _KEPT:
        _here.popitem(last=False)
    return kept


class ArrowMapper:
    """Maps the vectors of Arrow batches by h; :meth:`fct.Transformation.arrow_mapper` makes it and has the arguments.

    Picklable: what is sent is h and the options, and each process packs h's weights once. Called with a RecordBatch, a
    Table or an iterable of RecordBatches it gives the same with the column ``out`` beside the others. bad: how many
    rows were set to null in this process, by reason.
    """

    def __init__(
        self,
        h: Transformation,
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
    ) -> None:
        self.vector, self.out = check_text(vector, "vector", "a column"), check_text(out, "out", "a column")
        self.side, self.why = (
            None if name is None else check_text(name, what, "the name of a column or None")
            for name, what in ((side, "side"), (why, "why"))
        )
        if h.uses_side_info and side is None:
            raise ValueError(
                f"side: expected the column of the side-information ({h.d_side}-d, {h.side_model!r}), which this "
                "transformation was fitted with, got None"
            )
        if side is not None and not h.uses_side_info:
            raise ValueError("side: expected None, since this transformation was fitted without, got a column")
        self.on_bad = check_choice(on_bad, "on_bad", ("null", "raise"))
        self.vector_format = check_choice(vector_format, "vector_format", ("auto", *VECTOR_FORMATS))
        self.dtype = check_choice(dtype, "dtype", ("float32", "float16"))
        self.binary_dtype = check_choice(binary_dtype, "binary_dtype", ("float32", "float16"))
        self.scale, self.offset = (
            _of_codes(value, name, h.d_old) for name, value in (("scale", scale), ("offset", offset))
        )
        self.precision, self.backend = check_precision(precision), backend
        self.threads = check_whole(threads, "threads", 1)
        self.fingerprint = h.fingerprint
        self.bad: Counter[str] = Counter()
        self.h = _one_here(h, self.fingerprint)

    def __getstate__(self) -> JsonDict:
        return self.__dict__ | {"bad": Counter()}

    def __setstate__(self, state: JsonDict) -> None:
        self.__dict__.update(state)
        self.h = _one_here(self.h, self.fingerprint)

    def __call__(self, rows: pa.Table | pa.RecordBatch) -> pa.Table | pa.RecordBatch:
        """The rows with ``out``. Raises ValueError for a column that is not there or cannot hold h's vectors."""
        if isinstance(rows, pa.RecordBatch):
            return self._batch(rows)
        if isinstance(rows, pa.Table):
            mapped = [self._batch(batch) for batch in _joined(rows).to_batches()]
            return pa.Table.from_batches(mapped or [self._batch(_no_rows(rows.schema))])
        if not isinstance(rows, Iterable) or isinstance(rows, (str, bytes)):
            raise TypeError(f"rows: expected {_TAKEN}, got {type(rows).__name__}")
        return self._each(rows)

    def _each(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if not isinstance(batch, pa.RecordBatch):
                raise TypeError(f"rows: expected {_TAKEN}, got an iterable of {type(batch).__name__}")
            yield self._batch(batch)

    def column(self, vector: pa.Array | pa.ChunkedArray, side: pa.Array | pa.ChunkedArray | None = None) -> pa.Array:
        """The mapped vectors alone, where an engine hands over columns. vector, side: Arrow arrays of one length."""
        arrays = [x.combine_chunks() if isinstance(x, pa.ChunkedArray) else x for x in (vector, side) if x is not None]
        names = [self.vector, *([self.side] if self.side is not None else [])]
        if len(arrays) != len(names):
            raise ValueError(f"side: expected {'an array' if self.side else 'None'}, as this mapper was made for")
        return self._batch(pa.RecordBatch.from_arrays(arrays, names)).column(self.out)

    def _batch(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        for name, what in ((self.vector, "vector"), (self.side, "side")):
            if name is not None and name not in batch.schema.names:
                raise ValueError(f"{what}: expected a column ({', '.join(batch.schema.names)}), got {name!r}")
        for name, what in ((self.out, "out"), (self.why, "why")):
            if name is not None and name in batch.schema.names and name != self.vector:
                raise ValueError(f"{what}: expected the name of a new column, {name!r} is there already")
        values, bad = self._mapped(batch)
        if bad and self.on_bad == "raise":
            first = min(bad)
            raise ValueError(
                f"{self.vector}: expected vectors that can be mapped, {len(bad)} of {batch.num_rows} rows cannot; "
                f"row {first}: {bad[first]}"
            )
        self.bad.update(bad.values())
        known = vector_type(batch.schema.field(self.vector).type)
        column = vector_array(values, known if self.vector_format == "auto" and known else self.vector_format)
        if pa.types.is_fixed_size_binary(column.type):
            column = column.cast(pa.binary())
        if bad:
            good = np.ones(batch.num_rows, bool)
            good[list(bad)] = False
            column = pc.if_else(pa.array(good), column, pa.scalar(None, column.type))
        at = batch.schema.names.index(self.out) if self.out in batch.schema.names else None
        batch = batch.append_column(self.out, column) if at is None else batch.set_column(at, self.out, column)
        if self.why is not None:
            reasons = pa.array([bad.get(i) for i in range(batch.num_rows)], pa.string())
            batch = batch.append_column(self.why, reasons)
        return batch

    def _mapped(self, batch: pa.RecordBatch) -> tuple[Floats, dict[int, str]]:
        """((n, d_new), reason by row): what cannot be mapped is zero there."""
        n, h = batch.num_rows, self.h
        bad: dict[int, str] = {}
        arrays = []
        for name, d in ((self.vector, h.d_old), (self.side, h.d_side)):
            if name is None:
                continue
            block = vector_block(batch.column(name), d, self.binary_dtype)
            values = block.values
            if name == self.vector:
                with np.errstate(over="ignore"):
                    values = values if self.scale is None else values * self.scale
                    values = values if self.offset is None else values + self.offset
            wild = np.flatnonzero(nonfinite_rows(rows_of(values, name, finite=False)))
            where = wild if block.rows is None else block.rows[wild]
            for row, why in (*block.bad.items(), *((row, "not finite") for row in where.tolist())):
                bad.setdefault(row, f"{name}: {why}")
            arrays.append((values, block.rows))
        keep = None
        if bad:
            keep = np.ones(n, bool)
            keep[list(bad)] = False
            arrays = [(values[keep if rows is None else keep[rows]], None) for values, rows in arrays]
        out = np.empty((len(arrays[0][0]), h.d_new), self.dtype)
        with np.errstate(over="ignore"):
            transform_finite(
                arrays[0][0], arrays[1][0] if len(arrays) > 1 else None, h, out=out, device="cpu",
                precision=self.precision, backend=self.backend, threads=self.threads,
            )  # fmt: skip
        outside = nonfinite_rows(rows_of(out, "output", finite=False))
        if not outside.any() and keep is None:
            return out, bad
        mapped = np.arange(n) if keep is None else np.flatnonzero(keep)
        bad |= dict.fromkeys(mapped[outside].tolist(), f"h's output is not finite in {self.dtype}")
        whole = np.zeros((n, h.d_new), self.dtype)
        whole[mapped[~outside]] = out[~outside]
        return whole, bad


def _of_codes(value: CodeNumber, name: str, d: int) -> Floats | None:
    """A scale or an offset as float32, (1,) or (d,); None where it changes nothing."""
    given = code_number(positive=name == "scale")(value, name)
    if isinstance(given, str):
        raise ValueError(f"{name}: expected a number or {d} of them, one for each dimension, got {given!r}")
    numbers = np.atleast_1d(np.asarray(given, np.float32))
    if len(numbers) not in (1, d):
        raise ValueError(f"{name}: expected a number or {d} of them, one for each dimension, got {len(numbers)}")
    return None if (numbers == (1.0 if name == "scale" else 0.0)).all() else numbers


def _joined(rows: pa.Table) -> pa.Table:
    """The table in one piece where it lies in many: engines hand over what several files' pages left, and h takes a few
    rows at a time several times as long as many. That costs a copy of what is handed over."""
    pieces = max((column.num_chunks for column in rows.columns), default=0)
    return rows.combine_chunks() if pieces > 1 and rows.num_rows < pieces * _ROWS else rows


def _no_rows(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], type=f.type) for f in schema], schema=schema)
