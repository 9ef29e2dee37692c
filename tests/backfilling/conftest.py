from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.gallery import vector_array

D_OLD, D_SIDE, D_NEW = 16, 8, 12


@pytest.fixture(scope="session")
def h() -> fct.Transformation:
    return fct.Transformation.random(D_OLD, D_SIDE, D_NEW, inner=64)


@pytest.fixture
def gallery(tmp_path: Path, rng: np.random.Generator) -> Callable[..., Path]:
    """Makes a Parquet gallery of two files, ids and a payload column; ``bad`` rows hold a NaN."""

    def make(n: int = 3000, *, name: str = "old", bad: tuple[int, ...] = (), side_bad: tuple[int, ...] = ()) -> Path:
        old = rng.standard_normal((n, D_OLD), dtype=np.float32)
        side = rng.standard_normal((n, D_SIDE), dtype=np.float32)
        old[list(bad), 3] = np.nan
        side[list(side_bad), 0] = np.inf
        space = fct.EmbeddingSpace("random-old", D_OLD)
        table = pa.table(
            {
                "id": [f"item-{i}" for i in range(n)],
                "old": vector_array(old),
                "side": vector_array(side),
                "tag": rng.integers(0, 9, n),
            }
        )
        from fct.gallery.space_tags import with_space

        table = table.replace_schema_metadata(with_space(table.schema, space).metadata)
        folder = tmp_path / name
        folder.mkdir()
        half = n // 2 + 7
        pq.write_table(table.slice(0, half), folder / "part-2.parquet", row_group_size=500, write_page_checksum=True)
        pq.write_table(table.slice(half), folder / "part-10.parquet", row_group_size=500, write_page_checksum=True)
        return folder

    return make


def timeless(file: Path) -> bytes:
    """A file's bytes; a marker without the times of its shard, which no two runs share."""
    data = file.read_bytes()
    if file.parent.name != "done":
        return data
    try:
        body = json.loads(json.loads(data)["marker"])
    except ValueError:  # a test damaged it
        return data
    body.pop("times", None)
    return json.dumps(body, sort_keys=True).encode()


def contents(folder: Path) -> dict[str, str]:
    """Every data file of a new gallery, its size and sum; the journal's own files name times and places."""
    return {
        str(f.relative_to(folder)): f"{len(data := timeless(f))} bytes, {hashlib.sha256(data).hexdigest()}"
        for f in sorted(folder.rglob("*"))
        if f.is_file() and (f.parent.name in ("done", "rejects") or "_fct" not in f.parts)
    }


QUICK: dict[str, Any] = {"progress": False, "shard_rows": 300, "batch_rows": 128}
