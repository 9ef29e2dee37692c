"""The lines of docs/engines.md, run as they stand: each engine gives h's own rows, every id once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

import fct

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
ROWS = 3000
WHERE = {
    "spark": ["items-spark", "items-spark-udf"],
    "ray": ["items-ray"],
    "daft": ["items-daft"],
    "dask": ["items-dask", "items-pandas.parquet"],
}


def lines_of(engine: str) -> str:
    block = rf"^<!-- run by tests/engines: {engine} -->\n```python\n(.*?)^```"
    found = re.findall(block, PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"docs/engines.md has no lines for {engine}"
    return "\n".join(found)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("items")
    rng = np.random.default_rng(5)
    old, side = (rng.standard_normal((ROWS, d), dtype=np.float32) for d in (12, 6))
    old[17, 3] = np.nan
    vectors = pa.list_(pa.float32())
    columns = {"id": np.arange(ROWS), "embedding": pa.array(list(old), vectors), "side": pa.array(list(side), vectors)}
    pq.write_table(pa.table(columns), folder / "items.parquet", row_group_size=800)
    h = fct.Transformation.random(12, 6, 10, inner=32)
    h.save(folder / "h.safetensors")
    old[17] = 0
    return folder, fct.transform_batch(old, side, h, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("engine", WHERE)
def test_an_engine_gives_hs_rows(engine: str, items: tuple[Path, Any], tmp_path: Path) -> None:
    if engine == "spark" and shutil.which("java") is None:
        pytest.skip("Spark needs Java, and there is none")
    if engine == "daft":
        pytest.importorskip("daft", reason="daft 0.7 wants pyarrow below 26, so it is not among the test extras")
    folder, want = items
    for name in ("items.parquet", "h.safetensors"):
        shutil.copy(folder / name, tmp_path / name)
    script = lines_of(engine) + ("\nspark.stop()" if engine == "spark" else "")
    if engine == "ray":
        inside = textwrap.indent(script, "    ")
        script = f"from tests.ray_here import ray_here\nwith ray_here(num_cpus=2):\n{inside}"
    paths = [str(PAGE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]  # where tests/ is
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in WHERE[engine]:
        table = pa.dataset.dataset(tmp_path / name, format="parquet", exclude_invalid_files=True).to_table()
        order = np.argsort(table["id"].to_numpy())
        assert np.array_equal(table["id"].to_numpy()[order], np.arange(ROWS)), f"{name}: not every id once"
        column = table["embedding_v2"].combine_chunks().take(pa.array(order))
        assert np.flatnonzero(column.is_null()).tolist() == [17], name
        good = np.delete(np.arange(ROWS), 17)
        got = np.array(column.take(pa.array(good)).to_pylist(), np.float32)
        assert np.allclose(got, want[good], rtol=1e-5, atol=1e-5), name
        assert set(table.schema.names) >= {"id", "embedding", "side", "embedding_v2"}, name
