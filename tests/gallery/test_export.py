"""fct export: ids and payload leave as they arrived, row by row, whole or not at all."""

from __future__ import annotations

import datetime
import json
import struct
import uuid
from collections import Counter
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.gallery import bulk, export_bulk, tag_space
from fct.gallery.export_ids import RULES, IdCheck
from fct.gallery.json_values import json_values
from fct.gallery.vectors import vector_block

D = 4
TARGETS = ("milvus", "qdrant", "pgvector")
ROWS = np.arange(5 * D, dtype=np.float32).reshape(5, D)


def gallery(where: Path, vectors: Any = ROWS, **columns: Any) -> Path:
    where.mkdir()
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    table = pa.table({**columns, "embedding": flat})
    with pa.OSFile(str(where / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)  # Arrow's own files hold every type
    tag_space(where, fct.EmbeddingSpace("new", vectors.shape[1]))
    return where


def exported(where: Path, to: str, **options: Any) -> tuple[list[Any], np.ndarray[Any, Any], list[dict[str, Any]]]:
    """(ids, vectors, payload) as they stand in the files."""
    files = export_bulk(where, where.parent / to, to, **options)
    if to == "qdrant":
        lines = [json.loads(line) for line in files[1].read_text().splitlines()]
        return [x["id"] for x in lines], np.load(files[0]), [x["payload"] for x in lines]
    assert to == "milvus"
    table = pa.concat_tables(pq.read_table(f) for f in files)
    names = (options.get("id_field", "id"), options.get("vector_field", "vector"))
    rest = [{k: v for k, v in row.items() if k not in names} for row in table.to_pylist()]
    return table[names[0]].to_pylist(), np.array(table[names[1]].to_pylist(), np.float32), rest


@pytest.mark.parametrize("name", ["id", "_id", "pk", "key", "uid"])
@pytest.mark.parametrize("to", ["milvus", "qdrant"])
def test_the_ids_are_those_that_a_backfill_takes(tmp_path: Path, name: str, to: str) -> None:
    ids, vectors, _ = exported(gallery(tmp_path / "g", **{name: np.arange(5) * 10 + 7}), to)
    assert ids == [7, 17, 27, 37, 47]
    assert np.array_equal(vectors, ROWS)


TEXT = ["a", "ö", "c" * 300, "", "e"]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()),
     pa.dictionary(pa.uint32(), pa.large_string())],
    ids=str,
)  # fmt: skip
def test_every_spelling_of_text_is_the_same_id_and_payload(tmp_path: Path, kind: pa.DataType) -> None:
    file = tmp_path / "g.arrow"
    column = pa.array(TEXT).dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else pa.array(TEXT, kind)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(ROWS.ravel()), D)
    table = pa.table({"id": column, "name": column, "embedding": flat})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    ids, _, rest = exported(file, "milvus", vector_column="embedding")
    assert ids == TEXT
    assert [r["name"] for r in rest] == TEXT


UUIDS = [uuid.UUID(int=i * 2**96 + 5) for i in range(5)]


def test_uuids_are_ids_as_text_and_as_arrows_own(tmp_path: Path) -> None:
    for i, column in enumerate(([str(u) for u in UUIDS], pa.array([u.bytes for u in UUIDS], pa.uuid()))):
        for to in ("milvus", "qdrant"):
            folder = tmp_path / f"{i}{to}"
            folder.mkdir()
            ids, _, _ = exported(gallery(folder / "g", id=column), to)
            assert ids == [str(u) for u in UUIDS]


