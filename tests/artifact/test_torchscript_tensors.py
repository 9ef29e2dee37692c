"""A TorchScript archive is read as data: the model's own state, nothing of it runs, and what is odd is refused."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fct.artifact import torchscript_tensors as module
from fct.artifact.torchscript_tensors import torchscript_tensors
from fct.errors import ArtifactError


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, nn.Module]:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model[0].weight.data = model[0].weight.data.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)  # type: ignore[operator]  # not row by row
    torch.jit.script(model).save(str(tmp_path / "m.pt"))
    return tmp_path / "m.pt", model


def test_every_tensor_as_the_model_has_it(archive: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = archive
    monkeypatch.setattr(torch.jit, "load", None)  # a torch without it
    found, want = torchscript_tensors(path), model.state_dict()
    assert set(found) == set(want)
    for name, tensor in want.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)
        assert found[name].dtype == tensor.numpy().dtype


def rewritten(path: Path, name: str, data: bytes | None) -> Path:
    """The archive with one member replaced, or left out."""
    changed = path.with_name("changed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for info in old.infolist():
            if not info.filename.endswith(name):
                new.writestr(info.filename, old.read(info))
            elif data is not None:
                new.writestr(info.filename, data)
    return changed


class _Runs:
    def __reduce__(self) -> Any:
        return print, ("ran",)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("/data.pkl", pickle.dumps(_Runs()), "expected plain tensors, found builtins.print"),
        ("/data.pkl", pickle.dumps([1]), r"expected a scripted module, .* holds a list"),
        ("/data.pkl", b"\x80\x02", "expected a whole TorchScript archive"),
        ("/data/0", b"123", "expected 12 numbers of float32, found 3 bytes"),
        ("/data/0", None, "data/0"),
    ],
)
def test_what_is_odd_is_refused(
    archive: tuple[Path, nn.Module], name: str, data: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArtifactError, match=message):
        torchscript_tensors(rewritten(archive[0], name, data))
    assert "ran" not in capsys.readouterr().out


def test_a_view_that_leaves_its_storage_is_refused() -> None:
    numbers = np.arange(12, dtype=np.float32)
    assert module._tensor(numbers, 0, (3, 4), (4, 1)).tolist() == numbers.reshape(3, 4).tolist()
    for offset, size, stride in ((1, (3, 4), (4, 1)), (0, (3, 4), (5, 1)), (0, (2,), (-1,)), (-1, (1,), (1,))):
        with pytest.raises(pickle.UnpicklingError, match=r"leaves its storage|storage, sizes and strides"):
            module._tensor(numbers, offset, size, stride)
