"""Which rows of a gallery get true vectors: a choice made once, before the first shard, and kept in the journal as
bits."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fct.atomic_files import checksum_bytes
from fct.backfilling.job import Job
from fct.backfilling.journal import Journal, system_errors

__all__ = ["RowChoice", "keep_choice", "kept_choice"]

Mask = npt.NDArray[np.bool_]
FOLDER = "chosen"
_NAME = re.compile(r"([0-9]{18})-([0-9]{18})-([0-9a-f]{16})-([0-9a-f]{16})\.bits")


class RowChoice:
    """One bit for each row of a job, in stretches as they were chosen."""

    def __init__(self, stretches: Sequence[tuple[int, int, npt.NDArray[np.uint8]]]) -> None:
        self.stretches = sorted(stretches, key=lambda stretch: stretch[0])

    @property
    def covered(self) -> int:
        """Rows from the first on that were chosen from."""
        return sum(rows for _, rows, _ in self.stretches)

    def mask(self, first: int, rows: int) -> Mask:
        """(rows,) whether each of the rows from ``first`` on was chosen."""
        out = np.zeros(rows, bool)
        for start, count, bits in self.stretches:
            low, high = max(first, start), min(first + rows, start + count)
            if low < high:
                a, b = low - start, high - start
                some = np.unpackbits(bits[a // 8 : -(-b // 8)])[a % 8 : a % 8 + b - a]
                out[low - first : high - first] = some.astype(bool)
        return out

    def count(self, first: int = 0) -> int:
        """Rows chosen, from a stretch that begins at ``first`` on."""
        return sum(int(np.unpackbits(bits, count=rows).sum()) for start, rows, bits in self.stretches if start >= first)


def kept_choice(journal: Journal, job: Job) -> RowChoice:
    """The choice that the journal keeps for this job, as far as it is whole."""
    files, found, at = journal.sizes(FOLDER), [], 0
    for name in sorted(files):
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) != at or match[3] != _key(job, at, int(match[2])):
            continue
        rows = int(match[2])
        if files[name] != -(-rows // 8) or at + rows > job.rows:
            continue
        data = journal.read(f"{FOLDER}/{name}", files[name], files[name])
        if checksum_bytes(data) == match[4]:
            found.append((at, rows, np.frombuffer(data, np.uint8)))
            at += rows
    return RowChoice(found)


def keep_choice(journal: Journal, job: Job, before: RowChoice, chosen: Mask) -> RowChoice:
    """Writes down what was chosen of the rows behind those that ``before`` covers; the whole choice."""
    first, bits = before.covered, np.packbits(chosen)
    name = f"{first:018d}-{len(chosen):018d}-{_key(job, first, len(chosen))}-{checksum_bytes(bits.tobytes())}.bits"
    place = journal.inside(f"{FOLDER}/{name}")
    with system_errors("the choice of rows could not be written down", place):
        place.write_bytes(bits.tobytes())
    return RowChoice([*before.stretches, (first, len(chosen), bits)])


def _key(job: Job, first: int, rows: int) -> str:
    """Of what a choice is about: its rule, and the files of the old gallery that its rows are in."""
    pieces, at = [], 0
    for piece in job.pieces:
        if at < first + rows and at + piece.rows > first:
            pieces.append([piece.name, piece.rows, piece.bytes])
        at += piece.rows
    return checksum_bytes(json.dumps([job.reembed, pieces]).encode())
