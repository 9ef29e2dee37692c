"""The traps of each format, sprung."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct import _C
from fct.atomic_files import checksum_bytes
from fct.errors import FctError
from fct.gallery import export_bulk, open_source, vector_array, vector_block
from fct.gallery.faiss_index import build_faiss
from fct.gallery.vectors import rebatch
from fct.rows import nonfinite_rows, rows_of

FORMS = ("fixed_size_list", "list", "binary")


def read_all(source: Any, batch_rows: int = 7) -> Any:
    blocks = []
    for piece in source.pieces():
        for batch in source.read(piece, 0, piece.rows, batch_rows):
            assert batch.num_rows <= batch_rows
            blocks.append(vector_block(batch.column("vector"), 5).values)
    return np.concatenate(blocks)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_column_round_trip_without_a_copy(form: str, dtype: str, rng: np.random.Generator) -> None:
    values = rng.standard_normal((23, 5)).astype(dtype)
    column = vector_array(values, form)
    block = vector_block(column, 5, dtype)
    assert block.values.dtype == dtype
    np.testing.assert_array_equal(block.values, values)
    assert np.shares_memory(block.values, values)
    np.testing.assert_array_equal(vector_block(column.slice(3, 11), 5, dtype).values, values[3:14])
    assert vector_block(column.slice(3, 0), 5, dtype).values.shape == (0, 5)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 3)])
def test_bad_rows_are_named(kind: pa.DataType) -> None:
    rows = [[1.0, 2, 3], None, [4.0, None, 6], [7.0, 8, 9]]
    if not pa.types.is_fixed_size_list(kind):
        rows += [[1.0, 2], [], [1.0, 2, 3, 4], [10.0, 11, 12]]
    block = vector_block(pa.array(rows, kind), 3)
    assert block.bad[1] == "null"
    assert block.bad[2] == "holds a null element"
    assert block.rows is not None
    assert block.rows.tolist() == [0, 3] + ([7] if len(rows) > 4 else [])
    np.testing.assert_array_equal(block.values[:2], [[1, 2, 3], [7, 8, 9]])
    if len(rows) > 4:
        assert block.bad[4] == "expected 3 elements, got 2"
        assert sorted(block.bad) == [1, 2, 4, 5, 6]
        np.testing.assert_array_equal(block.values[2], [10, 11, 12])


def test_variable_binary_with_wrong_lengths() -> None:
    good = np.arange(3, dtype=np.float32)
    block = vector_block(pa.array([good.tobytes(), b"abc", None, good.tobytes()], pa.binary()), 3)
    assert sorted(block.bad) == [1, 2]
    np.testing.assert_array_equal(block.values, [good, good])


def test_rebatch_keeps_rows() -> None:
    parts = [pa.record_batch({"a": list(range(s, s + n))}) for s, n in ((0, 3), (3, 0), (3, 10), (13, 1))]
    assert [b.num_rows for b in rebatch(iter(parts), 4)] == [4, 4, 4, 2]
    assert [x for b in rebatch(iter(parts), 4) for x in b.column(0).to_pylist()] == list(range(14))


def write(path: Path, values: Any) -> Path:
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".fbin":
        path.write_bytes(struct.pack("<II", *values.shape) + values.tobytes())
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"vector": vector_array(values)}), path, row_group_size=9)
    else:
        with pa.ipc.new_stream(path, pa.schema({"vector": pa.list_(pa.float32(), 5)})) as out:
            for i in range(0, len(values), 6):
                out.write_batch(pa.record_batch({"vector": vector_array(values[i : i + 6])}))
    return path


@pytest.mark.parametrize("suffix", [".npy", ".fbin", ".parquet", ".arrow"])
def test_rows_from_anywhere_and_truncation(suffix: str, tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.standard_normal((31, 5), dtype=np.float32)
    file = write(tmp_path / f"a{suffix}", values)
    source = open_source(file)
    np.testing.assert_array_equal(read_all(source), values)
    piece = source.pieces()[0]
    for start, rows in ((0, 1), (8, 2), (17, 14), (30, 1)):
        batches = list(source.read(piece, start, rows, 4))
        got = np.concatenate([vector_block(b.column(0), 5).values for b in batches])
        np.testing.assert_array_equal(got, values[start : start + rows])
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(FctError, match="changed: it had"):
        list(source.read(piece, 0, 31, 40))
    with pytest.raises(FctError, match=f"a{suffix}"):
        open_source(file).pieces()


def test_npy_traps(tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    file.write_bytes(b"\x93NUMPY\x01\x00" + b"\0" * 20)
    with pytest.raises(FctError, match="was its writer killed"):
        open_source(file).pieces()
    np.save(file, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(FctError, match="pickled objects, which are never loaded"):
        open_source(file).pieces()
    np.save(file, np.ones((3, 4, 5), np.float32))
    with pytest.raises(FctError, match=r"expected \(n, d\) rows in .*a.npy, got \(3, 4, 5\) float32"):
        open_source(file).pieces()
    np.save(file, np.ones((3, 4), np.complex64))
    with pytest.raises(FctError, match=r"expected floats of 16 to 64 bits or 8-bit integers in .*a.npy, got complex64"):
        open_source(file).pieces()


@pytest.mark.parametrize("suffix", [".npy", ".u8bin"])
def test_offsets_past_32_bits(suffix: str, tmp_path: Path) -> None:
    """A sparse file of 5 * 2^30 elements, whose n x d overflows 32 bits; its last rows are read."""
    n, d = 5 << 20, 1024
    file = tmp_path / f"a{suffix}"
    from fct.gallery.matrix_files import npy_header

    header = npy_header((n, d), np.dtype(np.uint8)) if suffix == ".npy" else struct.pack("<II", n, d)
    with open(file, "wb") as out:
        out.write(header)
        out.truncate(len(header) + n * d)
        out.seek(len(header) + (n - 2) * d)
        out.write(bytes(range(256)) * 4)
    source = open_source(file)
    piece = source.pieces()[0]
    assert piece.rows == n
    (batch,) = source.read(piece, n - 3, 3, 10)
    values = vector_block(batch.column(0), d).values
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values[:, 255], [0, 255, 0])


def test_page_checksums_are_written_and_verified(tmp_path: Path, rng: np.random.Generator) -> None:
    h = fct.Transformation.random(5, 5, 5, inner=8, side_info=False)
    (tmp_path / "old").mkdir()
    write(tmp_path / "old/a.parquet", rng.standard_normal((300, 5), dtype=np.float32))
    fct.backfill(tmp_path / "old", tmp_path / "new", h, old_model="random-old", progress=False)
    file = next((tmp_path / "new").glob("*.parquet"))
    flipped = bytearray(file.read_bytes())
    at = flipped.index(pq.read_table(file)["vector"].chunk(0).values.buffers()[1].to_pybytes()[:16])
    flipped[at] ^= 1
    file.write_bytes(flipped)
    source = open_source(file)
    with pytest.raises(FctError, match="damaged"):
        read_all(source, 300)


def test_a_row_group_is_decoded_once_however_it_is_cut(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = rng.standard_normal((100, 5), dtype=np.float32)
    pq.write_table(pa.table({"vector": vector_array(values)}), tmp_path / "a.parquet", row_group_size=60)
    begun = []
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *a, **k: begun.append(1) or real(*a, **k))
    source = open_source(tmp_path)
    (piece,) = source.pieces()

    def read(start: int, rows: int, source: Any = source) -> None:
        batches = source.read(piece, start, rows, 7)
        parts: list[Any] = []
        while sum(map(len, parts)) < rows:  # as a backfill does: nobody asks for the end
            parts.append(vector_block(next(batches).column("vector"), 5).values)
        np.testing.assert_array_equal(np.concatenate(parts), values[start : start + rows])

    for start in range(0, 50, 10):
        read(start, 10)
    assert len(begun) == 1
    assert not source._paused[0].file.closed  # type: ignore[attr-defined]  # of this kind of source
    read(54, 2)  # skips rows that another worker has
    assert len(begun) == 1
    read(56, 44)  # to the end of this row group, and the next
    assert len(begun) == 2
    read(3, 9)  # backwards
    assert len(begun) == 3
    read(12, 9, pickle.loads(pickle.dumps(source)))  # what is open does not travel
    assert len(begun) == 4
    read(12, 9)
    assert len(begun) == 4
    for start in (0, 30, 1, 31, 2, 32):  # more passes than are kept
        read(start, 3)
        assert len(source._paused) <= 2  # type: ignore[attr-defined]  # of this kind of source


@pytest.mark.parametrize("ahead", [0, 1 << 30])
def test_a_remote_row_group_is_fetched_whole_only_when_small(
    ahead: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    from fct.gallery import parquet_files as parquet

    values = rng.standard_normal((300, 5), dtype=np.float32)
    with fsspec.open("memory://remote/a.parquet", "wb") as file:
        pq.write_table(pa.table({"vector": vector_array(values)}), file, row_group_size=120)
    monkeypatch.setattr(parquet, "_AHEAD", ahead)
    opened = []
    real = pq.ParquetFile.__init__
    monkeypatch.setattr(pq.ParquetFile, "__init__", lambda *a, **k: opened.append(k["pre_buffer"]) or real(*a, **k))
    source = open_source("memory://remote")
    np.testing.assert_array_equal(read_all(source), values)
    assert opened[-1] is (ahead > 0)


_PEAK = """
import sys
import numpy as np
from fct.gallery import open_source, vector_block
source = open_source(sys.argv[1])
(piece,) = source.pieces()
assert len(piece.groups) == 1
d, first = int(sys.argv[2]), int(sys.argv[3])
at = first
for start, rows in ((first, 300), (first + 300, piece.rows - first - 300)):
    for batch in source.read(piece, start, rows, 512):
        values = vector_block(batch.column("vector"), d).values
        want = 1000 + (at - first + np.arange(len(values))) % 89
        assert (values == want[:, None]).all(), at
        at += len(values)
