"""Re-embedded rows of a gallery against what they were made of: the pairs, or the vectors that the journal keeps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fct.backfilling.job import Job
from fct.backfilling.journal import Journal, shard_marker
from fct.backfilling.row_choice import RowChoice, kept_choice
from fct.backfilling.true_source import TruePairs, row_ids
from fct.backfilling.true_vectors import TrueVectors
from fct.gallery.interfaces import Shard
from fct.types import Array

__all__ = ["TrueCheck"]

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]


class TrueCheck:
    """Checks the true rows among those that a spot check looks at.

    checked, unchecked: true rows that were compared, and those of which there is nothing to compare with.
    problems: each in a sentence.
    """

    def __init__(self, journal: Journal, job: Job, pairs: TruePairs | None) -> None:
        self.journal, self.job, self.pairs = journal, job, pairs
        self.choice: RowChoice = kept_choice(journal, job)
        self.kept = TrueVectors(journal, job.new_space)
        self.checked = self.unchecked = 0
        self.problems: list[str] = []
        self._beside: tuple[int, Mask | None] = (-1, None)

    def flags(self, stored: pa.RecordBatch, shard: Shard, at: int, rows: Rows) -> Mask:
        """(n,) which of the rows were re-embedded.

        Args:
            stored: the rows as they are in the new gallery. at: the first of them among the rows that the shard wrote.
            rows: (n,) their numbers in the old gallery.
        """
        low = int(rows[0])
        chosen = self.choice.mask(low, int(rows[-1]) - low + 1)[rows - low]
        if self.job.true_column in stored.schema.names:
            said = np.asarray(stored.column(self.job.true_column).to_numpy(zero_copy_only=False), bool)
        else:
            beside = self._of_shard(shard)
            said = chosen if beside is None else beside[at : at + len(rows)]
        if len(said) != len(rows) or (said & ~chosen).any():
            row = int(rows[(said & ~chosen).argmax()]) if len(said) == len(rows) else int(rows[0])
            self.problems.append(
                f"shard {shard.number}: row {row} of the source is called re-embedded, and was not chosen"
            )
            return np.zeros(len(rows), bool)
        return said

    def _of_shard(self, shard: Shard) -> Mask | None:
        """The column of a shard whose file holds vectors alone; None where it is nowhere."""
        if self._beside[0] != shard.number:
            found = None
            for output in shard_marker(self.journal, shard.number).outputs:
                if output.name.startswith("_rows/"):
                    with self.journal.location(output).open() as file:
                        column = pq.read_table(file, columns=[self.job.true_column]).column(0)
                    found = np.asarray(column.to_numpy(), bool)
            self._beside = (shard.number, found)
        return self._beside[1]

    def compare(
        self, got: npt.NDArray[np.float64], rows: Rows, batch: pa.RecordBatch, first: int, shard: Shard
    ) -> None:
        """Compares true rows with their vectors, which are stored as they came.

        Args:
            got: (n, d) as stored. rows: (n,) their numbers in the old gallery. batch, first: rows of the source, the
            first of them number ``first``, these among them.
        """
        want, there = self._wanted(rows, batch, first, shard)
        self.checked, self.unchecked = self.checked + int(there.sum()), self.unchecked + int((~there).sum())
        stored = want.astype(self.job.dtype).astype(np.float64)
        wrong = there & (stored != got).any(axis=1)
        if wrong.any():
            self.problems.append(
                f"shard {shard.number}: row {rows[int(wrong.argmax())]} of the source is not the vector that it was "
                f"re-embedded with ({int(wrong.sum())} of {int(there.sum())} rows looked at)"
            )

    def _wanted(self, rows: Rows, batch: pa.RecordBatch, first: int, shard: Shard) -> tuple[Array, Mask]:
        want, there = np.zeros((len(rows), self.job.new_space.dim), np.float32), np.zeros(len(rows), bool)
        if self.pairs is not None:
            taken = batch.take(pa.array(rows - first))
            ids = row_ids(taken, self.job.id_column, 0) if self.job.id_column else rows.tolist()
            places = self.pairs.places(ids)
            there = places >= 0
            want[there] = self.pairs.vectors[places[there]]
        left = np.flatnonzero(~there)
        if len(left):
            inside = rows[left] - shard.first + shard.start
            have, vectors = self.kept.load(
                self.job.pieces[shard.piece], int(inside[0]), int(inside[-1] - inside[0]) + 1
            )
            kept = np.isin(inside, have)
            want[left[kept]] = vectors[np.searchsorted(have, inside[kept])]
            there[left[kept]] = True
        return want, there
