"""``fct plan``, ``fct backfill`` and ``fct verify`` as a user runs them: exit codes and what they say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fct
from tests.backfilling.conftest import D_NEW, D_OLD, D_SIDE
from tests.command_line import run_here

Make = Callable[..., Path]


def run(*arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr), lines joined."""
    code, out, err = run_here(*arguments)
    return code, " ".join(out.split()), " ".join(err.split())


def test_from_plan_to_verify(gallery: Make, h: fct.Transformation, tmp_path: Path, rng: np.random.Generator) -> None:
    source, new, path = gallery(), tmp_path / "new", tmp_path / "h.safetensors"
    h.save(path)
    old, side = (rng.standard_normal((50, d), dtype=np.float32) for d in (D_OLD, D_SIDE))
    np.savez(tmp_path / "bad.npz", old=old, side=side, new=rng.standard_normal((50, D_NEW), dtype=np.float32))
    gate = ("--pairs", tmp_path / "bad.npz", "--min-recall", 0.9)

    scores = fct.plan_backfill(source, new, h, measure_seconds=0.01).scores
    assert scores is not None
    inside, outside = round(scores.old[3], 3), round(2 * scores.old[-1], 3)
    code, out, _ = run("plan", source, new, "-t", path, "--threshold", inside, "--price-per-hour", 2)
    assert code == 0
    maps = f"an old threshold of {inside:g} maps to about"
    for words in ("3,000 rows in 2 shards", "binds", "reading", "per billion rows", maps):
        assert words in out
    code, out, _ = run("plan", source, new, "-t", path, "--threshold", outside)
    assert (code, f"an old threshold of {outside:g} is outside these old scores" in out) == (0, True)
    code, out, _ = run("plan", source, new, "-t", path, *gate)
    assert (code, "refused: quality gate: recall@10 is" in out) == (3, True)
    code, out, _ = run("backfill", source, new, "-t", path, *gate)
    assert (code, "below 0.9" in out, new.exists()) == (3, True, False)
    code, _, err = run("backfill", source, new)
    assert (code, "--transformation" in err) == (2, True)
    code, _, err = run("backfill", source, new, "-t", path, "--vector-column", "vec")
    assert (code, "vector_column: expected a column of the gallery" in err) == (1, True)
    code, out, err = run("backfill", source, new, "-t", path, "--no-progress")
    assert (code, err) == (0, "")
    assert "3,000 rows in = 3,000 out + 0 rejected; 2 shards done, 0 kept" in out
    code, out, _ = run("verify", new)
    assert (code, out.endswith("ok as far as it was checked")) == (0, True)
    assert "name it with --source (source=), or confirm it with --trust-journal" in out
    code, out, _ = run("verify", new, "--source", source, "--expect-rows", 3000)
    assert (code, out.endswith("ok")) == (0, True)
    assert "3,000 rows compared with the source's: id, tag" in out
    code, out, _ = run("verify", new, "--trust-journal", "--deep", "--expect-rows", 3001)
    assert (code, "expected 3,001 rows by your own count, the source had 3,000" in out) == (1, True)
    file = sorted(new.glob("*.parquet"))[0]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    code, out, _ = run("verify", new)
    assert (code, "problem: shard 0 part-00000000.parquet does not match its checksum" in out) == (1, True)


def test_the_plan_says_whether_the_upload_is_in_it(gallery: Make, h: fct.Transformation, tmp_path: Path) -> None:
    source, path = gallery(), tmp_path / "h.safetensors"
    h.save(path)
    left_out = "The upload is not in these figures"
    code, out, _ = run("plan", source, "memory://new", "-t", path)
    assert (code, left_out in out, "--upload-mb-per-s" in out) == (0, True, True)
    code, out, _ = run("plan", source, "memory://new", "-t", path, "--upload-mb-per-s", 0.01)
    assert (code, "uploading binds" in out, "rows/s at the 0.01 MB/s you stated" in out, left_out in out) == (
        0, True, True, False,
    )  # fmt: skip
    code, out, _ = run("plan", source, tmp_path / "new", "-t", path)
    assert (code, "upload" in out) == (0, False)
    code, _, err = run("plan", source, "s4://bucket/new", "-t", path)
    assert (code, "destination: expected a path or a URL of" in err) == (1, True)
    code, _, err = run("plan", source, "memory://new", "-t", path, "--upload-mb-per-s", 0)
    assert (code, "upload_mb_per_s: expected a positive number" in err) == (1, True)


