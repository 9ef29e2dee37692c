"""transform_batch: h over rows, by the fastest backend that is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from fct.artifact.transformation import Transformation
from fct.ops.backend import check_precision
from fct.ops.device.state import numbered
from fct.ops.processors import threads_of
from fct.ops.registry import pick_transform
from fct.ops.transform.repeated import remember_call, repeat_call
from fct.ops.weights import packed
from fct.progress import LongCall, Report
from fct.rows import Rows, empty_like_kind, nonfinite_rows, rows_of
from fct.types import Array, RowsLike, Values

if TYPE_CHECKING:
    import torch


__all__ = ["check_inputs", "transform_batch", "transform_finite"]


_NO_OFFSET = ("cuda", "triton")  # backends that read scaled int8 without an offset: codes become float32 first


def check_inputs(
    old: RowsLike, side_info: RowsLike | None, transformation: Transformation, *, finite: bool = True
) -> tuple[Rows, Rows]:
    """The two inputs as checked rows; the old embedding stands in where h was fitted without side-information.

    finite: look for NaN and infinity too.
    """
    if not isinstance(transformation, Transformation):
        raise TypeError(f"transformation: expected an fct.Transformation, got {type(transformation).__name__}")
    h = transformation
    why = "to match the transformation"
    old_rows = rows_of(old, "old", d=h.d_old, d_why=why, finite=finite, codes=True)
    if side_info is None:
        if h.uses_side_info:
            raise ValueError(
                f"side_info: expected ({old_rows.n}, {h.d_side}) of {h.side_model!r}, which this transformation was "
                "fitted with, got None"
            )
        return old_rows, old_rows
    if not h.uses_side_info:
        raise ValueError("side_info: expected None, since this transformation was fitted without, got an array")
    side_rows = rows_of(
        side_info, "side_info", d=h.d_side, d_why=why, n=old_rows.n, n_why="to match old", finite=finite, codes=True
    )
    if side_rows.device != old_rows.device:
        raise ValueError(f"side_info: expected an array on {old_rows.device} like old, got one on {side_rows.device}")
    return old_rows, side_rows


@overload
def transform_batch(
    old: Array, side_info: RowsLike | None, transformation: Transformation, *, out: None = ...,
    precision: str = ..., device: str | None = ..., backend: str | None = ..., threads: int | None = ...,
    progress: bool = ...,
) -> Array: ...  # fmt: skip


@overload
def transform_batch(
    old: torch.Tensor, side_info: RowsLike | None, transformation: Transformation, *, out: None = ...,
    precision: str = ..., device: str | None = ..., backend: str | None = ..., threads: int | None = ...,
    progress: bool = ...,
) -> torch.Tensor: ...  # fmt: skip


@overload
def transform_batch(
    old: RowsLike, side_info: RowsLike | None, transformation: Transformation, *, out: RowsLike | None = ...,
    precision: str = ..., device: str | None = ..., backend: str | None = ..., threads: int | None = ...,
    progress: bool = ...,
) -> Values: ...  # fmt: skip


def transform_batch(
    old: RowsLike,
    side_info: RowsLike | None,
    transformation: Transformation,
    *,
    out: RowsLike | None = None,
    precision: str = "auto",
    device: str | None = None,
    backend: str | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> Values:
    """Maps stored rows to the new space: ``h(old, side_info)``.

    Args:
        old: (n, d_old) float32, float16, bfloat16 or :class:`fct.ScaledInt8`; numpy, torch or DLPack.
        side_info: (n, d_side), or None for a transformation fitted without side-information.
        transformation: h.
        out: (n, d_new) buffer to fill, of any of the dtypes; by default a new float32 array of old's kind. Values that
            float16 does not hold are an error, with int8 they are cut to the scale's range.
        precision: "fp32", "bf16", "int8", or "auto": the fastest whose measured effect on retrieval, stored in h,
            is inside h's tolerance. On a GPU also "fp16" and "fp8".
        device: where to compute; by default where the rows lie. Rows in host memory are streamed through "cuda".
        backend: force one ("cpu", "torch", "triton", "cuda", "ref"); it runs or raises. Also FCT_BACKEND.
        threads: CPU threads; by default FCT_NUM_THREADS, or the processors that the process may use.
        progress: show a bar on stderr, where that is a terminal and the call lasts more than two seconds.

    Returns:
        (n, d_new) of the kind and on the device that came in; ``out`` itself where it was given.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came. BackendError: none can run it, and why.

    Source: Ramanujan et al., "Forward Compatible Training for Large-Scale Embedding Retrieval Systems", CVPR 2022,
    section 3, arXiv:2112.02805.

    Examples:
        >>> import numpy as np, fct
        >>> h = fct.Transformation.random(8, 4, 16, inner=32)
        >>> rows = fct.transform_batch(np.ones((5, 8), np.float32), np.zeros((5, 4), np.float32), h)
        >>> rows.shape, rows.dtype.name
        ((5, 16), 'float32')
    """
    if device is None and backend is None and (progress is True or progress is False):
        done = repeat_call(old, side_info, transformation, out=out, precision=precision, threads=threads)
        if done is not None:
            return done
    with LongCall(progress) as call:
        inputs = check_inputs(old, side_info, transformation)
        report = call.stage("transforming")
        result, rows = _transform(inputs, transformation, out, precision, device, backend, threads, report)
    _check_range(rows)
    return result


def transform_finite(
    old: RowsLike, side_info: RowsLike | None, transformation: Transformation, *, out: RowsLike | None, precision: str,
    device: str, backend: str | None, threads: int | None,
) -> None:  # fmt: skip
    """:func:`transform_batch` for rows that are known to be finite: one pass less over them, and none over ``out``,
    where values beyond its dtype are infinite and the caller's to set aside."""
    rows = check_inputs(old, side_info, transformation, finite=False)
    _transform(rows, transformation, out, precision, device, backend, threads)


