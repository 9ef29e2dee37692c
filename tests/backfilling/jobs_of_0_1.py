"""Jobs as version 0.1 made them, for the test that a backfill begun by it goes on today.

``python tests/backfilling/jobs_of_0_1.py`` wrote ``begun_by_0_1/`` with fct 0.1.0, and refuses to run with another
version: what lies there is the past.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import fct
from fct.gallery import vector_array

HERE = Path(__file__).parent / "begun_by_0_1"
D_OLD, D_SIDE, D_NEW, ROWS = 16, 8, 12, 40
SHARD_ROWS = 10

Case = Callable[[Path], dict[str, Any]]


def numbers(d: int, seed: int) -> np.ndarray:
    """Rows whose every bit is the same everywhere."""
    return np.random.default_rng(seed).integers(-64, 64, (ROWS, d)).astype(np.float32) / 64


def transformation(*, side_info: bool = True) -> fct.Transformation:
    return fct.Transformation.random(D_OLD, D_SIDE if side_info else D_OLD, D_NEW, inner=32, side_info=side_info)


def _table(form: str = "fixed_size_list", kind: type = np.float32, *, side: bool = True) -> pa.Table:
    columns = {"id": [f"item-{i}" for i in range(ROWS)], "old": vector_array(numbers(D_OLD, 0).astype(kind), form)}
    if side:
        columns["side"] = vector_array(numbers(D_SIDE, 1).astype(kind), form)
    return pa.table(columns | {"tag": list(range(ROWS))})


def _npy(root: Path) -> dict[str, Any]:
    np.save(root / "a.npy", numbers(D_OLD, 0))
    return {"h": transformation(side_info=False)}


def _npy_beside_a_side_gallery(root: Path) -> dict[str, Any]:
    np.save(root / "a.npy", numbers(D_OLD, 0)[:25])
    np.save(root / "b.npy", numbers(D_OLD, 0)[25:])
    side = root.with_name(root.name + "-side")
    side.mkdir()
    np.save(side / "s.npy", numbers(D_SIDE, 1))
    return {"side_source": str(side), "scale": 0.5, "keep_side_info": True}


def _npy_to_float16(root: Path) -> dict[str, Any]:
    np.save(root / "a.npy", numbers(D_OLD, 0))
    return {"h": transformation(side_info=False), "dtype": "float16", "precision": "bf16"}


def _parquet(root: Path) -> dict[str, Any]:
    pq.write_table(_table(), root / "part-2.parquet", row_group_size=15)
    pq.write_table(_table(), root / "part-10.parquet", row_group_size=15)
    return {"precision": "bf16"}


def _parquet_to_lists(root: Path) -> dict[str, Any]:
    pq.write_table(_table(), root / "a.parquet")
    return {"vector_format": "list", "dtype": "float16", "id_column": "tag", "side_column": "side"}


def _parquet_of_binaries(root: Path) -> dict[str, Any]:
    pq.write_table(_table("binary", np.float16), root / "a.parquet")
    return {"vector_column": "old", "side_column": "side", "binary_dtype": "float16", "keep_side_info": True}


def _arrow_to_parquet(root: Path) -> dict[str, Any]:
    table = _table(side=False)
    with pa.OSFile(str(root / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=16)
    side = root.with_name(root.name + "-side")
    side.mkdir()
    np.save(side / "s.npy", numbers(D_SIDE, 1))
    return {"side_source": str(side), "format": "parquet", "id_column": ""}


def _bytes_with_a_step(root: Path) -> dict[str, Any]:
    codes = (numbers(D_OLD, 0) * 64).astype(np.int8)
    (root / "a.i8bin").write_bytes(np.array(codes.shape, "<u4").tobytes() + codes.tobytes())
    return {"h": transformation(side_info=False), "scale": 0.03}


CASES: dict[str, Case] = {
    case.__name__.strip("_"): case
    for case in (
        _npy, _npy_beside_a_side_gallery, _npy_to_float16, _parquet, _parquet_to_lists, _parquet_of_binaries,
        _arrow_to_parquet, _bytes_with_a_step,
    )
}  # fmt: skip


def planned(name: str, root: Path) -> Any:
    """The job that this version plans for a case, made anew below ``root``."""
    source = root / name
    source.mkdir(parents=True)
    options: dict[str, Any] = {
        "old_model": "random-old",
        "precision": "fp32",
        "shard_rows": SHARD_ROWS,
        "batch_rows": 8,
    } | CASES[name](source)
    h = options.pop("h", None) or transformation()
    plan = fct.plan_backfill(str(source), str(root / f"{name}-new"), h, measure_seconds=0.001, **options)
    assert plan.job is not None, plan.refusals
    return plan.job


def main() -> None:
    if fct.__version__ != "0.1.0":
        raise SystemExit(f"expected fct 0.1.0, got {fct.__version__}: what lies in {HERE} is the past")
    HERE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        jobs = {name: json.loads(planned(name, Path(folder)).to_json()) for name in CASES}
        for job in jobs.values():
            for url in ("source", "destination", "side"):
                job[url] = job[url].replace(folder, "/galleries")
        (HERE / "jobs.json").write_text(json.dumps(jobs, indent=1) + "\n")
        # A backfill that was stopped after two of its four shards.
        source = Path(folder) / "half"
        source.mkdir()
        np.save(source / "a.npy", numbers(D_OLD, 0))
        new = Path(folder) / "half-new"
        h = transformation(side_info=False)
        fct.backfill(str(source), str(new), h, old_model="random-old", shard_rows=SHARD_ROWS, batch_rows=8,
                     precision="fp32", progress=False)  # fmt: skip
        for gone in (new / "_fct").glob("*"):
            if gone.is_dir() and gone.name != "done":
                shutil.rmtree(gone)
            elif gone.is_file() and gone.name != "job.json":
                gone.unlink()
        for number in (1, 3):
            (new / f"_fct/done/{number:08d}.json").unlink()
            (new / f"part-{number:08d}.npy").unlink()
        job = (new / "_fct/job.json").read_text().replace(folder, "/galleries")
        (new / "_fct/job.json").write_text(job)
        shutil.rmtree(HERE / "half", ignore_errors=True)
        shutil.copytree(new, HERE / "half")


if __name__ == "__main__":
    main()
