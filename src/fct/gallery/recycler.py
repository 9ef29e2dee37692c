"""Memory for batches, used again once nobody refers to it.

A batch of tens of megabytes lives for a fraction of a second, longer than an allocator holds on to freed pages. Each
one would get fresh pages, and having the system zero those costs more than copying the rows into them.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import numpy as np

from fct.types import Array

if TYPE_CHECKING:
    import numpy.typing as npt


__all__ = ["Recycler"]

_ALIGN = 64  # bytes; what Arrow aligns to


class Recycler:
    """Hands out arrays; the memory of one comes back when the last array, slice, view or Arrow buffer on it is gone.

    keep: most blocks that wait for their next use. Several threads may share one; a pickled one comes back empty.
    """

    def __init__(self, keep: int = 4) -> None:
        self._keep, self._free = keep, list[Array]()

    def __reduce__(self) -> tuple[object, ...]:
        return Recycler, (self._keep,)

    def empty(self, shape: tuple[int, int], dtype: npt.DTypeLike) -> Array:
        """As ``np.empty``: what is in it is arbitrary."""
        dtype = np.dtype(dtype)
        count = shape[0] * shape[1] * dtype.itemsize
        if not count:
            return np.empty(shape, dtype)
        block = self._take(count + _ALIGN)
        start = -block.ctypes.data % _ALIGN
        lease = block[start : start + count]
        weakref.finalize(lease, self._give, block).atexit = False
        # A memoryview between: NumPy makes the base of a view the oldest array behind it, but never looks through
        # another object. So every view of the result, and every view of those, keeps the lease alive.
        return np.frombuffer(lease.data, dtype).reshape(shape)

    def _take(self, size: int) -> Array:
        # One step each: another thread, or a finalizer in this one, may come between any two.
        try:
            while not size <= (block := self._free.pop()).nbytes < 2 * size:
                pass
        except IndexError:
            return np.empty(size, np.uint8)
        return block

    def _give(self, block: Array) -> None:
        if len(self._free) < self._keep:
            self._free.append(block)
