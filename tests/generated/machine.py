"""A drawn gallery on its whole way: plan, backfill (killed or not), verify, export, read back by another library.

What comes out is held against the rows as Python lists. :func:`check` raises AssertionError for any difference.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

import fct
from fct import ref
from fct.backfilling.journal import Journal
from fct.backfilling.run import backfill
from fct.errors import FctError
from fct.gallery import export_bulk
from fct.gallery.vectors import vector_array
from tests.generated.galleries import (
    D_NEW,
    D_OLD,
    D_SIDE,
    FILES,
    IDS,
    READERS,
    Drawn,
    append_file,
    catalog_of,
    partitioned_table,
    plain_rows,
    rows_of,
    write_gallery,
)  # fmt: skip

__all__ = ["check", "transformation"]

Rows = list[dict[str, Any]]
_COMPARED = ("note", "vector", "flag", "label", "lang")  # payload that means the same in every export


class Killed(BaseException):
    """What a test raises where a process would have died."""


def transformation(side: bool) -> fct.Transformation:
    return fct.Transformation.random(D_OLD, D_SIDE if side else D_OLD, D_NEW, inner=16, side_info=side)


# ---- the oracle ----
def expected(rows: Rows) -> Rows:
    """Every row that has a vector, once."""
    return [r for r in rows if r["old"] is not None and np.isfinite(r["old"]).all()]


def require_rows(found: Rows, vectors: Any, want: Rows, h: fct.Transformation, names: list[str]) -> None:
    """Each wanted row once, by its vector, which is the reference's; beside it the values that it came with."""
    old, side = (np.array([r[n] for r in want], np.float64) for n in ("old", "side"))
    new = ref.transform(old, side if h.uses_side_info else old, h)
    assert len(found) == len(want), f"{len(found)} rows, {len(want)} were wanted"
    far = np.abs(np.asarray(vectors, np.float64)[:, None] - new[None]).max(2)
    which = far.argmin(1)
    assert sorted(which) == list(range(len(want))), "rows twice, and others not at all"
    assert far.min(1).max() < 1e-3 * max(1.0, np.abs(new).max()), "vectors of other rows"
    missing = [name for name in names if found and name not in found[0]]
    assert not missing, f"columns lost: {missing}"
    for row, at in zip(found, which, strict=True):
        for name in names:
            assert same(row[name], want[at][name]), f"{name}: {row[name]!r}, {want[at][name]!r} was there"


def same(a: Any, b: Any) -> bool:
    return repr(a) == repr(b)


# ---- the way ----
def check(drawn: Drawn, folder: Path) -> None:
    """The whole way of one example below ``folder``, which is empty."""
    rows, h = rows_of(drawn), transformation(drawn.side != "none")
    (folder / "old").mkdir()
    late = rows[-5:] if drawn.fault == "appended" else []
    source = write_gallery(drawn, rows[: len(rows) - len(late)], folder / "old")
    options = _options(drawn, rows, folder)
    new = _destination(drawn, rows, folder)
    if drawn.side == "turned" and drawn.ids != "none" and drawn.writer != "numpy":
        said = _refusal(lambda: backfill(source, new, h, progress=False, **options))
        assert "expected the ids of the gallery, row by row" in said, said or "rows were joined with others' side"
        return
    plan = fct.plan_backfill(source, new, h, measure_seconds=0, **options)
    assert not plan.refusals, plan.refusals
    if drawn.to == "qdrant" and drawn.ids in ("int64", "text"):  # of which some are negative, or no UUIDs
        said = _refusal(lambda: backfill(source, new, h, progress=False, **options))
        assert f"expected unsigned integers or UUIDs in '{IDS[drawn.ids][0]}', row" in said, said or "ids were taken"
        assert not (folder / "store/collection/new").exists(), "refused, and a collection is there"
        return
    _map(drawn, late, source, new, h, options, folder)
    if drawn.side == "turned":
        return  # rows without ids are joined by their place, as the guide says
    where = {name: options[name] for name in ("storage_options", "journal", "side_source") if name in options}
    report = fct.verify_gallery(new, source=source, spot_check=16, **where)
    assert report.ok, report.problems
    assert report.rows_out == len(expected(rows)), "verify counted other rows"
    found, vectors = read_back(drawn, new, folder)
    names = [n for n in rows[0] if n not in ("old", "side")]
    if drawn.to == "qdrant":  # all else is text there, or numbers
        names = [n for n in names if n in (IDS[drawn.ids][0], *_COMPARED)]
    require_rows(found, vectors, expected(rows), h, [n for n in names if drawn.writer != "numpy" or n in found[0]])
    if drawn.export != "none":
        _export(drawn, new, rows, h, folder)