def _transform(
    inputs: tuple[Rows, Rows], transformation: Transformation, out: RowsLike | None, precision: str, device: str | None,
    backend: str | None, threads: int | None, report: Report | None = None,
) -> tuple[Values, Rows]:  # fmt: skip
    """(what the caller gets, the same as Rows)."""
    old_rows, side_rows = inputs
    if device is not None and not isinstance(device, str):
        raise ValueError(f"device: expected a name like 'cuda:0' or None, got {device!r}")
    count = threads_of(threads)
    target = device or old_rows.device
    check_precision(precision, gpu=target != "cpu")
    streamed = old_rows.device == "cpu" and target.partition(":")[0] == "cuda"
    if target != old_rows.device and not streamed:
        raise ValueError(f"device: expected {old_rows.device}, where the rows lie, or cuda, got {target}")
    target = numbered(target)
    if out is None:
        result, out_rows = empty_like_kind(old_rows, (old_rows.n, transformation.d_new), "float32")
    else:
        result, out_rows = out, _check_out(out, old_rows, side_rows, transformation.d_new)
    chosen, chosen_precision = pick_transform(transformation, precision, target, backend, rows=old_rows.n)
    if chosen.name in _NO_OFFSET:
        if out_rows.offset is not None:
            raise ValueError(f"out: expected a scale without an offset on {chosen.name}, got one with an offset")
        old_rows, side_rows = old_rows.without_offset(), side_rows.without_offset()
    if old_rows.n:
        weights = packed(chosen, transformation, chosen_precision, target)
        if streamed:
            from fct.ops.device.streaming import stream_transform

            stream_transform(
                lambda o, s, to: chosen.run(weights, o, s, to, threads=count),
                old_rows,
                side_rows,
                out_rows,
                device=target,
                on_done=None if report is None else lambda part: report(part.stop / out_rows.n),
            )
        else:
            chosen.run(weights, old_rows, side_rows, out_rows, threads=count, report=report)
            if chosen.name == "cpu" and backend is None and old_rows.kind == "numpy":
                remember_call(
                    transformation, precision=precision, threads=threads, chosen=chosen_precision, count=count
                )
    return result, out_rows


def _check_range(out: Rows) -> None:
    """Raises ValueError where h's values do not fit float16, whose largest is 65,504."""
    if out.dtype != "float16" or not out.n:
        return
    if out.kind_is_numpy:
        wild = nonfinite_rows(out)
        count, first = int(wild.sum()), int(wild.argmax())
    else:
        lost = ~out.values.isfinite().all(dim=1)
        count, first = int(lost.sum()), int(lost.int().argmax())
    if count:
        raise ValueError(
            f"out: expected values that float16 holds (up to 65,504), got larger ones in {count} of {out.n} rows, the "
            f"first in row {first}; use a float32 or bfloat16 out"
        )


def _check_out(out: RowsLike, old: Rows, side: Rows, d_new: int) -> Rows:
    rows = rows_of(
        out,
        "out",
        d=d_new,
        d_why="to match the transformation",
        n=old.n,
        n_why="to match old",
        finite=False,
        write=True,
    )
    if rows.device != old.device:
        raise ValueError(f"out: expected an array on {old.device} like old, got one on {rows.device}")
    for name, other in (("old", old), ("side_info", side)):
        if rows.overlaps(other):
            raise ValueError(f"out: expected memory of its own, got an array that shares some with {name}")
    return rows
