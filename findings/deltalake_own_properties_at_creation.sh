#!/usr/bin/env bash
# deltalake 1.6.6, table properties that are not Delta's own (`owner`, `my.key`), which the protocol leaves to users.
#
# Expected: write_deltalake(configuration={"owner": "me"}) keeps the property; Spark's TBLPROPERTIES take any key.
# Seen: "Error parsing property 'owner':'me'" when the table is made; alter.set_table_properties(...,
# raise_if_not_exists=False) sets the same key on a table that is there, and it is read back.
# What to do about it: keep what must be in the first commit in a column's metadata, which is taken as it is.
#
# Needs python3 with venv and the package index. Exits 1 when the behaviour is another.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q deltalake==1.6.6 pyarrow==26.0.1
"$work/venv/bin/python" - "$work" <<'PY'
import sys

import deltalake
import pyarrow as pa

table, mine = pa.table({"a": [1]}), {"owner": "me"}
try:
    deltalake.write_deltalake(f"{sys.argv[1]}/a", table, configuration=mine)
    raise SystemExit(1)
except deltalake.exceptions.DeltaError as error:
    print("deltalake", deltalake.__version__, "making the table:", error)
deltalake.write_deltalake(f"{sys.argv[1]}/b", table)
deltalake.DeltaTable(f"{sys.argv[1]}/b").alter.set_table_properties(mine, raise_if_not_exists=False)
found = deltalake.DeltaTable(f"{sys.argv[1]}/b").metadata().configuration
print("altering it:", found)
if found != mine:
    raise SystemExit(1)
PY
