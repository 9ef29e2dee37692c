"""What the generated tests found, made small: each is the first of its kind."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
import tests.backfilling.jobs_of_0_1 as of_0_1
from fct.backfilling.run import backfill
from fct.errors import ArtifactError, BackfillError, FctError
from tests.generated.parsers import QUICK, numbers, transformation


def changed(file: Path, old: bytes, new: bytes) -> None:
    raw = file.read_bytes()
    assert old in raw
    file.write_bytes(raw.replace(old, new, 1))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    (tmp_path / "old").mkdir()
    np.save(tmp_path / "old/a.npy", numbers())
    run(tmp_path)
    return tmp_path


def run(folder: Path) -> Any:
    return backfill(folder / "old", folder / "new", transformation(), old_model="random-old", **QUICK)


def test_a_job_that_lost_its_checksum_is_not_taken_for_one_of_version_0_1(finished: Path) -> None:
    job = finished / "new/_fct/job.json"
    body = json.loads(job.read_text())
    body.pop("xxh64")
    job.write_text(json.dumps(body | {"shard_rows": 5}))
    with pytest.raises(BackfillError, match=r"job\.json is not a job that can be continued: it has lost its checksum"):
        run(finished)


def test_a_job_without_a_checksum_has_no_fields_that_came_with_it(finished: Path) -> None:
    job = finished / "new/_fct/job.json"
    body = json.loads(job.read_text())
    body.pop("xxh64")
    job.write_text(json.dumps(body | {"begun_as": body["fingerprint"]}))  # which would stand for any fingerprint
    with pytest.raises(BackfillError, match="wrote none, and no begun_as either"):
        fct.verify_gallery(finished / "new")


@pytest.mark.parametrize("shard_rows", [10, 20])
def test_a_number_of_version_0_1_that_was_changed_keeps_no_other_rows(shard_rows: int, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    np.save(tmp_path / "old/a.npy", of_0_1.numbers(of_0_1.D_OLD, 0))
    shutil.copytree(of_0_1.HERE / "half", tmp_path / "new")
    job = tmp_path / "new/_fct/job.json"
    body = json.loads(job.read_text())
    job.write_text(json.dumps(body | {"shard_rows": shard_rows}))
    h = of_0_1.transformation(side_info=False)
    options: dict[str, Any] = {"old_model": "random-old", "precision": "fp32", "progress": False}
    if shard_rows != 10:
        with pytest.raises(BackfillError):
            backfill(tmp_path / "old", tmp_path / "new", h, **options)
        return
    backfill(tmp_path / "old", tmp_path / "new", h, **options)
    assert "xxh64" in json.loads(job.read_text())  # from now on it has one
    assert fct.verify_gallery(tmp_path / "new", source=str(tmp_path / "old")).ok


@pytest.mark.parametrize("name", ["_fct/space.json", "_fct/transformation.safetensors"])
def test_what_lies_beside_the_rows_is_written_again(name: str, finished: Path) -> None:
    file = finished / "new" / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    assert run(finished).shards_done == 0
    assert file.read_bytes() == whole


@pytest.mark.parametrize("old", [b'\\"map_change\\": 0.25', b'\\"rows\\": 10'])
def test_how_h_was_measured_is_under_its_checksum(old: bytes, tmp_path: Path) -> None:
    from fct.artifact.tolerance import PrecisionEffect

    h = transformation().with_(precisions={"int8": PrecisionEffect(1.0, 0.25, 0.0)}, info={"rows": 10})
    file = h.save(tmp_path / "h.safetensors")
    changed(file, old, old[:-1] + b"4")
    with pytest.raises(ArtifactError, match=r"h\.safetensors does not match its checksum"):
        fct.Transformation.load(file)


def test_a_calibration_is_under_its_checksum(tmp_path: Path) -> None:
    h = transformation()
    ranges = {name: np.full((2, layer.d_in), 0.375, np.float32) for name, layer in h.layers()}
    file = h.with_(calibration=ranges).save(tmp_path / "h.safetensors")
    changed(file, struct.pack("<f", 0.375), struct.pack("<f", 0.5))
    with pytest.raises(ArtifactError, match="does not match its checksum"):
        fct.Transformation.load(file)


def test_an_artifact_of_version_0_1_has_no_checksum_and_a_misspelt_one_is_none(tmp_path: Path) -> None:
    file = transformation().save(tmp_path / "h.safetensors")
    raw = file.read_bytes()
    at = raw.index(b', \\"xxh64\\"')
    end = raw.index(b"}", at)
    size = end - at
    file.write_bytes(raw[:at] + raw[end : end + 1] + b" " * size + raw[end + 1 :])
    # Blanks outside the header's text are no JSON of ours: they are moved behind the quote.
    text = file.read_bytes()
    file.write_bytes(text.replace(b"}" + b" " * size + b'"', b"}" + b'"' + b" " * size, 1))
    assert fct.Transformation.load(file).fingerprint == transformation().fingerprint
    file.write_bytes(raw.replace(b'\\"xxh64\\"', b'\\"xxh65\\"'))
    with pytest.raises(ArtifactError, match="its header names"):
        fct.Transformation.load(file)


def test_a_damaged_archive_of_pairs_is_named(tmp_path: Path) -> None:
    from fct.gallery import load_pairs

    np.savez(tmp_path / "p.npz", old=numbers(), new=numbers(4))
    raw = bytearray((tmp_path / "p.npz").read_bytes())
    at = raw.rindex(b"PK\x05\x06")
    raw[at + 16 : at + 20] = b"\xff\xff\xff\x7f"  # where the archive's list of files begins
    (tmp_path / "p.npz").write_bytes(raw)
    with pytest.raises(ValueError, match=r"pairs: expected a whole \.npz of arrays, .*p\.npz is not"):
        load_pairs(tmp_path / "p.npz")


def test_an_experiment_that_is_none_is_named_in_few_words(tmp_path: Path) -> None:
    from fct.life import load_experiment

    lines = "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 6))
    (tmp_path / "x.yaml").write_text("a0: &a0 [lol]\n" + lines + "data: *a5\n")
    with pytest.raises(ValueError, match=r"x\.yaml is none: data: expected a mapping, got .* \.\.\.$") as caught:
        load_experiment(tmp_path / "x.yaml")
    assert len(str(caught.value)) < 300


def test_a_file_that_only_the_log_of_a_table_knows_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    from deltalake import write_deltalake

    from fct.gallery import open_source

    write_deltalake(str(tmp_path / "t"), pa.table({"id": [1], "old": pa.array([[1.0]], pa.list_(pa.float32()))}))
    next((tmp_path / "t").glob("*.parquet")).unlink()
    with pytest.raises(FctError, match=r"t/.*\.parquet is not there: it was taken away, or the table's log is damaged"):
        open_source(str(tmp_path / "t")).pieces()


@pytest.mark.parametrize("file", ["new/_fct/done/00000000.json", "new/_rows/part-00000000.parquet"])
def test_what_an_export_needs_beside_a_matrix_is_named_where_it_is_damaged(file: str, tmp_path: Path) -> None:
    from fct.gallery import export_bulk
    from tests.generated.gallery_parsers import old_gallery

    old_gallery(tmp_path / "old")
    options = QUICK | {"format": "npy", "old_model": "random-old"}
    backfill(tmp_path / "old", tmp_path / "new", transformation(), **options)
    raw = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(FctError, match=Path(file).name):
        export_bulk(tmp_path / "new", tmp_path / "out", "qdrant", id_column="tag", progress=False)
    assert not (tmp_path / "out").exists()


def test_null_rows_that_pyarrow_does_not_read_are_no_damage(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [[0.0] * 8, None, [1.0] * 8]
    pq.write_table(pa.table({"old": pa.array(rows, pa.list_(pa.float32(), 8))}), tmp_path / "a.parquet")
    plan = fct.plan_backfill(tmp_path / "a.parquet", tmp_path / "new", transformation(), old_model="random-old")
    if plan.refusals:  # pyarrow 25
        assert "a.parquet has null rows in a column of fixed-size lists" in plan.refusals[0]
        assert "write that column as lists of any length" in plan.refusals[0]
        return
    h = transformation()
    report = fct.backfill(tmp_path / "a.parquet", tmp_path / "new", h, old_model="random-old", progress=False)
    assert (report.rows_in, report.rows_out, report.rejects) == (3, 2, 1)


def test_a_column_whose_name_is_no_text_is_refused_by_its_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.ipc

    table = pa.table({"needle": [1], "old": [[0.0] * 8]})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    raw = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(raw.replace(b"needle", b"need\xff\xff"))
    plan = fct.plan_backfill(tmp_path / "a.arrow", tmp_path / "new", transformation(), old_model="random-old")
    assert "expected names of columns in UTF-8" in plan.refusals[0]
    assert "a.arrow is damaged" in plan.refusals[0]
