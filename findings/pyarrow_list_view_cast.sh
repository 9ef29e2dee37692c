#!/usr/bin/env bash
# pyarrow 26.0.1, Array.cast from list_view to list and from large_list_view to large_list.
#
# Expected: the same rows, [[1.0, 2.0], [3.0]].
# Seen: the last row is empty, [[1.0, 2.0], []], and no error; both arrays pass validate(full=True) before.
# What to do about it: build the list from flatten() and list_value_length().
#
# Needs python3 with venv and the package index. Exits 1 when the behaviour is another.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pyarrow==26.0.1
"$work/venv/bin/python" - <<'PY'
import pyarrow as pa

rows = [[1.0, 2.0], [3.0]]
for view, plain in ((pa.list_view, pa.list_), (pa.large_list_view, pa.large_list)):
    column = pa.array(rows, view(pa.float32()))
    column.validate(full=True)
    got = column.cast(plain(pa.float32())).to_pylist()
    print("pyarrow", pa.__version__, column.type, column.to_pylist(), "cast:", got)
    if got != [[1.0, 2.0], []]:
        raise SystemExit(1)
PY
