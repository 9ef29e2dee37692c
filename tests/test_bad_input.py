"""Bad input is refused with a message that names the argument, what was expected and what came."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fct
from fct.errors import ArtifactError
from fct.files import atomic_path, refuse_existing, write_bytes

H = fct.Transformation.random(8, 4, 16, inner=32)
PLAIN = fct.Transformation.random(8, 8, 16, inner=32, side_info=False)


def rows(n: int, d: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(n * 1000 + d).standard_normal((n, d)).astype(dtype)


def with_value(value: float, n: int = 6, d: int = 8) -> Any:
    out = rows(n, d)
    out[3, d - 1] = value
    return out


LABELS = np.arange(6) % 2
CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # wrong rank
    "transform: rank": (
        lambda: fct.transform_batch(rows(6, 8)[0], rows(6, 4), H),
        ValueError,
        "old: expected (n, 8), rows of embeddings, got shape (8,)",
    ),
    "transform: rank 3": (
        lambda: fct.transform_batch(rows(6, 8), rows(6, 4)[None], H),
        ValueError,
        "side_info: expected (6, 4), rows of embeddings, got shape (1, 6, 4)",
    ),
    "topk: rank": (
        lambda: fct.topk(rows(2, 8)[0], rows(6, 8), 1),
        ValueError,
        "queries: expected (n, 8), rows of embeddings, got shape (8,)",
    ),
    "fit: rank": (
        lambda: fct.fit_transformation(rows(6, 8)[0], None, rows(6, 8), progress=False),
        ValueError,
        "old: expected (n, d), rows of embeddings, got shape (8,)",
    ),
    # mismatched rows and dims, an h for other dims
    "transform: rows": (
        lambda: fct.transform_batch(rows(6, 8), rows(5, 4), H),
        ValueError,
        "side_info: expected (6, 4) to match old, got (5, 4)",
    ),
    "transform: h for other dims": (
        lambda: fct.transform_batch(rows(6, 9), rows(6, 4), H),
        ValueError,
        "old: expected (n, 8) to match the transformation, got (6, 9)",
    ),
    "transform: side for other dims": (
        lambda: fct.transform_batch(rows(6, 8), rows(6, 64), H),
        ValueError,
        "side_info: expected (6, 4) to match the transformation, got (6, 64)",
    ),
    "transform: side missing": (
        lambda: fct.transform_batch(rows(6, 8), None, H),
        ValueError,
        "side_info: expected (6, 4) of 'random-side', which this transformation was fitted with, got None",
    ),
    "transform: side too much": (
        lambda: fct.transform_batch(rows(6, 8), rows(6, 8), PLAIN),
        ValueError,
        "side_info: expected None, since this transformation was fitted without, got an array",
    ),
    "transform: no h": (
        lambda: fct.transform_batch(rows(6, 8), rows(6, 4), "h.safetensors"),  # type: ignore[arg-type]
        TypeError,
        "transformation: expected an fct.Transformation, got str",
    ),
    "fit: rows": (
        lambda: fct.fit_transformation(rows(6, 8), rows(6, 4), rows(7, 5), progress=False),
        ValueError,
        "new: expected (6, d) to match old, got (7, 5)",
    ),
    "topk: dims": (
        lambda: fct.topk(rows(2, 9), rows(6, 8), 1),
        ValueError,
        "queries: expected (n, 8) to match the gallery, got (2, 9)",
    ),
    "evaluate: dims": (
        lambda: fct.evaluate(rows(6, 9), rows(6, 8), LABELS),
        ValueError,
        "queries: expected (n, 8) to match the gallery, got (6, 9)",
    ),
    # non-finite values
    "transform: nan": (
        lambda: fct.transform_batch(with_value(float("nan")), rows(6, 4), H),
        ValueError,
        "old: expected finite values, got NaN or infinity in row 3",
    ),
    "transform: -inf in side": (
        lambda: fct.transform_batch(rows(6, 8), with_value(float("-inf"), 6, 4), H),
        ValueError,
        "side_info: expected finite values, got NaN or infinity in row 3",
    ),
    "fit: nan": (
        lambda: fct.fit_transformation(rows(6, 8), None, with_value(float("nan"), 6, 5), progress=False),
        ValueError,
        "new: expected finite values, got NaN or infinity in row 3",
    ),
    "topk: inf": (
        lambda: fct.topk(rows(2, 8), with_value(float("inf")), 1),
        ValueError,
        "gallery: expected finite values, got NaN or infinity in row 3",
    ),
    "evaluate: bfloat16 nan": (
        lambda: fct.evaluate(torch.tensor(with_value(float("nan"))).bfloat16(), torch.zeros(6, 8).bfloat16(), LABELS),
        ValueError,
        "queries: expected finite values, got NaN or infinity in row 3",
    ),
    # empty arrays
    "fit: empty": (
        lambda: fct.fit_transformation(rows(0, 8), None, rows(0, 5), progress=False),
        ValueError,
        "old: expected at least one row, got (0, 8)",
    ),
    "transform: no dimensions": (
        lambda: fct.transform_batch(rows(6, 0), rows(6, 4), H),
        ValueError,
        "old: expected (n, 8) to match the transformation, got (6, 0)",
    ),
    "evaluate: empty gallery": (
        lambda: fct.evaluate(rows(6, 8), rows(0, 8), LABELS, []),
        ValueError,
        "gallery: expected at least one row, got (0, 8)",
    ),
    # unknown metric, dtype, precision, configuration
    "topk: metric": (
        lambda: fct.topk(rows(2, 8), rows(6, 8), 1, metric="l3"),
        ValueError,
        "metric: expected one of l2, ip, cosine, got 'l3'",
    ),
    "evaluate: metric": (
        lambda: fct.evaluate(rows(6, 8), rows(6, 8), LABELS, metric="euclid"),
        ValueError,
        "metric: expected one of l2, ip, cosine, got 'euclid'",
    ),
    "transform: dtype": (
        lambda: fct.transform_batch(rows(6, 8, np.float64), rows(6, 4), H),
        ValueError,
        "old: expected dtype float32, float16, bfloat16 or scaled int8, got float64; convert with .astype('float32')",
    ),
    "transform: bare int8": (
        lambda: fct.transform_batch(np.ones((6, 8), np.int8), rows(6, 4), H),
        ValueError,
        "old: expected int8 rows with a scale, got bare int8; wrap them in fct.ScaledInt8(values, scale)",
    ),
    "transform: a list": (
        lambda: fct.transform_batch([[1.0] * 8], rows(1, 4), H),
        TypeError,
        "old: expected a numpy array, a torch tensor or a DLPack object, got list",
    ),
    "transform: precision": (
        lambda: fct.transform_batch(rows(6, 8), rows(6, 4), H, precision="fp8"),
        ValueError,
        "precision: expected one of auto, fp32, bf16, int8, got 'fp8'",
    ),
    "transform: backend": (
        lambda: fct.transform_batch(rows(6, 8), rows(6, 4), H, backend="abacus"),
        ValueError,
        "got 'abacus'",
    ),
    "fit: config": (
        lambda: fct.fit_transformation(rows(6, 8), None, rows(6, 5), config="best", progress=False),
        ValueError,
        "config: expected 'auto', 'paper' or a fct.training.config.FitConfig, got 'best'",
    ),
    # k > n
    "topk: k": (
        lambda: fct.topk(rows(2, 8), rows(6, 8), 7),
        ValueError,
        "k: expected 1 to 6, the rows of the gallery, got 7",
    ),
    "topk: k of the others": (
        lambda: fct.topk(rows(6, 8), rows(6, 8), 6, same_items=True),
        ValueError,
        "k: expected 1 to 5, the rows of the gallery, without the query's own, got 6",
    ),
    "topk: k 0": (
        lambda: fct.topk(rows(2, 8), rows(6, 8), 0),
        ValueError,
        "k: expected 1 to 6, the rows of the gallery, got 0",
    ),
    # labels of another length
    "evaluate: labels": (
        lambda: fct.evaluate(rows(6, 8), rows(6, 8), LABELS[:5]),
        ValueError,
        "query_labels: expected (6,), one label per row, got shape (5,)",
    ),
    "evaluate: gallery labels": (
        lambda: fct.evaluate(rows(6, 8), rows(4, 8), LABELS, LABELS),
        ValueError,
        "gallery_labels: expected (4,), one label per row, got shape (6,)",
    ),
    "evaluate: labels of floats": (
        lambda: fct.evaluate(rows(6, 8), rows(6, 8), LABELS / 2),
        ValueError,
        "query_labels: expected integer or string labels, got dtype float64",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_a_message(case: str) -> None:
    call, kind, message = CASES[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_no_rows_are_fine_where_nothing_is_learned() -> None:
    assert fct.transform_batch(rows(0, 8), rows(0, 4), H).shape == (0, 16)
    assert fct.topk(rows(0, 8), rows(6, 8), 2).indices.shape == (0, 2)


# ---- files ----


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return H.save(tmp_path / "h.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors(artifact: Path, keep: int) -> None:
    artifact.write_bytes(artifact.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"transformation: expected a whole \.safetensors file, .*h\.safetensors"):
        fct.Transformation.load(artifact)


def test_foreign_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3, np.float32)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(ArtifactError, match=r"is a \.safetensors file but not one of fct's"):
        fct.Transformation.load(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04 this is no safetensors file at all")
    with pytest.raises(ArtifactError, match=r"expected a whole \.safetensors file"):
        fct.Transformation.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"expected a \.safetensors file, found none at"):
        fct.Transformation.load(tmp_path / "none.safetensors")


def changed_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    inner = json.loads(header["__metadata__"]["fct"])
    change(inner)
    header["__metadata__"]["fct"] = json.dumps(inner)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def test_an_artifact_of_another_version(artifact: Path) -> None:
    changed_header(artifact, lambda h: h.update(version=99))
    with pytest.raises(ArtifactError, match=r"expected fct-transformation version 1, .* version 99"):
        fct.Transformation.load(artifact)


def test_an_artifact_without_its_plan(artifact: Path) -> None:
    changed_header(artifact, lambda h: h.pop("plan"))
    with pytest.raises(ArtifactError, match=r"is damaged: KeyError\('plan'\)"):
        fct.Transformation.load(artifact)


def test_a_changed_weight_is_seen(artifact: Path) -> None:
    data = bytearray(artifact.read_bytes())
    data[-3] ^= 1
    artifact.write_bytes(data)
    with pytest.raises(ArtifactError, match="do not match its fingerprint"):
        fct.Transformation.load(artifact)


# ---- writing ----


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    assert refuse_existing(tmp_path / "full", overwrite=False) == tmp_path / "full"
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match=r"--out: .*full exists; choose another place or pass --overwrite"):
        refuse_existing(tmp_path / "full", overwrite=False, name="--out")
    assert refuse_existing(tmp_path / "full", overwrite=True) == tmp_path / "full"


def test_an_error_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    write_bytes(target, b"old")

    def fails() -> None:
        with atomic_path(target) as part:
            part.write_bytes(b"half of the n")
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        fails()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_leaves_the_old_file(artifact: Path) -> None:
    """The kernel itself refuses to let the file grow, as on a full disk."""
    before = artifact.read_bytes()
    code = f"""
import resource, signal, fct
h = fct.Transformation.random(8, 4, 16, inner=64)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
h.save({str(artifact)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "in the middle of writing; what was there before is untouched" in done.stderr.splitlines()[-1]
    assert str(artifact) in done.stderr.splitlines()[-1]
    assert artifact.read_bytes() == before
    assert list(artifact.parent.iterdir()) == [artifact]
