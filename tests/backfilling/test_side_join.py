"""Side-information joined by id: any order, bounded memory, and every id that does not fit is named and counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.backfilling import id_partitions, side_join
from fct.backfilling.id_partitions import IdPartitions
from fct.cli.app import main
from fct.errors import BackfillError
from fct.gallery import vector_array

N = 3000


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many partitions, spills and buckets, of few rows."""
    monkeypatch.setattr(id_partitions, "_PARTITION_ROWS", 200)
    monkeypatch.setattr(id_partitions, "_GATHERED", 20_000)
    monkeypatch.setattr(side_join, "_BUCKET_BYTES", 16 << 10)


@pytest.fixture
def h() -> fct.Transformation:
    return fct.Transformation.random(16, 4, 8, inner=32)


class Pair:
    """A gallery and its side-information, in two orders."""

    def __init__(self, folder: Path, ids: pa.Array, keep: Callable[[Any], Any] = lambda order: order) -> None:
        rng = np.random.default_rng(0)
        self.folder, n = folder, len(ids)
        self.old, self.side = (rng.standard_normal((n, d), dtype=np.float32) for d in (16, 4))
        order = keep(rng.permutation(n))
        (folder / "g").mkdir(parents=True)
        (folder / "s").mkdir()
        pq.write_table(pa.table({"id": ids, "embedding": vector_array(self.old)}), folder / "g/a.parquet")
        columns = {"pk": ids.take(pa.array(order)), "side_info": vector_array(self.side[order])}
        for i, part in enumerate(np.array_split(np.arange(len(order)), 3)):
            some = pa.table({"pk": columns["pk"][part[0] : part[-1] + 1]})
            vectors = columns["side_info"][int(part[0]) : int(part[-1]) + 1]
            pq.write_table(some.append_column("side_info", vectors), folder / f"s/a{i}.parquet")
        self.options: dict[str, Any] = {
            "side_source": folder / "s", "side_join": "id", "old_model": "random-old", "progress": False,
            "precision": "fp32", "shard_rows": 500,
        }  # fmt: skip

    def run(self, h: fct.Transformation, **options: Any) -> Any:
        return fct.backfill(self.folder / "g", self.folder / "n", h, **{**self.options, **options})

    def check(self, h: fct.Transformation) -> None:
        files = sorted((self.folder / "n").glob("*.parquet"))
        got = pa.concat_tables([pq.read_table(f) for f in files])["embedding"].to_pylist()
        want = fct.transform_batch(self.old, self.side, h, precision="fp32")
        np.testing.assert_array_equal(np.array(got, np.float32), want)
        report = fct.verify_gallery(self.folder / "n", source=self.folder / "g", side_source=self.folder / "s")
        assert report.proven, report


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([f"item-{i}" for i in range(N)]),
        pa.array([f"item-{i}" for i in range(N)], pa.large_string()).dictionary_encode(),
        pa.array(range(N), pa.int32()),
        pa.array([2**63 + i for i in range(N)], pa.uint64()),
        pa.array([-i * 10**12 for i in range(N)]),
        pa.array([i.to_bytes(16, "little") for i in range(N)], pa.binary(16)),
        pa.array(range(N), pa.timestamp("ns")),
        pa.ExtensionArray.from_storage(pa.uuid(), pa.array([i.to_bytes(16, "big") for i in range(N)], pa.binary(16))),
    ],
    ids=lambda ids: str(ids.type),
)
@pytest.mark.usefixtures("small")
def test_any_order_and_any_id(ids: pa.Array, h: fct.Transformation, tmp_path: Path) -> None:
    pair = Pair(tmp_path, ids)
    assert pair.run(h).rows_out == N
    pair.check(h)
    assert not (tmp_path / "n/_fct/side").exists()  # what it took is given back


@pytest.mark.usefixtures("small")
def test_each_id_that_does_not_fit_is_counted(h: fct.Transformation, tmp_path: Path) -> None:
    ids = [f"item-{i}" for i in range(N)]
    pair = Pair(tmp_path, pa.array(ids), lambda order: np.delete(order, [5, 6, 7]))
    first = pq.read_table(tmp_path / "s/a0.parquet")
    more = pa.table({"pk": ["strange", "item-1", None], "side_info": first["side_info"][:3]})
    pq.write_table(pa.concat_tables([first, more]), tmp_path / "s/a0.parquet")
    with pytest.raises(BackfillError) as error:
        pair.run(h)
    for words in (
        "1 id null in the side-information",
        "3 ids missing in the side-information ('item-",
        "1 id not in the source ('strange')",
        "1 id more than once in the side-information ('item-1')",
    ):
        assert words in str(error.value)
    (why,) = fct.plan_backfill(
        tmp_path / "g", tmp_path / "n", h, side_source=tmp_path / "s", side_join="id", old_model="random-old",
        measure_seconds=0.01,
    ).refusals  # fmt: skip
    assert why == str(error.value)
    twice = pa.array([*ids[:-1], "item-0"])
    with pytest.raises(BackfillError, match=r"1 id more than once in the source \('item-0'\)"):
        Pair(tmp_path / "two", twice).run(h)