def _destination(drawn: Drawn, rows: Rows, folder: Path) -> str:
    if drawn.to == "qdrant":
        return f"qdrant://{folder}/store?collection=new"
    if drawn.to.startswith("iceberg"):
        if drawn.to != "iceberg":
            partitioned_table(drawn, rows, folder)
        return "iceberg://c/n.new"
    return str(folder / ("new.lance" if drawn.writer == "lance" and drawn.format == "auto" else "new"))


def _options(drawn: Drawn, rows: Rows, folder: Path) -> dict[str, Any]:
    options: dict[str, Any] = {
        "old_model": "random-old", "precision": "fp32", "threads": 1, "shard_rows": drawn.shard_rows,
        "batch_rows": drawn.batch_rows, "vector_column": "vector" if drawn.writer == "numpy" else "old",
    }  # fmt: skip
    if drawn.format != "auto":
        options["format"] = drawn.format
    if drawn.to.startswith("iceberg"):
        options["storage_options"] = catalog_of(folder)
    if drawn.to == "qdrant":
        options["journal"] = str(folder / "journal")
    if drawn.side in ("gallery", "turned"):
        side = rows[::-1] if drawn.side == "turned" else rows
        name, kind, _ = IDS.get(drawn.ids, IDS["int64"])
        columns = {"side": vector_array(np.array([r["side"] for r in side], np.float32))}
        if drawn.ids != "none" and drawn.writer != "numpy":
            columns[name] = pa.array([r[name] for r in side], kind)
        (folder / "side").mkdir()
        pq.write_table(pa.table(columns), folder / "side/s.parquet")
        options["side_source"] = str(folder / "side")
    return options


def _map(
    drawn: Drawn, late: Rows, source: str, new: str, h: fct.Transformation, options: dict[str, Any], folder: Path
) -> None:
    """Runs the backfill, through whatever happens to it. late: rows of a file that comes in between."""
    if drawn.fault == "sigkill":
        _sigkilled(source, new, h, options, folder)
    elif drawn.fault in ("killed", "appended", "lost output"):
        mark, count = Journal.mark, 0

        def dies(self: Journal, marker: Any) -> None:
            nonlocal count
            count += 1
            if count == 3:
                raise Killed
            mark(self, marker)

        with mock.patch.object(Journal, "mark", dies), contextlib.suppress(Killed):
            backfill(source, new, h, progress=False, **options)
    if drawn.fault == "lost output":
        for file in sorted(Path(new).glob("part-*"))[:1]:
            file.unlink()
    if drawn.fault == "appended":
        append_file(drawn, late, folder / "old")
    backfill(source, new, h, progress=False, follow=drawn.fault == "appended", **options)


def _sigkilled(source: str, new: str, h: fct.Transformation, options: dict[str, Any], folder: Path) -> None:
    """A process of its own, which kills itself as it writes its third marker."""
    h.save(folder / "h.safetensors")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.generated.machine",
            source,
            new,
            str(folder / "h.safetensors"),
            json.dumps(options),
        ]
    )
    assert done.returncode in (0, -signal.SIGKILL), done.returncode


def _refusal(do: Any) -> str:
    """What fct said against it, or "" where it did it."""
    try:
        do()
    except (FctError, ValueError) as error:
        return str(error)
    return ""


# ---- reading back ----
def _points(new: str, id_column: str) -> tuple[Rows, Any]:
    from qdrant_client import QdrantClient

    from fct.gallery.databases.documents import clients

    for client in clients.values():  # a folder is opened once
        client.close()
    clients.clear()
    client = QdrantClient(path=urlsplit(new).path)
    points, _ = client.scroll("new", limit=10_000, with_vectors=True)
    client.close()
    return [(p.payload or {}) | {id_column: p.id} for p in points], np.array([p.vector for p in points])


