"""Files that are no data are named one by one, with what to do; text formats with the line that makes them one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fct.errors import FctError
from fct.gallery import open_source
from fct.gallery.vectors import vector_block

ROWS = [[0.1, 2.0, 3.0], [4.0, 5.5, 6.0]]


def parquet(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": [1, 2], "embedding": pa.array(ROWS, pa.list_(pa.float32()))}), file)


def test_files_that_are_no_data_are_named_one_by_one(tmp_path: Path) -> None:
    parquet(tmp_path / "g/a.parquet")
    for name in ("README.md", "b.parquet.tmp", "deep/c.crc"):
        (tmp_path / "g" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "g" / name).write_text("x")
    with pytest.raises(FctError) as caught:
        open_source(tmp_path / "g")
    for name in ("README.md", "b.parquet.tmp", "deep/c.crc"):
        assert f"{tmp_path}/g/{name}" in str(caught.value)
    advice = re.search(r"name the data alone, such as (\S+)$", str(caught.value))
    assert advice is not None
    assert len(open_source(advice[1]).pieces()) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_the_line_of_duckdb_makes_a_gallery(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    duckdb = pytest.importorskip("duckdb")
    file = tmp_path / f"g{suffix}"
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps({"id": i, "embedding": r}) + "\n" for i, r in enumerate(ROWS)))
    else:
        file.write_text("id,embedding\n" + "".join(f'{i},"{r}"\n' for i, r in enumerate(ROWS)))
    with pytest.raises(FctError, match=f"expected files of one format .*, got {suffix}; write it once as") as caught:
        open_source(file)
    monkeypatch.chdir(tmp_path)
    duckdb.sql(str(caught.value).partition("in DuckDB: ")[2])
    source = open_source("gallery.parquet")
    (batch,) = source.read(source.pieces()[0], 0, 2, 9)
    assert batch.column("id").to_pylist() == [0, 1]
    assert (
        vector_block(batch.column("embedding"), 3).values.tolist() == pa.array(ROWS, pa.list_(pa.float32())).to_pylist()
    )


def test_two_formats_beside_each_other(tmp_path: Path) -> None:
    parquet(tmp_path / "g/a.parquet")
    (tmp_path / "g/b.npy").write_bytes(b"")
    with pytest.raises(FctError, match=r"got \.npy, \.parquet \(1 as b.npy; 1 as a.parquet\); name one kind alone"):
        open_source(tmp_path / "g")
