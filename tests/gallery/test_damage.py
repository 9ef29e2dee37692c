"""Damaged files and sizes past 32 bits: an error that names the file, or the right rows; never other rows."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.errors import FctError
from fct.gallery import open_source, vector_array, vector_block
from tests.gallery.test_formats import read_all, write


def rows_or_error(file: Path, d: int = 5) -> Any:
    """What a reader makes of the file: its rows, or None where it was refused by name."""
    why = ""
    try:
        source = open_source(file)
        batches = [b for p in source.pieces() for b in source.read(p, 0, p.rows, 100)]
        return np.concatenate([vector_block(b.column("vector"), d).values for b in batches])
    except (FctError, ValueError) as error:
        why = str(error)
    assert file.name in why or "expected 5 elements" in why, why
    return None


@pytest.mark.parametrize(("suffix", "header"), [(".npy", 128), (".fbin", 8)])
def test_no_flipped_header_bit_yields_other_rows(
    suffix: str, header: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    values = rng.standard_normal((31, 5), dtype=np.float32)
    file = write(tmp_path / f"a{suffix}", values)
    whole, refused = file.read_bytes(), 0
    for bit in range(8 * header):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        if suffix == ".npy" and b"'>f4'" in flipped:  # a header like any other: of big-endian numbers
            continue
        file.write_bytes(flipped)
        got = rows_or_error(file)
        refused += got is None
        assert got is None or np.array_equal(got, values), f"bit {bit}"
    assert refused > 4 * header or suffix == ".npy"
    assert refused > 250 or suffix == ".fbin"


def test_no_flipped_bit_in_a_page_goes_unseen(tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.standard_normal((31, 5), dtype=np.float32)
    file = tmp_path / "a.parquet"
    table = pa.table({"vector": vector_array(values)})
    pq.write_table(table, file, write_page_checksum=True, use_dictionary=False, compression="none")
    column = pq.read_metadata(file).row_group(0).column(0)
    whole, end = file.read_bytes(), column.data_page_offset + column.total_compressed_size
    random.seed(1)
    for _ in range(100):
        flipped = bytearray(whole)
        at = random.randrange(end - values.nbytes, end)
        flipped[at] ^= 1 << random.randrange(8)
        file.write_bytes(flipped)
        assert rows_or_error(file) is None


@pytest.mark.parametrize("suffix", [".npy", ".fbin", ".parquet", ".arrow"])
def test_no_truncation_yields_fewer_rows(suffix: str, tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.standard_normal((31, 5), dtype=np.float32)
    file = write(tmp_path / f"a{suffix}", values)
    whole = file.read_bytes()
    for size in sorted({0, 1, 7, 8, 9, 127, 128, 129, len(whole) // 2, len(whole) - 21, len(whole) - 1}):
        file.write_bytes(whole[:size])
        got = rows_or_error(file)
        # An Arrow stream may end without its end marker; all its rows are there then.
        assert got is None or (suffix == ".arrow" and np.array_equal(got, values)), size


@pytest.mark.parametrize("suffix", [".fbin", ".u8bin", ".i8bin"])
def test_bin_headers_that_lie(suffix: str, tmp_path: Path) -> None:
    file, width = tmp_path / f"a{suffix}", 4 if suffix == ".fbin" else 1
    body = bytes(6 * 5 * width)
    for n, d, why in ((7, 5, "truncated"), (5, 5, "wrong header"), (6, 4, "wrong header"), (6, 0, "wrong header")):
        file.write_bytes(struct.pack("<II", n, d) + body)
        with pytest.raises(FctError, match=rf"a{suffix} (is|has a) {why}.*\({n}, {d}\)"):
            open_source(file).pieces()
    file.write_bytes(struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF) + body)  # n x d overflows 64 bits as bytes of float32
    with pytest.raises(FctError, match="truncated"):
        open_source(file).pieces()
    file.write_bytes(b"\0\0\0")
    with pytest.raises(FctError, match="ended 5 bytes early"):
        open_source(file).pieces()


def test_parquet_list_column_past_32_bits(tmp_path: Path, rng: np.random.Generator) -> None:
    """A list<float> column of more than 2^31 child values: two row groups on disk, named 600 times in the footer."""
    d, rows = 1024, 2048
    first = np.zeros((rows, d), np.float32)
    second = first.copy()
    second[[0, 7, -1]] = rng.standard_normal((3, d), dtype=np.float32)
    small = io.BytesIO()
    schema = pa.schema({"vector": pa.list_(pa.float32())})
    with pq.ParquetWriter(small, schema, compression="zstd") as writer:
        for values in (first, second):
            writer.write_table(pa.table([vector_array(values, "list")], schema=schema))
    data = small.getvalue()
    metadata = pq.read_metadata(io.BytesIO(data))
    once = pq.read_metadata(io.BytesIO(data))
    for _ in range(599):
        metadata.append_row_groups(once)
    footer = io.BytesIO()
    metadata.write_metadata_file(footer)
    length = struct.unpack("<I", data[-8:-4])[0]
    (tmp_path / "a.parquet").write_bytes(data[: len(data) - 8 - length] + footer.getvalue()[4:])
    source = open_source(tmp_path)
    (piece,) = source.pieces()
    assert piece.rows == 1200 * rows
    assert piece.rows * d > 1 << 31
    for start, want in ((piece.rows - 1, second[-1:]), (piece.rows - rows - 1, np.stack([first[-1], second[0]]))):
        batches = list(source.read(piece, start, len(want), 10))
        got = np.concatenate([vector_block(b.column(0), d).values for b in batches])
        np.testing.assert_array_equal(got, want)


def test_large_list_offsets_past_32_bits() -> None:
    d, n = 1 << 20, 2200
    child = np.zeros(n * d, np.uint8)  # pages of zeros that nobody touches take no memory
    child[-d:] = 7
    offsets = pa.py_buffer(np.arange(0, (n + 1) * d, d, dtype=np.int64))
    values = pa.Array.from_buffers(pa.uint8(), len(child), [None, pa.py_buffer(child)])
    column = pa.Array.from_buffers(pa.large_list(pa.uint8()), n, [None, offsets], children=[values])
    assert len(child) > 1 << 31
    block = vector_block(column.slice(n - 2, 2), d)
    assert block.values.shape == (2, d)
    assert block.values[:, 0].tolist() == [0, 7]


@pytest.mark.parametrize("form", ["fixed_size_list", "list", "binary"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_parquet_column_end_to_end(form: Any, dtype: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    h = fct.Transformation.random(6, 4, 5, inner=16)
    old, side = (rng.standard_normal((300, d)).astype(dtype) for d in (6, 4))
    (tmp_path / "old").mkdir()
    columns = {"id": range(300), "old": vector_array(old, form), "side": vector_array(side, form)}
    pq.write_table(pa.table(columns), tmp_path / "old/a.parquet", row_group_size=70)
    options: dict[str, Any] = {"vector_column": "old", "side_column": "side"} if form == "binary" else {}
    fct.backfill(
        tmp_path / "old", tmp_path / "new", h, old_model="random-old", progress=False, precision="fp32",
        binary_dtype=dtype if form == "binary" else "float32", **options,
    )  # fmt: skip
    table = pq.read_table(next((tmp_path / "new").glob("*.parquet")))
    got = vector_block(table["old"].combine_chunks(), 5, dtype).values
    assert got.dtype == dtype
    want = fct.ref.transform(old.astype(np.float32), side.astype(np.float32), h)
    np.testing.assert_allclose(got, want, rtol=2e-3 if dtype == "float16" else 1e-4, atol=1e-3)
    assert fct.verify_gallery(tmp_path / "new", trust_journal=True).proven


@pytest.mark.parametrize("suffix", [".u8bin", ".i8bin"])
def test_eight_bit_matrices_end_to_end(suffix: str, tmp_path: Path, rng: np.random.Generator) -> None:
    h = fct.Transformation.random(6, 6, 5, inner=16, side_info=False)
    dtype = np.uint8 if suffix == ".u8bin" else np.int8
    rows = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, (100, 6), dtype=dtype, endpoint=True)
    (tmp_path / "old").mkdir()
    (tmp_path / f"old/a{suffix}").write_bytes(struct.pack("<II", *rows.shape) + rows.tobytes())
    fct.backfill(
        tmp_path / "old", tmp_path / "new", h, old_model="random-old", progress=False, scale=0.05, precision="fp32"
    )
    (file,) = (tmp_path / "new").glob("*.fbin")
    assert struct.unpack("<II", file.read_bytes()[:8]) == (100, 5)
    got = np.frombuffer(file.read_bytes()[8:], np.float32).reshape(100, 5)
    scaled = rows.astype(np.float32) * np.float32(0.05)
    np.testing.assert_allclose(got, fct.ref.transform(scaled, scaled, h), rtol=1e-4, atol=1e-4)
    assert read_all(open_source(file)).shape == (100, 5)