def read_back(drawn: Drawn, new: str, folder: Path) -> tuple[Rows, Any]:
    """(rows, vectors) of the new gallery, by a library that did not write it."""
    if drawn.to == "qdrant":
        return _points(new, IDS[drawn.ids][0])
    if drawn.to.startswith("iceberg"):
        from pyiceberg.catalog.sql import SqlCatalog

        table = SqlCatalog("c", **catalog_of(folder)).load_table("n.new").scan().to_arrow()
    elif new.endswith(".lance"):
        import lance

        table = lance.dataset(new).to_table()
    elif (Path(new) / "state.json").exists():  # what was a saved dataset is one
        import datasets

        table = datasets.load_from_disk(new).data.table
    else:
        files = [str(f) for f in sorted(Path(new).glob("*")) if f.is_file()]
        suffix = Path(files[0]).suffix
        if suffix == ".npy":
            beside = [p for f in files if (p := Path(new) / "_rows" / f"{Path(f).stem}.parquet").exists()]
            vectors = np.concatenate([np.load(f) for f in files])
            if len(beside) != len(files):  # row numbers alone, which follow from the order
                return [{} for _ in vectors], vectors
            return plain_rows(pa.concat_tables([pq.read_table(p) for p in beside])), vectors
        if suffix == ".arrow":
            table = pa.concat_tables([pa.ipc.open_file(f).read_all() for f in files]).unify_dictionaries()
        else:
            others = [name for name in READERS if name != drawn.writer]
            reader = others[(drawn.rows + len(drawn.payload)) % len(others)]
            table = READERS[reader](files)
    found = plain_rows(table)
    column = "vector" if drawn.writer == "numpy" else "old"
    return found, np.array([r[column] for r in found])


# ---- export ----
def _export_refusal(drawn: Drawn) -> str:
    """What an export has to be refused for, in a word of its message; "" for nothing."""
    to, ids = drawn.export, drawn.ids
    if ids == "uint64" and to != "qdrant":
        return "id_column"
    if to == "qdrant" and ids in ("text", "int64"):
        return "id_column"
    if to == "milvus" and "named vector" in drawn.payload:
        return "vector_field"
    if to == "milvus" and "large number" in drawn.payload:
        return "payload"
    return ""


def _export(drawn: Drawn, new: str, rows: Rows, h: fct.Transformation, folder: Path) -> None:
    out = folder / "out"
    said = _refusal(lambda: export_bulk(new, out, drawn.export, progress=False))  # type: ignore[arg-type]  # drawn: wrong ones too
    reason = _export_refusal(drawn) if drawn.writer != "numpy" else ""
    assert reason in said, f"expected a refusal for {reason}, got {said!r}"
    assert bool(reason) == bool(said), said
    if said:
        assert not out.exists(), "refused, and files are there"
        return
    found, vectors = {"milvus": _milvus, "qdrant": _qdrant, "pgvector": _pgvector}[drawn.export](out)
    want = expected(rows)
    names = [n for n in want[0] if n in _COMPARED and drawn.export != "pgvector"]
    require_rows(found, vectors, want, h, names)
    ids = [r["\0id"] for r in found]
    assert len({repr(i) for i in ids}) == len(ids), "an id twice"
    if drawn.ids != "none" and drawn.writer != "numpy":
        name = IDS[drawn.ids][0]
        assert sorted(map(repr, ids)) == sorted(repr(r[name]) for r in want), "other ids"
        require_rows([{name: r["\0id"]} for r in found], vectors, want, h, [name])


def _milvus(out: Path) -> tuple[Rows, Any]:
    rows = plain_rows(pa.concat_tables([pq.read_table(f) for f in sorted(out.glob("*.parquet"))]))
    return [r | {"\0id": r["id"]} for r in rows], np.array([r["vector"] for r in rows])


def _qdrant(out: Path) -> tuple[Rows, Any]:
    lines = [json.loads(line) for line in (out / "payload.jsonl").read_text().splitlines()]
    return [line["payload"] | {"\0id": line["id"]} for line in lines], np.load(out / "vectors.npy")


def _pgvector(out: Path) -> tuple[Rows, Any]:
    """Ids and vectors of a binary COPY, by its published layout."""
    data, at, rows, vectors = (out / "rows.bin").read_bytes(), 19, [], []
    kind = (out / "table.sql").read_text().split(" PRIMARY KEY")[0].rpartition(" ")[2]
    while (count := struct.unpack_from(">h", data, at)[0]) >= 0:
        at, fields = at + 2, []
        for _ in range(count):
            size = struct.unpack_from(">i", data, at)[0]
            fields.append(data[at + 4 : at + 4 + max(size, 0)])
            at += 4 + max(size, 0)
        key = fields[0]
        value = {"bigint": lambda b: struct.unpack(">q", b)[0], "uuid": lambda b: str(uuid.UUID(bytes=b))}
        rows.append({"\0id": value.get(kind, bytes.decode)(key)})
        vectors.append(np.frombuffer(fields[1], ">f4", offset=4))
    return rows, np.array(vectors)


def _die(source: str, new: str, h: str, options: str) -> None:
    mark, count = Journal.mark, 0

    def dies(self: Journal, marker: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        mark(self, marker)

    with mock.patch.object(Journal, "mark", dies):
        backfill(source, new, h, progress=False, **json.loads(options))


if __name__ == "__main__":
    _die(*sys.argv[1:])
_ = FILES
