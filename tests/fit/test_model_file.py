"""Embedding models on disk, and `fct train-side-info`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fct.cli import main
from fct.errors import ArtifactError
from fct.fit.images import embed
from fct.fit.model_file import load_model


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    return int(stop.value.code or 0)


def test_train_side_info_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 14, 14), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    model, vectors = tmp_path / "side.safetensors", tmp_path / "side.npy"
    args = ["train-side-info", str(tmp_path / "images.npy"), "--out", str(model), "--vectors", str(vectors)]
    args += ["--dim", "6", "--epochs", "1", "--batch-size", "10", "--backbone", "small_cnn", "--device", "cpu"]
    assert run(*args) == 0
    np.testing.assert_allclose(embed(load_model(model), images), np.load(vectors), rtol=1e-4, atol=1e-5)
    assert run(*args) == 1
    assert "--out:" in " ".join(capsys.readouterr().err.split())
    assert run(*args, "--overwrite", "--labels", str(vectors)) == 1
    assert "learns without labels" in " ".join(capsys.readouterr().err.split())
    model.write_bytes(model.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match=r"model: expected a whole embedding model"):
        load_model(model)


def test_train_side_info_from_a_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "images" / name)
    for method in ("simclr", "supervised"):
        args = ["train-side-info", str(tmp_path / "images"), "--out", str(tmp_path / f"{method}.safetensors")]
        args += ["--vectors", str(tmp_path / f"{method}.npy"), "--method", method, "--size", "16", "--dim", "5"]
        assert run(*args, "--epochs", "1", "--workers", "0", "--device", "cpu") == 0
        assert np.load(tmp_path / f"{method}.npy").shape == (4, 5)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(2)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(ArtifactError, match=r"expected an embedding model that fct saved"):
        load_model(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model: expected a .safetensors file"):
        load_model(tmp_path / "none.safetensors")