BAD_IDS: dict[str, tuple[Any, dict[str, str]]] = {
    "null": (pa.array([0, 1, None, 3, 4]), dict.fromkeys(TARGETS, r"'id', row 2 has null")),
    "null text": (pa.array(["a", None, "c", "d", "e"]), dict.fromkeys(("milvus", "pgvector"), r"row 1 has null")),
    "twice": (pa.array([5, 1, 2, 1, 4]), dict.fromkeys(TARGETS, r"rows 1 and 3 both have 1")),
    "twice, text": (pa.array(["a", "b", "a", "d", "e"]), dict.fromkeys(("milvus", "pgvector"), r"rows 0 and 2 both")),
    "twice, in two spellings": (
        pa.array([str(u) for u in UUIDS[:4]] + [str(UUIDS[1]).upper()]),
        {"qdrant": r"rows 1 and 4 both have"},
    ),
    "negative": (pa.array([0, 1, 2, 3, -4]), {"qdrant": r"unsigned integers or UUIDs in 'id', row 4 has -4"}),
    "past 2^63": (
        pa.array([1, 2, 2**63, 4, 5], pa.uint64()),
        dict.fromkeys(("milvus", "pgvector"), r"row 2 has 9223372036854775808"),
    ),
    "no UUID": (pa.array(["item-0", "b", "c", "d", "e"]), {"qdrant": r"row 0 has 'item-0'"}),
    "bytes": (pa.array([bytes([i] * 16) for i in range(5)], pa.binary(16)), dict.fromkeys(TARGETS, r"is fixed_size")),
    "dates": (pa.array([datetime.date(2024, 1, i + 1) for i in range(5)]), dict.fromkeys(TARGETS, r"is date32")),
    "floats": (pa.array([0.0, 1.0, 2.0, 3.0, 4.0]), dict.fromkeys(TARGETS, r"is double")),
    "too long": (pa.array(["x" * 65536, "b", "c", "d", "e"]), {"milvus": r"row 0 has 'xxx"}),
    "NUL": (pa.array(["a\0", "b", "c", "d", "e"]), {"pgvector": r"row 0 has 'a\\x00"}),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_an_id_that_the_database_cannot_take_is_refused_by_name_and_nothing_is_left(tmp_path: Path, case: str) -> None:
    column, targets = BAD_IDS[case]
    where = gallery(tmp_path / "g", id=column)
    for to, message in targets.items():
        with pytest.raises(ValueError, match=rf"^id_column: expected .*{message}"):
            export_bulk(where, tmp_path / "out", to)
        assert [p.name for p in tmp_path.iterdir()] == ["g"]


def test_ids_past_2_63_are_qdrants(tmp_path: Path) -> None:
    wide = [2**63 + 5, 12, 2**64 - 1, 0, 1]
    assert exported(gallery(tmp_path / "g", id=pa.array(wide, pa.uint64())), "qdrant")[0] == wide


def test_more_ids_than_memory_is_given_are_compared_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fct.gallery.export_ids._HELD", 100)
    numbers = np.random.default_rng(0).permutation(5000)
    for last, wrong in ((5000, False), (int(numbers[17]), True)):
        check = IdCheck(RULES["milvus"], "id", pa.int64(), tmp_path)
        column = pa.array([*numbers, last])
        parts = [column.slice(i, 64) for i in range(0, len(column), 64)]
        for i, part in enumerate(parts):
            check(part, i * 64)
        if wrong:
            with pytest.raises(ValueError, match=rf"rows 17 and 5000 both have {last}"):
                check.close(partial(iter, parts))
        else:
            check.close(partial(iter, parts))
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize(
    "vectors",
    [
        [[1.0] * D, [2.0] * D, None, [4.0] * D],
        [[1.0] * D, [2.0] * D, [3.0], [4.0] * D],
        [[1.0] * D, [2.0] * D, [3.0, None, 3.0, 3.0], [4.0] * D],
        [[1.0] * D, [2.0] * D, [3.0, float("nan"), 3.0, 3.0], [4.0] * D],
    ],
    ids=["null", "short", "null inside", "NaN"],
)
def test_a_row_without_a_vector_shifts_no_other(tmp_path: Path, to: str, vectors: Any) -> None:
    (tmp_path / "g").mkdir()
    pq.write_table(
        pa.table({"id": range(4), "vector": pa.array(vectors, pa.list_(pa.float32()))}), tmp_path / "g/a.parquet"
    )
    tag_space(tmp_path / "g", fct.EmbeddingSpace("m", D))
    with pytest.raises(ValueError, match="gallery: row 2 has no vector"):
        export_bulk(tmp_path / "g", tmp_path / "out", to)
    assert [p.name for p in tmp_path.iterdir()] == ["g"]


def test_a_column_of_the_users_never_takes_the_place_of_the_vectors(tmp_path: Path) -> None:
    other = pa.FixedSizeListArray.from_arrays(pa.array(-ROWS.ravel()), D)
    where = gallery(tmp_path / "g", id=range(5), vector=other)
    with pytest.raises(ValueError, match=r"vector_field: expected a name that no other column has.*'vector'"):
        export_bulk(where, tmp_path / "out", "milvus", vector_column="embedding")
    _, vectors, rest = exported(where, "milvus", vector_column="embedding", vector_field="mapped")
    assert np.array_equal(vectors, ROWS)
    assert [r["vector"] for r in rest] == (-ROWS).tolist()
    _, vectors, rest = exported(where, "qdrant", vector_column="embedding")
    assert np.array_equal(vectors, ROWS)
    assert [r["vector"] for r in rest] == (-ROWS).tolist()


def test_a_column_of_the_users_never_takes_the_place_of_the_ids(tmp_path: Path) -> None:
    where = gallery(tmp_path / "g", id=["a"] * 5, pk=range(5))
    with pytest.raises(ValueError, match=r"id_field: expected a name that no other column has.*'id'"):
        export_bulk(where, tmp_path / "out", "milvus", id_column="pk")
    ids, _, rest = exported(where, "milvus", id_column="pk", id_field="pk")
    assert ids == [0, 1, 2, 3, 4]
    assert rest == [{"id": "a"}] * 5


PAYLOAD = pa.table(
    {
        "number": pa.array([1.5, float("nan"), None, float("inf"), -0.0]),
        "half": pa.array(np.array([1, 2, 3, 4, 5], np.float16)),
        "wide": pa.array([2**64 - 1, 0, 1, 2, None], pa.uint64()),
        "price": pa.array(
            [Decimal("1.10"), Decimal("-0.01"), None, Decimal(10) ** 20, Decimal(0)], pa.decimal128(38, 2)
        ),
        "when": pa.array([1, None, 2, 3, -1], pa.timestamp("ns", "Europe/Berlin")),
        "early": pa.array([datetime.datetime(1, 1, 1)] * 5, pa.timestamp("us")),
        "day": pa.array([datetime.date(9999, 12, 31)] * 5),
        "span": pa.array([1, -1_500_000_000, None, 0, 86400 * 10**9], pa.duration("ns")),
        "step": pa.array([(1, 2, 3), None, (0, 0, -1), (0, 0, 0), (-1, 0, 0)], pa.month_day_nano_interval()),
        "tags": pa.array([["a", None], [], None, ["b"], ["c"]]),
        "nested": pa.array([{"x": float("nan"), "y": [1]}, None, {"x": 1.0, "y": None}, {"x": None, "y": []}, None]),
        "pairs": pa.array(
            [[("k", 1)], [], None, [("k", 1), ("k", 2)], [("z", None)]], pa.map_(pa.string(), pa.int64())
        ),
        "kind": pa.array(["x", "y", None, "x", "x"]).dictionary_encode(),
    }
)


def test_payload_is_json_of_the_same_value_and_meaning(tmp_path: Path) -> None:
    where = gallery(tmp_path / "g", **{n: PAYLOAD[n] for n in PAYLOAD.schema.names})
    with pytest.warns(fct.FctWarning) as told:
        _, _, rest = exported(where, "qdrant")
    assert [str(w.message).split(":")[1].strip() for w in told] == [
        "1 value of 'nested.x' that are NaN or infinite became null",
        "2 values of 'number' that are NaN or infinite became null",
    ]
    columns = {name: [row[name] for row in rest] for name in PAYLOAD.schema.names}
    assert columns == {
        "number": [1.5, None, None, None, -0.0],
        "half": [1, 2, 3, 4, 5],
        "wide": [2**64 - 1, 0, 1, 2, None],
        "price": ["1.10", "-0.01", None, "100000000000000000000.00", "0.00"],
        "when": ["1970-01-01T01:00:00.000000001+01:00", None, "1970-01-01T01:00:00.000000002+01:00",
                 "1970-01-01T01:00:00.000000003+01:00", "1970-01-01T00:59:59.999999999+01:00"],
        "early": ["0001-01-01T00:00:00.000000"] * 5,
        "day": ["9999-12-31"] * 5,
        "span": ["PT0.000000001S", "-PT1.5S", None, "PT0S", "PT86400S"],
        "step": ["P1M2DT0.000000003S", None, "P0M0DT-0.000000001S", "P0M0DT0S", "P-1M0DT0S"],
        "tags": [["a", None], [], None, ["b"], ["c"]],
        "nested": [{"x": None, "y": [1]}, None, {"x": 1.0, "y": None}, {"x": None, "y": []}, None],
        "pairs": [{"k": 1}, {}, None, [["k", 1], ["k", 2]], {"z": None}],
        "kind": ["x", "y", None, "x", "x"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "column, targets, message",
    [
        (pa.array([b"\0"] * 5), ("qdrant", "milvus"), "column 'x' is binary, which JSON cannot hold"),
        (pa.array([10**15] * 5, pa.timestamp("s")), ("qdrant", "milvus", "pgvector"), "column 'x': row 0 h"),
        (pa.array([0, 0, 0, -(10**11), 0], pa.timestamp("s")), ("qdrant", "milvus"), "column 'x': row 3 holds a time"),
        (pa.array([0, 1, 0, 0, 0], pa.timestamp("ns")), ("pgvector",), "column 'x': row 1 holds nanoseconds"),
        (pa.array(["", "a\0b", "", "", ""]), ("pgvector",), "column 'x' holds a text with a NUL"),
        (pa.array([0, 2**63, 0, 0, 0], pa.uint64()), ("milvus",), "column 'x': row 1 has an integer past 2"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_refused_and_can_be_left_out(
    tmp_path: Path, column: Any, targets: tuple[str, ...], message: str
) -> None:
    where = gallery(tmp_path / "g", id=range(5), x=column, kept=range(5))
    for to in targets:
        with pytest.raises(ValueError, match=message):
            export_bulk(where, tmp_path / to, to)
        assert not (tmp_path / to).exists()
        export_bulk(where, tmp_path / to, to, columns=["kept"])


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("there", [False, True])
def test_a_stopped_export_leaves_nothing(tmp_path: Path, to: str, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    where = gallery(tmp_path / "g", np.zeros((600, D), np.float32), id=range(600))
    if there:
        (tmp_path / "out").mkdir()
    monkeypatch.setattr(bulk, "_BATCH", 100)
    real, calls = vector_block, []

    def stop(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(bulk, "vector_block", stop)
    with pytest.raises(KeyboardInterrupt):
        export_bulk(where, tmp_path / "out", to)
    assert [p for p in tmp_path.rglob("*") if p.is_file() and tmp_path / "g" not in p.parents] == []
    monkeypatch.setattr(bulk, "vector_block", real)
    assert all(f.is_file() for f in export_bulk(where, tmp_path / "out", to))


def test_the_tables_columns_and_names_are_quoted(tmp_path: Path) -> None:
    where = gallery(tmp_path / "g", id=range(5), **{'a"b; DROP': range(5)})
    export_bulk(where, tmp_path / "out", "pgvector", table='my "t"', halfvec=True)
    sql = (tmp_path / "out/table.sql").read_text()
    assert 'CREATE TABLE "my ""t""" (\n  "id" bigint PRIMARY KEY,\n  "embedding" halfvec(4) NOT NULL,\n' in sql
    assert '  "a""b; DROP" bigint\n);' in sql
    where = gallery(tmp_path / "h", id=range(5), **{"a\n\\! ls": range(5)})
    with pytest.raises(ValueError, match="columns: expected printable names"):
        export_bulk(where, tmp_path / "out2", "pgvector")


def test_a_halfvec_never_overflows(tmp_path: Path) -> None:
    rows = ROWS.copy()
    rows[3, 1] = 7e4
    with pytest.raises(ValueError, match="halfvec: row 3 has values past 65,504"):
        export_bulk(gallery(tmp_path / "g", rows), tmp_path / "out", "pgvector", halfvec=True)


def test_row_numbers_are_ids_on_demand(tmp_path: Path) -> None:
    ids, _, rest = exported(gallery(tmp_path / "g", id=["x"] * 5), "qdrant", id_column="")
    assert ids == [0, 1, 2, 3, 4]
    assert rest == [{"id": "x"}] * 5


def test_rows_of_pgvector_without_payload_are_as_with_it(tmp_path: Path) -> None:
    where = gallery(tmp_path / "g", id=pa.array([5, -1, 2, 3, 4]), x=pa.nulls(5, pa.int32()))
    export_bulk(where, tmp_path / "with", "pgvector")
    export_bulk(where, tmp_path / "without", "pgvector", columns=())
    a, b = ((tmp_path / n / "rows.bin").read_bytes() for n in ("with", "without"))
    step = 2 + 4 + 8 + 4 + 4 + 4 * D
    assert len(b) == 19 + 5 * step + 2
    for i, key in enumerate((5, -1, 2, 3, 4)):
        row = b[19 + i * step : 19 + (i + 1) * step]
        assert struct.unpack(">hiqihh4f", row) == (2, 8, key, 4 + 4 * D, D, 0, *ROWS[i])
        longer = a[19 + i * (step + 4) : 19 + (i + 1) * (step + 4)]
        assert longer == b"\x00\x03" + row[2:] + b"\xff\xff\xff\xff"


def test_the_command_takes_the_same_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fct.cli import main

    where = gallery(tmp_path / "g", pk=range(5), x=range(5), y=range(5))
    words = ["export", str(where), str(tmp_path / "out"), "--to", "qdrant"]
    for more, payload in (([], {"x": 0, "y": 0}), (["--column", "y"], {"y": 0}), (["--no-payload"], {})):
        with pytest.raises(SystemExit) as left:
            main([*words, *more])
        assert left.value.code == 0
        assert capsys.readouterr().out.split() == [str(tmp_path / "out" / n) for n in ("vectors.npy", "payload.jsonl")]
        first = (tmp_path / "out" / "payload.jsonl").read_text().splitlines()[0]
        assert json.loads(first) == {"id": 0, "payload": payload}
        for file in (tmp_path / "out").iterdir():
            file.unlink()


def test_a_null_that_a_dictionary_holds_is_a_null_id(tmp_path: Path) -> None:
    for i, values in enumerate((pa.array(["a", None, "c", "d", "e"]), pa.array([1, None, 3, 4, 5]))):
        column = pa.DictionaryArray.from_arrays(pa.array(range(5), pa.int8()), values)
        where = gallery(tmp_path / f"g{i}", id=column)
        for to in TARGETS:
            with pytest.raises(ValueError, match=r"^id_column: expected .*row 1 has null"):
                export_bulk(where, tmp_path / "out", to)


def test_a_null_inside_a_list_is_refused_wherever_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column is one type in all of Milvus's files, whatever its first rows hold."""
    monkeypatch.setattr(bulk, "_BATCH", 2)
    lists = [[1], [2], [], [3], [4]]
    assert [r["tags"] for r in exported(gallery(tmp_path / "g", tags=pa.array(lists)), "milvus")[2]] == lists
    where = gallery(tmp_path / "late", tags=pa.array([*lists[:4], [None, 5]]))
    with pytest.raises(ValueError, match=r"^payload: column 'tags': rows 4 to 4 have a null inside a list"):
        export_bulk(where, tmp_path / "out", "milvus")
    early = gallery(tmp_path / "early", tags=pa.array([[None], *lists[1:]]))
    files = export_bulk(early, tmp_path / "out", "milvus")
    assert pq.read_table(files[0])["tags"].to_pylist() == ["[null]", "[2]", "[]", "[3]", "[4]"]


def test_lists_of_categories_are_lists_of_text(tmp_path: Path) -> None:
    words = pa.array(["a", "b", "a", "c"]).dictionary_encode()
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 3, 3, 4, 4]), words)
    assert [r["tags"] for r in exported(gallery(tmp_path / "g", tags=lists), "milvus")[2]] == lists.to_pylist()


LISTS = [["a"], None, [], ["b", "c"], ["d"]]


@pytest.mark.parametrize(
    "kind",
    [pa.list_view(pa.string()), pa.large_list_view(pa.string()), pa.large_list(pa.string()),
     pa.list_(pa.string_view())],
    ids=str,
)  # fmt: skip
def test_every_spelling_of_a_list_is_the_same_payload(tmp_path: Path, kind: pa.DataType) -> None:
    where = gallery(tmp_path / "g", tags=pa.array(LISTS, kind))
    assert [r["tags"] for r in exported(where, "qdrant")[2]] == LISTS
    assert [r["tags"] for r in exported(where, "milvus")[2]] == LISTS


def test_times_in_maps_keep_their_digits_or_are_refused(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.timestamp("us"))
    maps = pa.array([[], None, [("a", 1), ("b", None)], [("c", 2)], []], kind)
    want = [{}, None, {"a": "1970-01-01T00:00:00.000001", "b": None}, {"c": "1970-01-01T00:00:00.000002"}, {}]
    assert [r["m"] for r in exported(gallery(tmp_path / "g", m=maps), "qdrant")[2]] == want
    assert json_values(maps.slice(2, 2), "m", 0, Counter()) == want[2:4]
    far = gallery(tmp_path / "far", m=pa.array([[("a", 2**62)]] * 5, kind))
    with pytest.raises(ValueError, match=r"^payload: column 'm': .*outside the years 1 to 9999"):
        export_bulk(far, tmp_path / "out", "qdrant")
