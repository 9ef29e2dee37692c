#!/usr/bin/env bash
# dask 2026.8.0, DataFrame.to_parquet: a column of NumPy vectors.
#
# Expected: a list column, as pandas.DataFrame.to_parquet writes for the same frame, or an error.
# Seen: dask turns the object column into strings when the frame is made (dataframe.convert-string, on by default), so
# the file holds NumPy's printed form of each vector ("[0.1 0.2 ... 0.9]"), shortened with "..." beyond 1,000 numbers.
# Nothing is said, and the vectors cannot be had back from what is shortened.
# What to do about it: dask.config.set({"dataframe.convert-string": False}) before the frame is made, and the
# whole schema in to_parquet(schema=...), since dask's own guess of an object column fails with ArrowInvalid.
#
# Needs python3 with venv and the package index. Exits 1 when the behaviour is another.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "dask[dataframe]==2026.8.0" pandas==3.0.2 pyarrow==25.0.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

rows = np.random.default_rng(0).standard_normal((4, 1536)).astype(np.float32)
frame = pd.DataFrame({"id": range(4), "embedding": list(rows)})
frame.to_parquet("pandas.parquet")
dd.from_pandas(frame, npartitions=1).to_parquet("dask")
with dask.config.set({"dataframe.convert-string": False}):
    schema = pa.schema({"id": pa.int64(), "embedding": pa.list_(pa.float32())})
    dd.from_pandas(frame, npartitions=1).to_parquet("dask-objects", schema=schema, write_index=False)
print("dask", dask.__version__)
kinds = {name: pq.read_table(name).schema.field("embedding").type for name in ("pandas.parquet", "dask", "dask-objects")}
for name, kind in kinds.items():
    print(f"{name}: {kind}")
text = pq.read_table("dask")["embedding"][0].as_py()
print(f"first row, {len(text)} characters: {text[:40]!r} ... {text[-20:]!r}")
assert "list" in str(kinds["pandas.parquet"]) and "list" in str(kinds["dask-objects"])
assert "string" in str(kinds["dask"]), "dask no longer writes text"
assert "..." in text, "the printed vector is whole"
PY
