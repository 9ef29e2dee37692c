"""Galleries drawn by chance, writer by layout by columns by faults, each on its whole way through fct and back.

Twenty seconds in CI; ``FCT_GENERATED_SECONDS=3600 pytest -s tests/generated/test_galleries.py`` for an hour.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.generated.budget import seconds, seed
from tests.generated.galleries import DESTINATIONS, FILES, IDS, PAYLOAD, WRITERS, Drawn
from tests.generated.machine import check

_EACH = 15  # examples of a seed


@st.composite
def galleries(draw: st.DrawFn) -> Drawn:
    writer = draw(st.sampled_from(WRITERS))
    files = writer in FILES
    faults = ["none", "killed", "lost output", "deleted rows" if not files else "killed"]
    layouts = ["flat", "nested", "equal", "hive"] if files else ["flat"]
    if writer in ("deltalake", "iceberg"):
        layouts, faults = ["flat", "hive"], ["none", "killed", "deleted rows"]
    if writer == "numpy":
        layouts = layouts[:3]
    if writer in ("lance", "iceberg"):
        faults = ["none", "killed", "deleted rows"]
    layout, side = (
        draw(st.sampled_from(layouts)),
        draw(st.sampled_from(["none", "none", "column", "gallery", "turned"])),
    )
    if writer == "numpy" and side == "column":
        side = "none"
    if files and layout == "flat" and side in ("none", "column"):
        faults.append("appended")
    to = draw(st.sampled_from(["files"] * 4 + list(DESTINATIONS[1:])))
    if to != "files":
        faults = [fault for fault in faults if fault in ("none", "killed", "deleted rows")]
        if writer == "numpy":
            to = "iceberg"
    rows = draw(st.integers(12, 40))
    spelling = draw(st.sampled_from(["fixed", "list", "large"]))
    # A matrix has no nulls, and pyarrow reads none of fixed-size lists in Parquet.
    parquet = files and FILES[writer][0] == ".parquet"
    nulls = 0 if writer == "numpy" or (spelling == "fixed" and (parquet or writer in ("deltalake", "iceberg"))) else 3
    unsigned = writer not in ("deltalake", "iceberg") and not to.startswith("iceberg")  # which have no such numbers
    kinds = [kind for kind in PAYLOAD if unsigned or kind != "large number"]
    ids = [i for i in (*IDS, "none") if unsigned or i != "uint64"]
    if to not in ("files", "iceberg"):
        ids.remove("none")
    payload = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3, unique=True))
    if to == "iceberg by text" and "text" not in payload:
        payload.append("text")
    some = st.lists(st.integers(0, rows - 1), max_size=3, unique=True).map(tuple)
    if layout == "hive" or not files or side == "gallery":  # the order of rows is the writer's own
        side = "none" if side in ("gallery", "turned") else side
    return Drawn(
        writer=writer,
        layout=layout,
        ids=draw(st.sampled_from(ids)),
        payload=tuple(payload),
        spelling=spelling,
        rows=rows,
        bad=draw(some),
        null=draw(some)[:nulls],
        side=side,
        fault=draw(st.sampled_from(faults)),
        format=draw(st.sampled_from(["auto", "auto", "parquet"])) if to == "files" else "auto",
        to=to,
        export=draw(st.sampled_from(["none", "milvus", "qdrant", "pgvector"])) if to == "files" else "none",
        shard_rows=draw(st.sampled_from([3, 7, 100])),
        batch_rows=draw(st.sampled_from([1, 4, 64])),
    )


@pytest.mark.slow
def test_every_row_of_a_drawn_gallery_comes_back_as_it_was() -> None:
    end, start, count = time.monotonic() + seconds(20.0), seed(), 0

    def one(drawn: Drawn) -> None:
        nonlocal count
        folder = Path(tempfile.mkdtemp(prefix="fct-drawn-"))
        try:
            check(drawn, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        count += 1

    for number in itertools.count(start):
        settings = hypothesis.settings(
            max_examples=_EACH, deadline=None, derandomize=False, database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        print(f"seed {number}, {count} galleries so far", flush=True)
        hypothesis.seed(number)(settings(hypothesis.given(drawn=galleries())(lambda drawn: one(drawn))))()
        if time.monotonic() > end:
            break
    assert count >= _EACH


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["pyarrow", "numpy"])
def test_a_process_that_is_killed_loses_nothing(writer: str, tmp_path: Path) -> None:
    check(Drawn(writer=writer, fault="sigkill", bad=(3, 17), rows=40), tmp_path)
