"""Backbones, supervised training, BCT and side-information on tiny images that can be told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fct
from fct.errors import ArtifactError
from fct.fit.backbones import backbone, embedding_model
from fct.fit.bct import old_classifier_for, train_bct
from fct.fit.images import Images, augment, embed
from fct.fit.loop import TrainConfig
from fct.fit.side_info import METHODS, barlow_twins_loss
from fct.fit.supervised import train_supervised

QUICK = TrainConfig(epochs=3, batch_size=32, lr=5e-3)


@pytest.fixture(scope="module")
def images() -> tuple[Any, Any]:
    """Four classes of 12 x 12 images: bright quarters, with noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 256)
    x = rng.integers(0, 60, (256, 12, 12))
    for i, label in enumerate(labels):
        x[i, (label // 2) * 6 : (label // 2) * 6 + 6, (label % 2) * 6 : (label % 2) * 6 + 6] += 150
    return x.astype(np.uint8), labels


def accuracy(vectors: Any, labels: Any) -> float:
    """Share of rows whose nearest other row has their label."""
    hit = fct.topk(vectors, vectors, 2).indices[:, 1]
    return float((labels[hit] == labels).mean())


@pytest.mark.parametrize(
    "name", ["small_cnn", "small_resnet", "resnet18", "mobilenet_v3_small", "timm:resnet10t", nn.Flatten()]
)
def test_backbones_by_name(name: Any) -> None:
    model = embedding_model(name, dim=5, image_shape=(1, 32, 32))
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_torchvision_features(name: str) -> None:
    assert backbone(name)[1] == {"resnet50": 2048, "mobilenet_v2": 1280}[name]


@pytest.mark.parametrize(("name", "message"), [("resnet19", "a torchvision"), ("timm:nope", "that timm has")])
def test_unknown_backbones_are_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbone(name)


def test_initialisation_by_seed() -> None:
    a, b, c = (embedding_model(dim=4, image_shape=(1, 12, 12), seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("loss", [pytest.param("softmax", marks=pytest.mark.slow), "arcface"])
def test_supervised_learns_and_repeats(images: tuple[Any, Any], loss: str) -> None:
    x, y = images
    runs = [train_supervised(x, y, classes=4, dim=16, loss=loss, config=QUICK, progress=False)[0] for _ in range(2)]
    first, second = (embed(model, x) for model in runs)
    assert accuracy(first, y) > 0.95
    np.testing.assert_array_equal(first, second)


def test_dataset_and_array_give_the_same_batches(images: tuple[Any, Any]) -> None:
    from PIL import Image

    x, y = images
    pairs = [(Image.fromarray(image), int(label)) for image, label in zip(x, y, strict=True)]
    for (a, la), (b, lb) in zip(
        Images(x, y).batches(50, seed=(1, 2)), Images(pairs).batches(50, seed=(1, 2)), strict=True
    ):
        assert torch.equal(a, b)
        assert la is not None
        assert lb is not None
        assert torch.equal(la, lb)


def test_augmentation_draws_for_each_image() -> None:
    x = torch.rand(1, 1, 20, 20).expand(16, 1, 20, 20)
    torch.manual_seed(0)
    out = augment(x, crop=0.6, colour=0.4)
    assert out.shape == x.shape
    assert len({tuple(image.flatten().tolist()) for image in out}) == 16
    assert torch.allclose(augment(x, crop=1.0, colour=0.0, flip=False), x, atol=1e-5)


@pytest.mark.grid(5)
@pytest.mark.parametrize("method", METHODS)
def test_side_information_sees_what_is_there(images: tuple[Any, Any], method: str) -> None:
    x, y = images
    labels = y % 2 if method == "supervised" else None
    model = fct.train_side_info(
        x, method=method, dim=16, labels=labels, epochs=6, batch_size=64, lr=5e-3, progress=False, backbone="small_cnn"
    )
    vectors = embed(model, x)
    assert vectors.shape == (256, 16)
    assert vectors.std(axis=0).max() > 1e-3  # not collapsed to one point
    chance = 0.5 if method == "supervised" else 0.25
    assert accuracy(vectors, labels if labels is not None else y) > chance + 0.15


def test_barlow_twins_loss_against_the_formula(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((2, 30, 5))
    za, zb = ((v - v.mean(0)) / v.std(0, ddof=1) for v in (a, b))
    c = za.T @ zb / 30
    want = (((1 - np.diag(c)) ** 2).sum() + 5e-3 * (c[~np.eye(5, dtype=bool)] ** 2).sum()) / 5
    assert float(barlow_twins_loss(torch.from_numpy(a), torch.from_numpy(b))) == pytest.approx(want)


def test_resumed_training_ends_with_the_same_weights(images: tuple[Any, Any], tmp_path: Path) -> None:
    x, _ = images
    file = tmp_path / "side.safetensors"

    def run(**more: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {"dim": 8, "epochs": 3, "batch_size": 64, "progress": False, "backbone": "small_cnn"}
        return fct.train_side_info(x[:128], **settings, **more).state_dict()

    whole = run()

    def stop(epoch: int, _: float) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    import fct.fit.loop as loop

    defaults = loop.train.__kwdefaults__
    assert defaults is not None
    original = defaults["checkpoint_seconds"]
    defaults["checkpoint_seconds"] = 0.0
    try:
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=file, on_epoch=stop)
    finally:
        defaults["checkpoint_seconds"] = original
    assert file.exists()
    resumed = run(checkpoint=file)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert not file.exists()
    file.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="checkpoint: expected a whole"):
        run(checkpoint=file)


@pytest.mark.parametrize("loss", [pytest.param("softmax", marks=pytest.mark.slow), "arcface"])
def test_bct_vectors_compare_with_the_old_ones(images: tuple[Any, Any], loss: str) -> None:
    x, y = images
    known = y < 2
    more: Any = {
        "loss": loss,
        "config": replace(QUICK, epochs=6),
        "flip": False,
        "progress": False,
    }  # mirrored: class 1
    old, head = train_supervised(x[known], y[known], classes=2, dim=16, **more)
    extended: Any = old_classifier_for(old, head, Images(x, y), 4)
    torch.testing.assert_close(extended.prototypes[:2], head.prototypes.detach())
    mean = embed(old, x[y == 3]).mean(axis=0)
    direction = extended.prototypes[3].detach().numpy()
    assert float(mean @ direction / np.linalg.norm(mean) / np.linalg.norm(direction)) == pytest.approx(1, abs=1e-4)
    new, _ = train_bct(x, y, classes=4, old_model=old, old_head=head, **more)
    gallery, queries = embed(old, x[known]), embed(new, x[known])
    hit = fct.topk(queries, gallery, 1, metric="cosine").indices[:, 0]
    assert (y[known][hit] == y[known]).mean() > 0.9
    with pytest.raises(ValueError, match="classes: expected at least the 2 that the old model knows, got 1"):
        train_bct(x, y, classes=1, old_model=old, old_head=head, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": np.zeros((4, 5), np.uint8)}, r"images: expected \(n, h, w\) or \(n, c, h, w\), got shape \(4, 5\)"),
        ({"images": np.zeros((4, 8, 8), np.int64)}, "images: expected uint8 or floats"),
        ({"images": np.full((4, 8, 8), np.nan, np.float32)}, "images: expected finite values"),
        ({"method": "moco"}, "method: expected one of simclr, .*, got 'moco'"),
        ({"labels": np.zeros(64)}, "labels: expected None for 'simclr'"),
        ({"method": "supervised"}, r"labels: expected \(n,\) labels"),
        ({"dim": 0}, "dim: expected a whole number from 1 to 16777216, got 0"),
        ({"epochs": 0}, "epochs: expected a whole number of at least 1, got 0"),
    ],
)
def test_bad_side_info_input_is_named(images: tuple[Any, Any], arguments: dict[str, Any], message: str) -> None:
    settings = {"images": images[0][:64], "epochs": 1, "progress": False} | arguments
    with pytest.raises(ValueError, match=message):
        fct.train_side_info(settings.pop("images"), **settings)


def test_labels_out_of_range_are_named(images: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="labels: expected values from 0 to 2, got 0 to 3"):
        train_supervised(*images, classes=3, config=QUICK, progress=False)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TrainConfig(device="auto").torch_device().type == "cpu"
    with pytest.raises(ValueError, match="device: expected one that is there, got 'cuda'"):
        TrainConfig(device="cuda").torch_device()
