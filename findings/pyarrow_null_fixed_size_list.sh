#!/usr/bin/env bash
# pyarrow 25.0.1, Parquet: a column of fixed-size lists in which a row is null.
#
# Expected: what pyarrow.parquet.write_table wrote, read_table reads back.
# Seen: every such file is written without a word and cannot be read: ArrowInvalid, "Expected all lists to be of size=2
# but index 2 had size=0". One null row anywhere is enough. A list of any length with the same rows is read.
# What to do about it: write embeddings as list<float> where a row may be null, or leave such rows out. DuckDB reads what
# was written.
#
# Needs python3 with venv and the package index. Exits 1 when the behaviour is another.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pyarrow==25.0.1
cd "$work"
"$work/venv/bin/python" - <<'PY'
import pyarrow as pa
import pyarrow.parquet as pq

rows = [[0.0, 1.0], None, [2.0, 3.0]]
print("pyarrow", pa.__version__)
for kind in (pa.list_(pa.float32()), pa.list_(pa.float32(), 2)):
    table = pa.table({"vector": pa.array(rows, kind)})
    pq.write_table(table, "a.parquet")
    try:
        found = "the same rows" if pq.read_table("a.parquet").equals(table) else "other rows"
    except pa.ArrowInvalid as error:
        found = f"ArrowInvalid: {error}"
    print(f"{kind}: {found}")
    assert found.startswith("ArrowInvalid" if pa.types.is_fixed_size_list(kind) else "the same"), found
PY
