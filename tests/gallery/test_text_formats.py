"""JSON Lines and CSV: the refusal prints one line of DuckDB, which is run here as it is printed."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

import fct
from fct.gallery import load_labels, load_vectors, open_source


@pytest.mark.parametrize("named", ["file", "folder"])
@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".csv", ".tsv"])
def test_the_line_that_the_refusal_prints_makes_a_gallery(
    ending: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    duckdb = pytest.importorskip("duckdb")
    values = rng.standard_normal((30, 8), dtype=np.float32)
    (tmp_path / "the day's").mkdir()
    file = tmp_path / f"the day's/rows{ending}"
    if ending in (".jsonl", ".ndjson"):
        file.write_text("".join(json.dumps({"id": i, "embedding": v.tolist()}) + "\n" for i, v in enumerate(values)))
    else:
        with open(file, "w", newline="") as opened:
            writer = csv.writer(opened, delimiter="\t" if ending == ".tsv" else ",")
            writer.writerow(["id", "embedding"])
            writer.writerows([i, json.dumps(v.tolist())] for i, v in enumerate(values))
    with pytest.raises(fct.FctError) as refused:
        open_source(file if named == "file" else file.parent)
    line = re.search(r"in DuckDB: (COPY .*)", str(refused.value))
    assert line is not None, str(refused.value)
    monkeypatch.chdir(tmp_path)
    duckdb.sql(line[1])
    np.testing.assert_array_equal(load_vectors("gallery.parquet"), values)
    assert load_labels("gallery.parquet:id").tolist() == list(range(30))
