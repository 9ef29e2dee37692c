"""Training pairs, from memory or from mapped files: shuffled batches that are the same for the same seed."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from fct.rows import Rows, rows_of
from fct.types import Float32s, Int64s, RowsLike

__all__ = ["Pairs", "check_pairs", "fold_pairs", "split_pairs"]

# Pairs that take more float32 bytes than this stay where they are (a mapped file, float16 rows) and are read in
# runs of neighbouring rows; smaller sets are brought to memory once.
IN_MEMORY_BYTES = 4 << 30
_RUN = 256  # neighbouring rows read together from a mapped file
_POOL_ROWS = 1 << 17  # rows shuffled together when the set stays outside memory


Taken: TypeAlias = "tuple[Float32s, Float32s | None, Float32s]"  # (old, side, new)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rows of (old, side, new) that belong together. ``side`` is None where the old embedding takes its place.

    index: which rows of the arrays this set holds, ascending.
    """

    old: Rows
    side: Rows | None
    new: Rows
    index: Int64s

    def __len__(self) -> int:
        return len(self.index)

    @property
    def dims(self) -> tuple[int, int, int]:
        return self.old.d, (self.side or self.old).d, self.new.d

    @property
    def fits_in_memory(self) -> bool:
        width = self.old.d + (self.side.d if self.side else 0) + self.new.d
        return len(self) * width * 4 <= IN_MEMORY_BYTES

    @property
    def mapped(self) -> bool:
        """Whether some rows lie in a mapped file."""
        return any(_is_mapped(rows.values) for rows in (self.old, self.side, self.new) if rows is not None)

    def take(self, positions: slice | Int64s) -> Taken:
        """(old, side, new) float32 rows at positions of this set; side is None where there is none."""
        where = self.index[positions]
        return tuple(None if rows is None else _gather(rows, where) for rows in (self.old, self.side, self.new))  # type: ignore[return-value]

    def loaded(self) -> Taken:
        return self.take(slice(None))

    def part(self, positions: slice | Int64s) -> Pairs:
        """The pairs at positions of this set, in ascending order."""
        return Pairs(self.old, self.side, self.new, np.sort(self.index[positions]))

    def sample(self, most: int, seed: int) -> Pairs:
        """At most ``most`` of these pairs, chosen by seed."""
        if len(self) <= most:
            return self
        return self.part(np.random.default_rng([seed, 7]).choice(len(self), most, replace=False))

    def order(self, seed: int, epoch: int) -> Iterator[Int64s]:
        """Positions of one epoch, in pools of rows to be read together; the same for the same seed and epoch."""
        rng = np.random.default_rng([seed, epoch])
        if self.fits_in_memory:
            yield rng.permutation(len(self))
            return
        starts = rng.permutation(np.arange(0, len(self), _RUN))
        for begin in range(0, len(starts), _POOL_ROWS // _RUN):
            runs = [np.arange(s, min(s + _RUN, len(self))) for s in np.sort(starts[begin : begin + _POOL_ROWS // _RUN])]
            yield rng.permutation(np.concatenate(runs))


def _is_mapped(values: object) -> bool:
    while isinstance(values, (np.ndarray, memoryview)):
        values = values.obj if isinstance(values, memoryview) else values.base
    return isinstance(values, mmap.mmap)


def _gather(rows: Rows, index: slice | Int64s) -> Float32s:
    scale = rows.scale
    if scale is not None and scale.shape[0] == rows.n and rows.n != 1:
        scale = scale[index]
    values = rows.values[index]
    return np.ascontiguousarray(Rows(values, rows.dtype, scale, rows.device, rows.kind).float32())


def check_pairs(old: RowsLike, side_info: RowsLike | None, new: RowsLike, *, prefix: str = "") -> Pairs:
    """Three arrays as one set of pairs; everything is checked, row counts first. GPU tensors are brought to the CPU."""
    old_rows = rows_of(_host(old), f"{prefix}old", allow_empty=False)
    why = "to match old"
    side_rows = None if side_info is None else rows_of(_host(side_info), f"{prefix}side_info", n=old_rows.n, n_why=why)
    new_rows = rows_of(_host(new), f"{prefix}new", n=old_rows.n, n_why=why)
    return Pairs(old_rows, side_rows, new_rows, np.arange(old_rows.n))


def _host(x: RowsLike) -> RowsLike:
    kind = getattr(getattr(x, "device", None), "type", "cpu")
    return x.cpu() if hasattr(x, "cpu") and kind not in ("cpu", "meta") else x


def split_pairs(pairs: Pairs, share: float, seed: int) -> tuple[Pairs, Pairs]:
    """(training, validation): a random ``share`` held out, at least one row and at most 20,000."""
    if not 0 < share < 1:
        raise ValueError(f"validation: expected a share between 0 and 1, or (old, side_info, new), got {share!r}")
    if len(pairs) < 3:
        raise ValueError(f"old: expected at least 3 rows to hold some out for validation, got {len(pairs)}")
    held = min(max(1, round(len(pairs) * share)), 20_000, len(pairs) - 2)
    mask = np.zeros(len(pairs), bool)
    mask[np.random.default_rng([seed, 11]).choice(len(pairs), held, replace=False)] = True
    return pairs.part(~mask), pairs.part(mask)


def fold_pairs(pairs: Pairs, folds: int, seed: int) -> list[tuple[Pairs, Pairs]]:
    """(training, held out) for each of ``folds`` random parts, which together hold every pair once."""
    parts = np.array_split(np.random.default_rng([seed, 13]).permutation(len(pairs)), folds)
    return [(pairs.part(np.setdiff1d(np.arange(len(pairs)), held)), pairs.part(held)) for held in parts]