@pytest.mark.usefixtures("small")
def test_the_join_is_made_once_for_all_runs(
    h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, folder = Pair(tmp_path, pa.array(range(N))), tmp_path / "n/_fct/side"
    from fct.gallery.parquet_files import ParquetDestination

    write, made = ParquetDestination.write, IdPartitions

    def breaks(self: Any, shard: Any, *rest: Any) -> Any:
        if shard.number == 3:
            raise OSError(5, "Input/output error")
        return write(self, shard, *rest)

    monkeypatch.setattr(ParquetDestination, "write", breaks)
    with pytest.raises(BackfillError, match="Input/output error"):
        pair.run(h)
    monkeypatch.setattr(ParquetDestination, "write", write)
    assert (folder / "index.json").exists()
    monkeypatch.setattr(side_join, "IdPartitions", None)  # a second join would call it
    bucket = sorted(folder.glob("bucket-*.arrow"))[-1]
    whole = bucket.read_bytes()
    bucket.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(TypeError):
        pair.run(h)  # a damaged one is made anew
    bucket.write_bytes(whole)
    assert pair.run(h).shards_kept > 0
    monkeypatch.setattr(side_join, "IdPartitions", made)
    pair.check(h)


def test_what_the_join_cannot_do_is_said(h: fct.Transformation, tmp_path: Path) -> None:
    pair = Pair(tmp_path, pa.array(range(40)))
    with pytest.raises(ValueError, match="side_join: expected a gallery of side-information"):
        fct.backfill(tmp_path / "g", tmp_path / "n", h, side_join="id", side_column="embedding", old_model="random-old")
    with pytest.raises(BackfillError, match=r"side_join: expected ids on both sides.*--id-column"):
        pair.run(h, id_column="")
    (tmp_path / "away").mkdir()
    (tmp_path / "n/_fct").mkdir(parents=True)
    (tmp_path / "n/_fct/side").symlink_to(tmp_path / "away")
    with pytest.raises(BackfillError, match="side is a link"):
        pair.run(h)
    assert not list((tmp_path / "away").iterdir())
    (tmp_path / "n/_fct/side").unlink()
    assert pair.run(h).rows_out == 40
    with pytest.raises(BackfillError, match="how side-information is joined: 'id', now 'position'"):
        fct.backfill(
            tmp_path / "g", tmp_path / "n", h, side_source=tmp_path / "s", old_model="random-old", progress=False,
            precision="fp32",
        )  # fmt: skip
    report = fct.verify_gallery(tmp_path / "n", source=tmp_path / "g", side_join="position")
    assert "side_join: expected position, the side-information was joined by id" in report.problems
    with pytest.raises(BackfillError, match="whole numbers, text, bytes or times, got double"):
        Pair(tmp_path / "f", pa.array(np.arange(40.0))).run(h)


def test_from_the_command_line(h: fct.Transformation, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Pair(tmp_path, pa.array(range(100)))
    h.save(tmp_path / "h.safetensors")
    gallery = [str(tmp_path / "g"), str(tmp_path / "n"), "-t", str(tmp_path / "h.safetensors")]
    how = ["--old-model", "random-old", "--side-source", str(tmp_path / "s"), "--side-join", "id"]
    with pytest.raises(SystemExit) as left:
        main(["plan", *gallery, *how, "--expect-rows", "101", "--measure-seconds", "0.01"])
    assert left.value.code == 1
    assert "expect_rows: expected 101 rows, the source has 100" in " ".join(capsys.readouterr().out.split())
    for command in (
        ["plan", *gallery, *how, "--expect-rows", "100", "--measure-seconds", "0.01"],
        ["backfill", *gallery, *how],
        ["verify", str(tmp_path / "n"), "--source", str(tmp_path / "g"), "--side-source", str(tmp_path / "s"),
         "--side-join", "id", "--deep"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as left:
            main(command)
        assert left.value.code == 0, capsys.readouterr()


def test_side_information_without_rows_and_ids_of_another_kind(h: fct.Transformation, tmp_path: Path) -> None:
    pair = Pair(tmp_path, pa.array(range(40)))
    for file in sorted((tmp_path / "s").glob("*"))[1:]:
        file.unlink()
    (file,) = (tmp_path / "s").glob("*")
    whole = pq.read_table(file)
    pq.write_table(whole.slice(0, 0), file)
    with pytest.raises(BackfillError, match=r"40 ids missing in the side-information \(0, 1, 2\)$"):
        pair.run(h)
    pq.write_table(whole.set_column(0, "pk", whole["pk"].cast(pa.string())), file)
    with pytest.raises(BackfillError, match=r"side_source: expected ids of the gallery's type: .*string.*int64"):
        pair.run(h)
