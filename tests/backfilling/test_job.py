"""Where a job's shards are cut, whose markers count, and what it remembers of a choice of rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fct
from fct.backfilling.job import Job, cut_shards
from fct.backfilling.resolve import resolve
from fct.gallery.interfaces import Piece
from fct.options.groups import PlanOptions


@pytest.mark.parametrize(
    ("groups", "rows"),
    [
        ((4, 4), [8]),  # as many as a shard may have
        ((5, 4, 8), [5, 4, 8]),  # one more would be too many
        ((2, 3, 4, 8, 1), [5, 4, 8, 1]),
        ((20,), [8, 6, 6]),  # larger than two shards: cut inside, the rest in halves
        ((17,), [8, 5, 4]),
        ((16, 1), [8, 8, 1]),
        ((0, 8, 0, 8), [8, 8]),
    ],
)
def test_shards_are_cut_at_row_groups(groups: tuple[int, ...], rows: list[int]) -> None:
    total = sum(groups)
    shards = cut_shards([Piece("a", total, 0, "", groups), Piece("b", 3, 0, "")], 8)
    assert [s.rows for s in shards] == [*rows, 3]
    assert [s.first for s in shards] == [*np.cumsum([0, *rows]).tolist()]
    assert (shards[-1].piece, shards[-1].start) == (1, 0)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "old").mkdir()
    for name in ("a", "b", "c"):
        np.save(tmp_path / f"old/{name}.npy", np.ones((9, 8), np.float32))
    h = fct.Transformation.random(8, 8, 4, inner=8, side_info=False)
    options = PlanOptions.split({"old_model": "random-old", "precision": "fp32"})
    return resolve(tmp_path / "old", tmp_path / "new", h, options).job


def test_a_marker_of_an_earlier_pass_counts_for_the_files_of_that_pass_alone(job: Job) -> None:
    first, second = (replace(job, pieces=job.pieces[:n]).fingerprint for n in (1, 2))
    grown = replace(job, passes=((1, 0), (2, 0)))
    assert len({first, second, grown.fingerprint}) == 3
    allowed = [set(grown.fingerprints(shard)) - {grown.fingerprint} for shard in grown.shards]
    assert allowed == [{first, second}, {second}, set()]


def test_the_column_that_ordered_the_rows_is_remembered(job: Job) -> None:
    for reembed, column in (
        ("", ""),
        ("random, budget 0.1, seed 0, from a function", ""),
        ("visits, budget 0.1, seed 0, from a function", "visits"),
        ("visits, budget 9, budget 0.1, seed 0, from a function", "visits, budget 9"),
    ):
        assert replace(job, reembed=reembed).ordered_by == column
