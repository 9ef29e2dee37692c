"""Memory is bounded in bytes, whatever a row holds: batches are cut, samples are small, a join is on disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.backfilling import shard_reader
from fct.gallery import vector_array

# Only Linux tells a process's own peak; getrusage's begins with its parent's.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc says how much memory a process had at most")

D = 16
LIMIT = 1000  # MB, whatever the payload


def peak(code: str, *words: Path) -> int:
    """MB that a child process took at most, which runs ``code``; sys.argv has ``words``."""
    # Not ru_maxrss, which begins with what the parent had.
    tail = "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run(
        [sys.executable, "-c", f"import fct, sys\na = sys.argv\n{code}{tail}", *map(str, words)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) // 1024


BACKFILL = "fct.backfill(a[1], a[2], a[3], old_model='random-old', progress=False)"


@pytest.fixture
def h(tmp_path: Path) -> Path:
    fct.Transformation.random(D, D, 8, inner=32, side_info=False).save(tmp_path / "h.safetensors")
    return tmp_path / "h.safetensors"


def wide(file: Path, rows: int, kind: pa.DataType, width: int, **how: Any) -> pa.Table:
    """Rows of ``width`` bytes of text each, all the same: small on the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = pa.array(["x" * width], kind).take(pa.array(np.zeros(rows, np.int64)))
    vectors = vector_array(np.random.default_rng(0).standard_normal((rows, D), dtype=np.float32))
    table = pa.table({"id": np.arange(rows), "embedding": vectors, "text": text})
    pq.write_table(table, file, **how)
    return table


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.list_(pa.string())], ids=str)
def test_a_batch_is_cut_before_a_column_grows_past_the_bound(
    tmp_path: Path, h: Path, monkeypatch: pytest.MonkeyPatch, kind: pa.DataType
) -> None:
    """As it is at 64 MB, so that no column comes near 2 GB, where Arrow's offsets end."""
    monkeypatch.setattr(shard_reader, "_MOST_BYTES", 64 << 10)
    rows, width = 600, 1000
    text = pa.array(["x" * width] * rows) if pa.types.is_list(kind) else pa.array(["x" * width] * rows, kind)
    if pa.types.is_list(kind):
        text = pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32), text)
    vectors = vector_array(np.ones((rows, D), np.float32))
    (tmp_path / "old").mkdir()
    pq.write_table(pa.table({"id": np.arange(rows), "embedding": vectors, "text": text}), tmp_path / "old/a.parquet")
    sizes: list[int] = []
    real = shard_reader.bounded

    def seen(*args: Any) -> Any:
        for batch in real(*args):
            sizes.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(shard_reader, "bounded", seen)
    fct.backfill(tmp_path / "old", tmp_path / "new", h, old_model="random-old", progress=False)
    assert len(sizes) > 9
    assert max(sizes) <= 64 << 10, "a batch is larger than the bound"
    assert pq.read_table(tmp_path / "new")["id"].to_pylist() == list(range(rows))


def test_rows_that_become_wide_late_are_read_few_at_a_time(tmp_path: Path, h: Path) -> None:
    """The file says how wide the rows of a row group are, before the first of them is read."""
    rng = np.random.default_rng(0)
    rows = 900
    late = [None if i < 300 else rng.bytes(400_000) for i in range(rows)]
    vectors = vector_array(np.ones((rows, D), np.float32))
    (tmp_path / "old").mkdir()
    table = pa.table({"id": np.arange(rows), "embedding": vectors, "thumb": pa.array(late, pa.binary())})
    pq.write_table(table, tmp_path / "old/a.parquet", compression="none", use_dictionary=False, row_group_size=100)
    took = peak(BACKFILL, tmp_path / "old", tmp_path / "new", h)
    assert took < LIMIT, f"{took} MB"


@pytest.mark.slow
def test_two_gigabytes_in_one_column(tmp_path: Path, h: Path) -> None:
    """450 rows of 5 MB in one row group: what batch_rows asks for at once has no place behind 32-bit offsets."""
    wide(tmp_path / "old/a.parquet", 450, pa.large_string(), 5_000_000, store_schema=False)
    for what in ("fct.plan_backfill(a[1], a[2], a[3], old_model='random-old')", BACKFILL):
        took = peak(what, tmp_path / "old", tmp_path / "new", h)
        assert took < LIMIT, f"{took} MB: {what}"
    found = pq.ParquetFile(tmp_path / "new/part-00000000.parquet")
    assert found.metadata.num_rows == 450
    lengths = [len(v) for b in found.iter_batches(10, columns=["text"]) for v in b.column(0).to_pylist()]
    assert lengths == [5_000_000] * 450


@pytest.mark.slow
def test_a_join_by_id_takes_less_memory_than_what_it_joins(tmp_path: Path) -> None:
    """docs/galleries.md: the ids of a partition and 64 MB of side-information at a time."""
    rows, side = 1_200_000, 128
    rng = np.random.default_rng(0)
    fct.Transformation.random(4, side, 4, inner=16).save(tmp_path / "h.safetensors")
    (tmp_path / "g").mkdir()
    order = rng.permutation(rows)
    old = vector_array(np.ones((rows, 4), np.float32))
    pq.write_table(pa.table({"id": np.arange(rows), "embedding": old}), tmp_path / "g/a.parquet")
    schema = pa.schema([("id", pa.int64()), ("side_info", pa.list_(pa.float32(), side))])
    for name, ids in (("s", order), ("t", np.arange(rows))):
        (tmp_path / name).mkdir()
        with pq.ParquetWriter(
            tmp_path / name / "a.parquet", schema, compression="none", use_dictionary=False
        ) as writer:
            for first in range(0, rows, 50_000):
                part = ids[first : first + 50_000]
                vectors = vector_array(np.repeat(part.astype(np.float32)[:, None], side, 1))
                writer.write_table(pa.table({"id": part, "side_info": vectors}, schema=schema))
    run = "fct.backfill(a[1], a[2], a[3], old_model='random-old', progress=False, side_source=a[4], side_join=a[5])"
    took = {
        how: peak(run, tmp_path / "g", tmp_path / how, tmp_path / "h.safetensors", tmp_path / name, Path(how))
        for how, name in (("id", "s"), ("position", "t"))
    }
    print(f"joining {rows * side * 4 / 1e6:.0f} MB of side-information: {took} MB")
    assert took["id"] < took["position"] + 200, took
