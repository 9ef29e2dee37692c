"""A backfill begun by version 0.1 goes on today: its fingerprint, its job.json and its markers mean what they meant."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct.backfilling.job import Job, since
from tests.backfilling.jobs_of_0_1 import CASES, D_OLD, HERE, ROWS, SHARD_ROWS, numbers, planned, transformation

STORED: dict[str, Any] = json.loads((HERE / "jobs.json").read_text())


def stored(name: str) -> Job:
    return Job.from_json(json.dumps(STORED[name]).encode(), "job.json")


@pytest.mark.parametrize("name", CASES)
def test_a_stored_job_is_read_and_written_as_it_was(name: str) -> None:
    """from_json compares the fingerprint in the file with today's and refuses another."""
    job = stored(name)
    assert job.fingerprint == STORED[name]["fingerprint"]
    written = json.loads(job.to_json())
    assert re.fullmatch("[0-9a-f]{16}", written.pop("xxh64"))  # which version 0.1 had not
    assert written == STORED[name]


@pytest.mark.parametrize("name", CASES)
def test_the_same_call_plans_the_same_job(name: str, tmp_path: Path) -> None:
    then, now = stored(name), planned(name, tmp_path)
    # Bytes and blocks of an Arrow or Parquet file are its writer's, stamps and places this test's.
    for which in ("pieces", "side_pieces"):
        old, new = getattr(then, which), getattr(now, which)
        assert [(p.name, p.rows) for p in new] == [(p.name, p.rows) for p in old]
        now = replace(now, **{which: old})
    assert then.differences(now) == []
    assert now.fingerprint == then.fingerprint
    where = {n: getattr(then, n) for n in ("source", "destination", "side", "backend")}
    assert replace(now, **where) == then


def test_a_half_done_backfill_goes_on(tmp_path: Path) -> None:
    source, new = tmp_path / "half", tmp_path / "half-new"
    source.mkdir()
    np.save(source / "a.npy", numbers(D_OLD, 0))
    shutil.copytree(HERE / "half", new)
    before = {n: (new / f"part-{n:08d}.npy").read_bytes() for n in (0, 2)}
    h = transformation(side_info=False)
    options: dict[str, Any] = {"old_model": "random-old", "precision": "fp32", "progress": False}
    with pytest.raises(fct.FctError, match="holds another backfill, and the two are not mixed: dtype: 'float32'"):
        fct.backfill(str(source), str(new), h, dtype="float16", **options)
    report = fct.backfill(str(source), str(new), h, **options)
    assert (report.shards_done, report.shards_kept, report.shards) == (2, 2, ROWS // SHARD_ROWS)
    assert {n: (new / f"part-{n:08d}.npy").read_bytes() for n in before} == before
    assert fct.verify_gallery(str(new), source=str(source)).ok


@dataclass(frozen=True)
class Later(Job):
    """A version to come, with one option that changes the output's meaning and one that does not."""

    join: str = since("", "the join", meaning=True)
    checked: int = since(0, "how many were checked")


def later(name: str, **new: Any) -> Later:
    job = stored(name)
    return Later(**{f.name: getattr(job, f.name) for f in fields(Job)}, **new)


@pytest.mark.parametrize("name", CASES)
def test_a_new_option_leaves_jobs_without_it_alone(name: str) -> None:
    then, now = stored(name), later(name)
    assert now.fingerprint == then.fingerprint
    assert now.to_json() == then.to_json()
    assert Later.from_json(then.to_json(), "job.json") == now
    assert now.differences(later(name)) == []


def test_a_new_option_counts_where_it_is_used() -> None:
    then, joined, checked = later("npy"), later("npy", join="id"), later("npy", checked=3)
    assert joined.fingerprint != then.fingerprint
    assert checked.fingerprint == then.fingerprint
    assert then.differences(joined) == ["the join: '', now 'id'"]
    assert then.differences(checked) == []
    for job in (joined, checked):
        assert Later.from_json(job.to_json(), "job.json") == job
    with pytest.raises(fct.FctError, match=r"job\.json is not a job that can be continued"):
        Job.from_json(joined.to_json(), "job.json")  # version 0.1 does not go on with what it does not understand