assert at == piece.rows
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024)
"""


def one_row_group(path: Path, d: int, n: int, tail: int, **options: Any) -> None:
    """n vectors in one row group of lists; the last ``tail`` are told apart by their values."""
    kind = pa.list_(pa.float32())

    def column(values: Any) -> Any:
        child = pa.array(np.repeat(values.astype(np.float32), d))
        offsets = pa.py_buffer(np.arange(len(values) + 1, dtype=np.int32) * d)
        return pa.Array.from_buffers(kind, len(values), [None, offsets], children=[child])

    step = 2000
    body = column(np.arange(step) % 97)  # the same memory again and again
    parts = [body] * ((n - tail) // step) + [body.slice(0, (n - tail) % step), column(1000 + np.arange(tail) % 89)]
    pq.write_table(
        pa.table({"vector": pa.chunked_array(parts)}),
        path,
        row_group_size=n,
        use_dictionary=False,
        write_statistics=False,
        **options,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    peaks = []
    for n in (2_000, 400_000):  # 1 MB and 205 MB of vectors
        one_row_group(tmp_path / "a.parquet", 128, n, 900, compression="none")
        command = [sys.executable, "-c", _PEAK, str(tmp_path), "128", str(n - 900)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < peaks[0] + 60


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_a_row_group_past_2_to_the_31_elements(tmp_path: Path) -> None:
    d, past = 8192, 700
    n = 2**31 // d + past
    first = n - 2 * past  # half of these rows begin before element 2^31, half behind
    one_row_group(tmp_path / "a.parquet", d, n, 2 * past, compression="lz4")
    group = pq.read_metadata(tmp_path / "a.parquet").row_group(0)
    assert group.column(0).num_values > 2**31
    command = [sys.executable, "-c", _PEAK, str(tmp_path), str(d), str(first)]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak < 600  # MB; the row group holds 8,600


def test_files_of_two_kinds_and_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        open_source(tmp_path / "none")
    np.save(tmp_path / "a.npy", np.ones((2, 3), np.float32))
    (tmp_path / "b.csv").write_text("x")
    with pytest.raises(FctError, match=r"expected files of one format.*got \.csv, \.npy"):
        open_source(tmp_path)
    np.save(tmp_path / "c.npy", np.ones((2, 4), np.float32))
    (tmp_path / "b.csv").unlink()
    with pytest.raises(FctError, match="expected the same columns in every file"):
        open_source(tmp_path).pieces()


def test_hugging_face_datasets_are_read(tmp_path: Path, rng: np.random.Generator) -> None:
    datasets = pytest.importorskip("datasets")
    values = rng.standard_normal((20, 5), dtype=np.float32)
    features = datasets.Features({"vector": datasets.Sequence(datasets.Value("float32"), length=5)})
    datasets.Dataset.from_dict({"vector": values.tolist()}, features=features).save_to_disk(str(tmp_path / "hf"))
    np.testing.assert_array_equal(read_all(open_source(tmp_path / "hf")), values)


def test_lance_gets_one_new_version(tmp_path: Path, rng: np.random.Generator) -> None:
    lance = pytest.importorskip("lance")
    h = fct.Transformation.random(5, 5, 4, inner=8, side_info=False)
    table = pa.table({"id": range(100), "vector": vector_array(rng.standard_normal((100, 5), dtype=np.float32))})
    lance.write_dataset(table, str(tmp_path / "old.lance"), max_rows_per_file=40)
    lance.write_dataset(table.slice(0, 3), str(tmp_path / "new.lance"))
    options: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 30}
    for _ in range(2):  # the second run finds everything done and commits nothing
        report = fct.backfill(tmp_path / "old.lance", tmp_path / "new.lance", h, **options)
        dataset = lance.dataset(str(tmp_path / "new.lance"))
        assert dataset.version == 2
        assert dataset.to_table()["id"].to_pylist() == list(range(100))
    assert report.shards_done == 0
    assert lance.dataset(str(tmp_path / "new.lance"), version=1).count_rows() == 3
    assert fct.verify_gallery(tmp_path / "new.lance", trust_journal=True).proven


@pytest.mark.parametrize("factory", ["Flat", "IVF4,PQ2x4"])
def test_faiss_index_of_the_new_gallery(factory: str, tmp_path: Path, rng: np.random.Generator) -> None:
    faiss = pytest.importorskip("faiss")
    h = fct.Transformation.random(5, 5, 4, inner=8, side_info=False)
    (tmp_path / "old").mkdir()
    write(tmp_path / "old/a.npy", rng.standard_normal((900, 5), dtype=np.float32))
    fct.backfill(tmp_path / "old", tmp_path / "new", h, old_model="random-old", progress=False, shard_rows=200)
    index = faiss.read_index(str(build_faiss(tmp_path / "new", factory)))
    assert index.ntotal == 900
    rows = np.concatenate([np.load(f) for f in sorted((tmp_path / "new").glob("*.npy"))])
    with pytest.raises(ValueError, match=r"faiss: expected a description FAISS knows .* got 'Flat,Round'"):
        build_faiss(tmp_path / "new", "Flat,Round")
    if factory == "Flat":
        found = index.search(rows[:50], 3)
        np.testing.assert_array_equal(found[1], fct.topk(rows[:50], rows, 3).indices)


def test_bulk_files_hold_every_row(tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.standard_normal((50, 5), dtype=np.float32)
    folder = tmp_path / "g"
    folder.mkdir()
    table = pa.table({"id": range(7, 57), "vector": vector_array(values), "tag": ["x"] * 50})
    pq.write_table(table, folder / "a.parquet")
    (file,) = export_bulk(folder, tmp_path / "m", "milvus")
    got = pq.read_table(file)
    assert got.schema.field("vector").type.value_type == pa.float32()
    np.testing.assert_array_equal(np.stack(got["vector"].to_pylist()).astype(np.float32), values)
    vectors, payload = export_bulk(folder, tmp_path / "q", "qdrant")
    np.testing.assert_array_equal(np.load(vectors), values)
    assert payload.read_text().splitlines()[0] == '{"id": 7, "payload": {"tag": "x"}}'
    file, table_sql = export_bulk(folder, tmp_path / "p", "pgvector")
    assert '"tag" text' in table_sql.read_text()
    data = file.read_bytes()
    assert data[:11] == b"PGCOPY\n\xff\r\n\0"
    assert data[-2:] == b"\xff\xff"
    fields, size, key, length, dim, zero = struct.unpack(">hiqihh", data[19 : 19 + 22])
    assert (fields, size, key, length, dim, zero) == (3, 8, 7, 24, 5, 0)
    np.testing.assert_array_equal(np.frombuffer(data[41:61], ">f4"), values[0])
    assert data[61:66] == b"\0\0\0\x01x"
    assert len(data) == 19 + 50 * (22 + 20 + 5) + 2
    with pytest.raises(FileExistsError, match=r"p exists; choose another place$"):  # there is no overwriting here
        export_bulk(folder, tmp_path / "p", "pgvector")
    pq.write_table(table.rename_columns(["id", "old", "tag"]), folder / "a.parquet")
    with pytest.raises(ValueError, match=r"expected one that fct wrote, .* or a column 'vector', got id, old, tag;"):
        export_bulk(folder, tmp_path / "other", "pgvector")


@pytest.mark.parametrize("payload", [False, True])
def test_rejected_rows_do_not_shift_the_ids_of_bare_matrices(
    payload: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    values = rng.standard_normal((50, 5), dtype=np.float32)
    values[[0, 3, 19, 30], 1] = np.nan  # the first, the last and some within shards of 20 rows
    whole = np.isfinite(values).all(axis=1)
    numbers = np.arange(50)
    (tmp_path / "old").mkdir()
    columns = {"id": numbers + 1000, "vector": vector_array(values), "tag": [f"t{i}" for i in range(50)]}
    if payload:
        pq.write_table(pa.table(columns), tmp_path / "old/a.parquet")
    else:
        np.save(tmp_path / "old/a.npy", values)
    h = fct.Transformation.random(5, 5, 4, inner=8, side_info=False)
    report = fct.backfill(
        tmp_path / "old", tmp_path / "new", h, old_model="random-old", progress=False, shard_rows=20, format="npy"
    )
    assert (report.rejects, report.shards) == (4, 3)
    vectors, lines = export_bulk(tmp_path / "new", tmp_path / "out", "qdrant")
    want = fct.transform_batch(values[whole], None, h, precision=report.precision)
    np.testing.assert_array_equal(np.load(vectors), want)
    got = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["id"] for row in got] == (numbers[whole] + (1000 if payload else 0)).tolist()
    assert [row["payload"] for row in got] == [{"tag": f"t{i}"} if payload else {} for i in numbers[whole]]


def test_checksum_is_xxh64(rng: np.random.Generator) -> None:
    from fct.atomic_files import checksum_bytes

    # Of the specification, and of xxhsum -H64.
    assert checksum_bytes(b"") == "ef46db3751d8e999"
    assert checksum_bytes(b"a") == "d24ec4f1a98c6e5b"
    assert checksum_bytes(b"Nobody inspects the spammish repetition") == "fbcea83c8a378bf1"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 5), (97, 33), (1000, 128), (5, 5000), (0, 4)])
def test_one_pass_finds_what_two_do(n: int, d: int, dtype: str, rng: np.random.Generator) -> None:
    values = rng.standard_normal((n, d)).astype(dtype)
    for row in {0, n // 2, n - 1} & set(range(n)):
        values[row, row % d] = rng.choice([np.nan, np.inf, -np.inf])
    rows = rows_of(values, "values", finite=False)
    checksum = _C.Xxh64()
    flags = nonfinite_rows(rows, checksum)
    np.testing.assert_array_equal(flags, ~np.isfinite(values).all(axis=1))
    assert f"{checksum.digest():016x}" == checksum_bytes(values.tobytes())
    if n > 1 and d > 1:
        with pytest.raises(ValueError, match="contiguous"):
            nonfinite_rows(rows_of(values[:, 1:], "values", finite=False), checksum)
