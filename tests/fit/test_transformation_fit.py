"""fit_transformation: learns, repeats itself, resumes to the same bits, reads mapped files, refuses bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
import fct.fit.pairs as pairs_module
from fct import ref
from fct.errors import ArtifactError
from fct.fit.pair_training import EpochReport, PairTraining, scalings_of
from fct.fit.recipes import FitConfig, paper_config

QUICK = FitConfig(inner=32, epochs=4, batch_size=64, lr=4e-3, standardise=True, average=0.9)


@pytest.fixture
def pairs(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    old, side = rng.standard_normal((2, 900, 10)).astype(np.float32)
    side = side[:, :6].copy()
    new = np.concatenate([np.tanh(old[:, :5] + side[:, :5]), old[:, 5:] * 2 + 3], axis=1)
    return old, side, new.astype(np.float32)


def same(a: fct.Transformation, b: fct.Transformation) -> bool:
    return a.fingerprint == b.fingerprint


def test_learns_and_reports(pairs: tuple[Any, Any, Any]) -> None:
    h = fct.fit_transformation(*pairs, config=replace(QUICK, epochs=30), progress=False)
    assert h.info["validation"]["r2"] > 0.9
    old, side, new = pairs
    rows = fct.transform_batch(old, side, h, precision="fp32")
    assert ((rows - new) ** 2).mean() < 0.1 * new.var(axis=0).mean()
    assert (h.d_old, h.d_side, h.d_new) == (10, 6, 10)
    assert h.uses_side_info
    assert h.info["validation_pairs"] == 45
    # The figure in the artifact is the exported h's own, batch norm and scaling folded in.
    apart = tuple(x[:50] for x in pairs)
    held = fct.fit_transformation(*(x[50:] for x in pairs), validation=apart, config=QUICK, progress=False)
    error = ((ref.transform(apart[0], apart[1], held) - apart[2]) ** 2).mean()
    assert held.info["validation"]["mse"] == pytest.approx(error, rel=1e-4)


def test_same_seed_same_h_other_seed_other_h(pairs: tuple[Any, Any, Any]) -> None:
    first, second = (fct.fit_transformation(*pairs, config=QUICK, progress=False) for _ in range(2))
    assert same(first, second)
    assert not same(first, fct.fit_transformation(*pairs, config=QUICK, seed=1, progress=False))


def test_without_side_information(pairs: tuple[Any, Any, Any]) -> None:
    old, _, new = pairs
    h = fct.fit_transformation(old, None, new, config=QUICK, progress=False)
    assert not h.uses_side_info
    assert fct.transform_batch(old, None, h).shape == new.shape
    with pytest.raises(ValueError, match="side_info: expected None"):
        fct.transform_batch(old, old, h)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_interrupted_and_resumed_is_the_same_h(pairs: tuple[Any, Any, Any], tmp_path: Path, stop_after: int) -> None:
    whole = fct.fit_transformation(*pairs, config=QUICK, progress=False)
    file = tmp_path / "fit.safetensors"

    def stop(report: EpochReport) -> None:
        if report.epoch == stop_after + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fct.fit_transformation(
            *pairs, config=QUICK, progress=False, checkpoint=file, checkpoint_seconds=0, on_epoch=stop
        )
    assert file.exists()
    epochs: list[int] = []
    resumed = fct.fit_transformation(
        *pairs, config=QUICK, progress=False, checkpoint=file, on_epoch=lambda r: epochs.append(r.epoch)
    )
    assert epochs == list(range(stop_after + 1, QUICK.epochs + 1))
    assert same(whole, resumed)
    assert not file.exists()


def test_checkpoint_of_another_fit_is_refused(pairs: tuple[Any, Any, Any], tmp_path: Path) -> None:
    file = tmp_path / "fit.safetensors"

    def stop(report: EpochReport) -> None:
        if report.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fct.fit_transformation(
            *pairs, config=QUICK, progress=False, checkpoint=file, checkpoint_seconds=0, on_epoch=stop
        )
    with pytest.raises(ArtifactError, match="belongs to another fit"):
        fct.fit_transformation(*pairs, config=QUICK, seed=5, progress=False, checkpoint=file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"checkpoint: expected a whole \.safetensors file"):
        fct.fit_transformation(*pairs, config=QUICK, progress=False, checkpoint=file)


def test_mapped_pairs_that_do_not_fit_in_memory(
    pairs: tuple[Any, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for i, array in enumerate(pairs):
        np.save(tmp_path / f"{i}.npy", array)
        files.append(np.load(tmp_path / f"{i}.npy", mmap_mode="r"))
    monkeypatch.setattr(pairs_module, "IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(pairs_module, "_RUN", 8)
    monkeypatch.setattr(pairs_module, "_POOL_ROWS", 200)
    checked = pairs_module.check_pairs(*files)
    order = np.concatenate(list(checked.order(0, 0)))
    assert sorted(order) == list(range(900))
    assert list(order[:200]) != sorted(order[:200])
    h = fct.fit_transformation(*files, config=replace(QUICK, epochs=20), progress=False)
    assert h.info["validation"]["r2"] > 0.7


def test_standardising_makes_the_units_irrelevant(pairs: tuple[Any, Any, Any]) -> None:
    old, side, new = pairs
    plain = fct.fit_transformation(old, side, new, config=QUICK, progress=False)
    scaled = fct.fit_transformation(old * 0.05, side * 20, new * 0.05, config=QUICK, progress=False)
    assert scaled.info["validation"]["r2"] == pytest.approx(plain.info["validation"]["r2"], abs=0.02)


def test_normalised_rows_make_a_normalising_h(pairs: tuple[Any, Any, Any]) -> None:
    old, side, new = pairs
    unit = new / np.linalg.norm(new, axis=1, keepdims=True)
    h = fct.fit_transformation(old, side, unit, config=QUICK, progress=False)
    assert h.normalise
    assert h.new_space.normalised
    np.testing.assert_allclose(np.linalg.norm(fct.transform_batch(old, side, h), axis=1), 1, atol=1e-2)


def test_paper_recipe_is_the_papers() -> None:
    paper = paper_config()
    assert (paper.inner, paper.epochs, paper.batch_size, paper.lr, paper.weight_decay) == (2048, 80, 1024, 5e-4, 3e-5)
    assert (paper.warmup_epochs, paper.freeze_norm_at, paper.standardise, paper.average) == (5, 0.5, False, 0)
    assert (paper.branch, paper.mixer_blocks, paper.skip, paper.mixup) == (0, 2, "none", 0)


def test_norm_is_frozen_in_the_second_half(pairs: tuple[Any, Any, Any]) -> None:
    import torch

    checked = pairs_module.check_pairs(*pairs)
    train, held = pairs_module.split_pairs(checked, 0.1, 0)
    config = replace(paper_config(), inner=16, epochs=4)
    training = PairTraining(train, held, config, 0, torch.device("cpu"), scalings_of(train, False, 0))
    means, module = [], training.module
    norm: Any = module.mixer[0].norm
    for _ in range(4):
        training.one_epoch()
        means.append(norm.running_mean.clone())
    assert not torch.equal(means[0], means[1])
    assert torch.equal(means[1], means[2])
    assert torch.equal(means[2], means[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side_info": np.zeros((3, 6), np.float32)}, r"side_info: expected \(900, d\) to match old, got \(3, 6\)"),
        ({"new": np.zeros((900,), np.float32)}, r"new: expected \(900, d\), rows of embeddings, got shape \(900,\)"),
        ({"new": np.full((900, 4), np.nan, np.float32)}, "new: expected finite values"),
        ({"old": np.zeros((0, 4), np.float32)}, r"old: expected at least one row"),
        ({"old": np.zeros((900, 4))}, "old: expected dtype float32, .* got float64"),
        ({"validation": 1.5}, "validation: expected a share between 0 and 1"),
        ({"validation": "x"}, "validation: expected a share or a tuple"),
        ({"config": "good"}, "config: expected 'auto', 'best', 'paper' or a"),
        ({"unpaired": (np.zeros((3, 10), np.float32), None)}, "unpaired: expected None unless config='best'"),
        ({"config": "best", "unpaired": 3}, r"unpaired: expected a tuple \(old, side_info\), got int"),
        (
            {"config": "best", "unpaired": (np.zeros((3, 10), np.float32), None)},
            "unpaired: expected side_info in both or in neither",
        ),
        ({"seconds": 0}, "seconds: expected a positive number or None, got 0"),
        ({"device": "abacus"}, "device: expected 'auto', 'cpu' or 'cuda', got 'abacus'"),
        ({"new_space": fct.EmbeddingSpace("m", 3)}, "new_space: expected dim 10 to match the rows"),
    ],
)
def test_bad_input_is_named(pairs: tuple[Any, Any, Any], change: dict[str, Any], message: str) -> None:
    arguments = (
        dict(zip(("old", "side_info", "new"), pairs, strict=True)) | {"config": QUICK, "progress": False} | change
    )
    with pytest.raises(ValueError, match=message):
        fct.fit_transformation(**arguments)


def test_config_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="epochs: expected a positive int, got 0"):
        FitConfig(epochs=0)
    with pytest.raises(ValueError, match="lr: expected a positive number, got -1"):
        FitConfig(lr=-1)
    with pytest.raises(ValueError, match="lr: expected a positive number, got 'fast'"):
        FitConfig(lr="fast")  # type: ignore[arg-type]  # refused
