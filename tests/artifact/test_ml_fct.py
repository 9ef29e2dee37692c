"""Import of the published reference code's checkpoints, held against an independent float64 forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fct
from fct import ref
from fct.errors import ArtifactError


class _Norm1x1(nn.Module):
    """A 1x1 convolution, batch norm under the name ``normalizer``, ReLU: the checkpoint's building block."""

    def __init__(self, d_in: int, d_out: int, last: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(d_in, d_out, 1, bias=last)
        self.normalizer = nn.Identity() if last else nn.BatchNorm2d(d_out)
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.normalizer(self.conv(x))
        return x if self.last else torch.relu(x)


class _Published(nn.Module):
    def __init__(self, d_old: int, d_side: int, d_new: int, inner: int) -> None:
        super().__init__()
        self.p1 = nn.Sequential(_Norm1x1(d_old, 2 * d_old), _Norm1x1(2 * d_old, 2 * d_new))
        self.p2 = nn.Sequential(_Norm1x1(d_side, 2 * d_side), _Norm1x1(2 * d_side, 2 * d_new))
        self.mixer = nn.Sequential(
            _Norm1x1(4 * d_new, inner), _Norm1x1(inner, inner), _Norm1x1(inner, d_new, last=True)
        )

    def forward(self, old: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.p1(old[:, :, None, None]), self.p2(side[:, :, None, None])], dim=1)
        out: torch.Tensor = self.mixer(x)[:, :, 0, 0]
        return out


@pytest.fixture
def published() -> _Published:
    torch.manual_seed(0)
    model = _Published(12, 7, 9, 33)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # anything may stand there after the recipe's switch to eval
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 1e-4, 4.0)
    return model.eval()


def agrees(h: fct.Transformation, model: _Published) -> bool:
    rng = np.random.default_rng(1)
    old, side = rng.standard_normal((20, 12)), rng.standard_normal((20, 7))
    with torch.no_grad():
        want = model.double()(torch.from_numpy(old), torch.from_numpy(side)).numpy()
    got = ref.transform(old, side, h)
    return bool(np.abs(got - want).max() <= 1e-5 * np.abs(want).max())


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrap", [False, True])
def test_state_dict(published: _Published, tmp_path: Path, prefix: str, wrap: bool) -> None:
    state: dict[str, Any] = {prefix + name: value for name, value in published.state_dict().items()}
    torch.save({"state_dict": state} if wrap else state, tmp_path / "h.pt")
    h = fct.Transformation.from_ml_fct(tmp_path / "h.pt")
    assert (h.d_old, h.d_side, h.d_new) == (12, 7, 9)
    assert agrees(h, published)


def test_a_wrong_fold_would_be_seen(published: _Published, tmp_path: Path) -> None:
    state = {  # as if eps had been forgotten
        name: value - 1e-5 if name.endswith("running_var") else value for name, value in published.state_dict().items()
    }
    torch.save(state, tmp_path / "h.pt")
    assert not agrees(fct.Transformation.from_ml_fct(tmp_path / "h.pt"), published)


def test_torchscript_only_when_allowed(published: _Published, tmp_path: Path) -> None:
    torch.jit.script(published).save(str(tmp_path / "h.ts"))
    with pytest.raises(PermissionError, match="allow_torchscript=True"):
        fct.Transformation.from_ml_fct(tmp_path / "h.ts")
    assert agrees(fct.Transformation.from_ml_fct(tmp_path / "h.ts", allow_torchscript=True), published)


class _Transformed(nn.Module):
    """What the published code saves in the end: the models that feed h, and h, in one."""

    def __init__(self, h: _Published) -> None:
        super().__init__()
        self.old_model, self.side_info_model = nn.Linear(3, 12), nn.Linear(3, 7)
        self.transformation = h

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.transformation(self.old_model(x), self.side_info_model(x))
        return out


@pytest.mark.parametrize("script", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_h_is_taken_out_of_a_transformed_model(
    published: _Published, tmp_path: Path, script: bool, prefix: str
) -> None:
    whole = _Transformed(published).eval()
    if script:
        torch.jit.script(whole).save(str(tmp_path / "whole_transformed.pt"))
    else:
        state = {prefix + name: value for name, value in whole.state_dict().items()}
        torch.save(state, tmp_path / "whole_transformed.pt")
    h = fct.Transformation.from_ml_fct(tmp_path / "whole_transformed.pt", allow_torchscript=script)
    assert agrees(h, published)


def test_a_transformed_model_without_all_of_h_is_named(published: _Published, tmp_path: Path) -> None:
    state = _Transformed(published).state_dict()
    del state["transformation.mixer.2.conv.bias"]
    torch.save(state, tmp_path / "h.pt")
    with pytest.raises(ArtifactError, match=r"missing mixer\.2\.conv\.bias"):
        fct.Transformation.from_ml_fct(tmp_path / "h.pt")


class _Malicious:
    def __reduce__(self) -> Any:
        return (print, ("ran",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("p2.1.conv.weight"), r"missing p2\.1\.conv\.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "surplus extra"),
        (lambda s: s.update({"mixer.2.conv.bias": torch.zeros(4)}), r"bias: expected \(9,\)"),
        (lambda s: s.update({"p1.0.conv.weight": torch.zeros(24, 12, 3, 3)}), r"shape \(out, in, 1, 1\)"),
        (lambda s: s.update({"p1.1.conv.weight": torch.zeros(18, 5, 1, 1)}), r"old\.1: expected 24 inputs"),
        (lambda s: s.update({"p1.0.normalizer.bias": torch.full((24,), torch.nan)}), "finite values"),
    ],
)
def test_wrong_state_dicts_are_named(published: _Published, tmp_path: Path, change: Any, message: str) -> None:
    state = dict(published.state_dict())
    change(state)
    torch.save(state, tmp_path / "h.pt")
    with pytest.raises(ArtifactError, match=message):
        fct.Transformation.from_ml_fct(tmp_path / "h.pt")


def test_foreign_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="found no file"):
        fct.Transformation.from_ml_fct(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ArtifactError, match=r"expected a state dict saved with torch\.save"):
        fct.Transformation.from_ml_fct(tmp_path / "text.pt")
    torch.save({"a": _Malicious()}, tmp_path / "bad.pt")
    with pytest.raises(ArtifactError):
        fct.Transformation.from_ml_fct(tmp_path / "bad.pt")
    assert "ran" not in capsys.readouterr().out
