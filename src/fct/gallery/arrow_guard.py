"""Arrow data from outside is validated before anything reads its offsets or buffers: pyarrow believes what it maps.

A library that decodes (Parquet's reader, numpy's) makes the offsets itself. IPC files, streams of other libraries and
whatever comes over Arrow's C interface bring theirs along.
"""

from __future__ import annotations

import pyarrow as pa

from fct.errors import FctError

__all__ = ["validated"]


def validated(batch: pa.RecordBatch, what: str) -> pa.RecordBatch:
    """The batch, if every offset, size, index and string in it is what its type says.

    Raises:
        FctError: it is not; names ``what``.
    """
    try:
        batch.validate(full=True)
    except (pa.ArrowException, ValueError) as error:
        raise FctError(f"source: {what} is damaged: {error}") from error
    return batch
