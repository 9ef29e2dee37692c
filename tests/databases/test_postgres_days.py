"""Bad days of a job on PostgreSQL: killed again and again, and a server that goes away in the middle."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from tests.databases.conftest import Database, Postgres, rows_of, vectors_of

JOB = """
import sys, fct
fct.backfill(*sys.argv[1:4], journal=sys.argv[4], old_model="random-old", progress=False, shard_rows=200,
             batch_rows=100)
"""


def right(db: Database, h: fct.Transformation, old: Any, table: str, column: str) -> None:
    rows = db.run(f"SELECT id, {column}::text FROM {table} ORDER BY id")
    assert [i for i, _ in rows] == list(range(1, len(old) + 1)), "not every id once"
    want = fct.transform_batch(old, None, h, progress=False)
    assert np.allclose(vectors_of([v for _, v in rows]), want, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("table", "column"), [("new", "v"), ("items", "v2")], ids=["new table", "new column"])
def test_ten_kills_leave_every_id_once(
    db: Database, h: fct.Transformation, h_file: Path, tmp_path: Path, table: str, column: str
) -> None:
    old = rows_of(4000)
    db.items(old)
    words = (db.url("items", vector="embedding"), db.url(table, vector=column), str(h_file), str(tmp_path / "j"))
    job, done = [sys.executable, "-c", JOB, *words], tmp_path / "j" / "done"
    kills = 0
    for kill in range(10):
        process = subprocess.Popen(job, stderr=subprocess.PIPE)
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            if done.is_dir() and len(list(done.glob("*.json"))) > kill:
                time.sleep(0.005 * (kill % 4))
                break
            time.sleep(0.002)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 8, "the job was too quick to be killed"
    last = subprocess.run(job, capture_output=True, text=True, timeout=300)
    assert last.returncode == 0, last.stderr[-2000:]
    right(db, h, old, table, column)


@pytest.mark.slow
def test_a_connection_that_breaks_is_made_again(
    db: Database, h: fct.Transformation, tmp_path: Path, postgres: Postgres
) -> None:
    old = rows_of(3000)
    db.items(old)
    stop = threading.Event()

    def cut() -> None:
        while not stop.wait(0.3):
            with postgres.connect() as c:
                c.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'fct'")

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        job = (db.url("items"), db.url("new", vector="v"), h)
        knobs: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 500, "batch_rows": 200}
        report = fct.backfill(*job, journal=tmp_path / "j", max_rows_per_s=1500, **knobs)
    finally:
        stop.set()
        thread.join()
    assert report.rows_out == 3000
    right(db, h, old, "new", "v")


def test_a_server_that_stays_away_is_a_clear_error_and_the_job_goes_on_later(
    db: Database, h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fct.gallery.databases.postgres_server import Server

    old = rows_of(3000)
    db.items(old)
    job = (db.url("items"), db.url("new", vector="v"), h)
    knobs: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 500, "batch_rows": 200}
    run, calls = Server.run, []

    def away(self: Any, do: Any) -> Any:
        calls.append(1)
        if len(calls) > 12:
            raise ConnectionError("connection to server was lost")
        return run(self, do)

    monkeypatch.setattr(Server, "run", away)
    with pytest.raises(fct.FctError, match=r"postgresql:///.*connection to server was lost \(tried twice\)"):
        fct.backfill(*job, journal=tmp_path / "j", retries=1, **knobs)
    monkeypatch.undo()
    report = fct.backfill(*job, journal=tmp_path / "j", **knobs)
    assert report.rows_out == 3000
    right(db, h, old, "new", "v")