def test_an_8_bit_gallery_and_its_scale(tmp_path: Path, rng: np.random.Generator) -> None:
    codes = rng.integers(-128, 128, (300, D_OLD)).astype(np.int8)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/a.i8bin").write_bytes(np.array(codes.shape, "<u4").tobytes() + codes.tobytes())
    h, path = fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=64, side_info=False), tmp_path / "h.safetensors"
    h.save(path)
    code, _, err = run(
        "backfill", tmp_path / "old", tmp_path / "new", "-t", path, "--old-model", "random-old", "--scale", 0.03,
        "--precision", "fp32", "--no-progress",
    )  # fmt: skip
    assert (code, err) == (0, "")
    (file,) = (tmp_path / "new").glob("*.fbin")
    got = np.fromfile(file, np.float32, offset=8).reshape(-1, D_NEW)
    want = fct.transform_batch(codes.astype(np.float32) * np.float32(0.03), None, h, precision="fp32")
    np.testing.assert_array_equal(got, want)


def test_rejects_have_their_exit_code(gallery: Make, h: fct.Transformation, tmp_path: Path) -> None:
    source, path = gallery(bad=(4, 9)), tmp_path / "h.safetensors"
    h.save(path)
    code, _, err = run("backfill", source, tmp_path / "new", "-t", path, "--no-progress", "--max-rejects", 1)
    assert (code, "max_rejects: expected at most 1 rejected rows, got 2" in err) == (1, True)
    line = ["-m", "fct", "backfill", source, tmp_path / "new", "-t", path, "--no-progress"]  # the code a shell sees
    done = subprocess.run([sys.executable, *map(str, line)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (4, "")
    out = " ".join(done.stdout.split())
    assert ("2,998 out + 2 rejected" in out, "rejected rows: " in out) == (True, True)


def test_an_index_that_can_not_be_built_is_refused_before_the_work(
    gallery: Make, h: fct.Transformation, tmp_path: Path
) -> None:
    pytest.importorskip("faiss")
    source, path, new = gallery(), tmp_path / "h.safetensors", tmp_path / "new"
    h.save(path)
    code, _, err = run("backfill", source, new, "-t", path, "--no-progress", "--faiss", "IVF4,Round")
    assert (code, "faiss: expected a description FAISS knows" in err, new.exists()) == (1, True, False)
    code, _, err = run("backfill", source, "memory://new", "-t", path, "--no-progress", "--faiss", "Flat")
    assert (code, "out: expected a file of this machine" in err) == (1, True)
    code, out, _ = run("backfill", source, new, "-t", path, "--no-progress", "--faiss", "IVF4,PQ2x4")
    assert (code, (new / "_fct/index.faiss").exists(), "index: " in out) == (0, True, True)


def test_transform_takes_what_backfill_takes(tmp_path: Path, rng: np.random.Generator) -> None:
    h, path = fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=64, side_info=False), tmp_path / "h.safetensors"
    h.save(path)
    old, job = tmp_path / "old.npy", ("-t", path, "--old-model", "random-old", "--precision", "fp32")
    rows = rng.standard_normal((50, D_OLD), dtype=np.float32)
    np.save(old, rows)
    for number, more in enumerate((("--backend", "ref"), ("--backend", "torch", "--threads", 1), ("--device", "cpu"))):
        code, _, err = run("transform", old, tmp_path / f"{number}.npy", *job, *more)
        assert (code, err) == (0, "")
        want = fct.transform_batch(rows, None, h, precision="fp32")
        np.testing.assert_allclose(np.load(tmp_path / f"{number}.npy"), want, rtol=1e-4, atol=1e-4)
    for command, out in (("transform", "x.npy"), ("plan", "new"), ("backfill", "new")):
        code, said, err = run(command, old, tmp_path / out, *job, "--backend", "abacus")
        assert (code, "backend: expected one of cpu, cuda, triton, torch, ref, got 'abacus'" in said + err) == (1, True)
        code, said, err = run(command, old, tmp_path / out, *job, "--backend", "triton", "--device", "cpu")
        assert (code, "no backend can run this transformation on cpu: triton" in said + err) == (1, True)
    code, _, err = run("transform", old, tmp_path / "half.npy", *job, "--dtype", "float16", "--scale", 2)
    assert (code, np.load(tmp_path / "half.npy").dtype) == (0, np.float16), err
    want = fct.transform_batch(2 * rows, None, h, precision="fp32")
    np.testing.assert_allclose(np.load(tmp_path / "half.npy"), want, rtol=2e-3, atol=2e-3)
    code, _, err = run("transform", old, "s3://bucket/new.npy", *job)
    assert (code, "out: expected a path of this machine, got s3://bucket/new.npy" in err) == (1, True)
