"""One backfill through many days: killed, gone on with other settings, files added, files and markers damaged or lost,
in any order. In the end every row is there once, with what it came with, and ``verify`` proves it."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import fct
from fct.backfilling.journal import Journal
from fct.backfilling.run import backfill
from fct.errors import BackfillError
from tests.generated.budget import seconds, seed
from tests.generated.galleries import Drawn, append_file, plain_rows, rows_of, write_gallery
from tests.generated.machine import Killed, expected, require_rows, transformation

_DRAWN = Drawn(payload=("text", "nested", "time"), spelling="list", rows=48, bad=(3, 30), null=(7, 41))


class Life(RuleBasedStateMachine):
    """What is in the folder is known all the time: ``there`` holds the rows of the source."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="fct-life-"))
        self.all = rows_of(_DRAWN)
        self.there = self.all[:24]
        self.h = transformation(False)
        (self.folder / "old").mkdir()
        self.ran = False

    @initialize()
    def begin(self) -> None:
        write_gallery(_DRAWN, self.there, self.folder / "old")

    def run(self, **options: Any) -> Any:
        kept: dict[str, Any] = {"old_model": "random-old", "vector_column": "old", "precision": "fp32", "threads": 1}
        self.ran = True
        return backfill(
            str(self.folder / "old"), str(self.folder / "new"), self.h, shard_rows=3, progress=False, **kept | options
        )

    def files(self, pattern: str) -> list[Path]:
        return sorted((self.folder / "new").glob(pattern))

    @rule(after=st.integers(0, 9), rows=st.sampled_from([1, 2, 64]))
    def is_killed(self, after: int, rows: int) -> None:
        mark, count = Journal.mark, itertools.count()

        def dies(journal: Journal, marker: Any) -> None:
            if next(count) == after:
                raise Killed
            mark(journal, marker)

        with mock.patch.object(Journal, "mark", dies), contextlib.suppress(Killed):
            self.run(batch_rows=rows, follow=True)

    @rule()
    def runs_on_without_following(self) -> None:
        """It ends, or says which file is new."""
        said = ""
        try:
            self.run(batch_rows=4)
        except BackfillError as error:
            said = str(error)
        assert not said or "99" in said, said

    @rule(rows=st.integers(1, 8))
    def gets_a_file(self, rows: int) -> None:
        count = len(self.there)
        more = self.all[count : count + rows]
        if more and not (self.folder / "old/part-99.parquet").exists():
            append_file(_DRAWN, more, self.folder / "old")
            self.there = self.all[: count + len(more)]

    @rule(
        which=st.integers(0, 99),
        at=st.integers(0, 10**6),
        what=st.sampled_from(["*.parquet", "_fct/done/*", "_fct/rejects/*"]),
    )
    def loses_a_bit(self, which: int, at: int, what: str) -> None:
        if files := self.files(what):
            file = files[which % len(files)]
            raw = bytearray(file.read_bytes())
            raw[at % len(raw)] ^= 1 << at % 8
            file.write_bytes(raw)

    @rule(
        which=st.integers(0, 99),
        what=st.sampled_from(["*.parquet", "_fct/done/*", "_fct/rejects/*", "_fct/manifest.json"]),
    )
    def loses_a_file(self, which: int, what: str) -> None:
        if files := self.files(what):
            files[which % len(files)].unlink()

    @rule(which=st.integers(0, 99))
    def has_a_marker_of_another_shard(self, which: int) -> None:
        if len(files := self.files("_fct/done/*")) > 1:
            shutil.copy(files[which % len(files)], files[(which + 1) % len(files)])

    @invariant()
    def ok_is_never_said_of_other_rows(self) -> None:
        if self.files("_fct/manifest.json") and self.files("_fct/job.json"):
            report = fct.verify_gallery(self.folder / "new", source=str(self.folder / "old"), spot_check=4)
            if report.ok:
                self.is_right()

    def is_right(self) -> None:
        found = [row for file in self.files("*.parquet") for row in plain_rows(pq.read_table(file))]
        require_rows(
            found, np.array([r["old"] for r in found]), expected(self.there), self.h, ["id", "note", "nested", "when"]
        )

    def teardown(self) -> None:
        try:
            self.run(batch_rows=64, follow=True)
            assert fct.verify_gallery(self.folder / "new", source=str(self.folder / "old")).proven
            self.is_right()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


@pytest.mark.slow
def test_every_row_is_there_once_whatever_happened() -> None:
    end, start = time.monotonic() + seconds(10.0), seed()
    for number in itertools.count(start):
        settings = hypothesis.settings(
            max_examples=4, stateful_step_count=8, deadline=None, database=None, derandomize=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        print(f"seed {number}", flush=True)
        run_state_machine_as_test(hypothesis.seed(number)(type("Life", (Life,), {})), settings=settings)
        if time.monotonic() > end:
            break


def test_a_fault_of_the_journal_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are believed without a look."""
    monkeypatch.setattr(Journal, "_output_trouble", lambda *_: None)
    settings = hypothesis.settings(
        max_examples=30, stateful_step_count=6, deadline=None, database=None, derandomize=True, print_blob=False,
        phases=[hypothesis.Phase.generate], report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    with pytest.raises(Exception):  # noqa: B017 (a lost file, rows of a damaged one, or a sum that is none)
        run_state_machine_as_test(type("Life", (Life,), {}), settings=settings)
