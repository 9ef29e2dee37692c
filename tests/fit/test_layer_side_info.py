"""Side-information from a layer: hooks, pooling, components, few bits; read by fits, maps and backfills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import fct
from fct.errors import ArtifactError
from fct.fit.layer_side_info import LayerSideInfo, side_info_from
from fct.fit.recipes import FitConfig
from fct.gallery.vectors import vector_block
from fct.packed_int4 import pack_int4


class TextModel(nn.Module):
    """Tokens to one vector; the first layer's output is a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.first = nn.Linear(12, 12)
        self.unused = nn.Linear(12, 12)

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        hidden = self.first(self.embed(input_ids))
        return (hidden * attention_mask[..., None]).sum(1)


def tokenised(texts: Any) -> dict[str, Any]:
    ids = [[ord(c) % 50 for c in text] for text in texts]
    width = max(map(len, ids))
    mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i in ids])
    return {"input_ids": torch.tensor([i + [0] * (width - len(i)) for i in ids]), "attention_mask": mask}


def encoded(side: LayerSideInfo, items: Any) -> Any:
    """An array or codes, as the storage says."""
    return side.encode(items, progress=False)


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


@pytest.fixture
def images(rng: np.random.Generator) -> Any:
    return rng.random((120, 1, 14, 14), dtype=np.float32)


def test_it_is_the_principal_components_of_the_pooled_layer(network: nn.Sequential, images: Any) -> None:
    side = side_info_from(network, images, layer="3", dim=10, storage="float32", batch_size=32, progress=False)
    with torch.inference_mode():
        maps = network[:4](torch.from_numpy(images))
        pooled = nn.functional.adaptive_avg_pool2d(maps, 3).flatten(1).numpy()
    _, _, axes = np.linalg.svd(pooled - pooled.mean(axis=0), full_matrices=False)
    want = (pooled - pooled.mean(axis=0)) @ axes[:10].T
    got: Any = side.encode(images, progress=False)
    np.testing.assert_allclose(np.abs(got), np.abs(want), atol=2e-4)
    assert side_info_from(network, images, dim=10, progress=False).layer == "3", "by default the last map of features"


def test_texts_are_averaged_over_their_own_tokens() -> None:
    torch.manual_seed(0)
    model, texts = TextModel(), [f"text {i * 7919 % 101} {'x' * (i % 9)}" for i in range(60)]
    how: dict[str, Any] = {"layer": "first", "dim": 6, "storage": "float32", "batch": tokenised, "progress": False}
    side = side_info_from(model, texts, **how)
    alone = np.concatenate([np.asarray(side.encode([text], progress=False)) for text in texts])
    np.testing.assert_allclose(encoded(side, texts), alone, atol=1e-5)


@pytest.mark.parametrize(("storage", "kept", "size"), [("float32", 0.9999, 48), ("int8", 0.999, 12), ("int4", 0.97, 6)])
def test_fewer_bits_keep_almost_all(network: nn.Module, images: Any, storage: str, kept: float, size: int) -> None:
    plain = side_info_from(network, images, layer="3", dim=12, storage="float32", progress=False)
    side = side_info_from(network, images, layer="3", dim=12, storage=storage, progress=False)
    assert side.bytes_per_item == size
    stored: Any = side.encode(images, progress=False)
    codes = {"float32": lambda: stored, "int8": lambda: stored.values, "int4": lambda: stored.codes() + 0.5}[storage]()
    values: Any = plain.encode(images, progress=False)
    for i in range(12):
        assert np.corrcoef(values[:, i], codes[:, i])[0, 1] >= kept


def test_the_file_and_the_model_give_the_same_rows(network: nn.Module, images: Any, tmp_path: Path) -> None:
    side = side_info_from(network, images, layer="2", dim=9, progress=False)
    side.save(tmp_path / "side.safetensors")
    again = LayerSideInfo.load(tmp_path / "side.safetensors", network)
    assert again.id == side.id
    np.testing.assert_array_equal(
        encoded(again, images).values,
        encoded(side, images).values,
    )
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match=r"expected a file by LayerSideInfo\.save"):
        LayerSideInfo.load(tmp_path / "other.safetensors", network)


def test_the_model_is_left_as_it_was(network: nn.Module, images: Any) -> None:
    network.train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    side_info_from(network, images, dim=4, progress=False)
    assert network.training
    assert all(not m._forward_hooks for m in network.modules())
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "9"}, r"layer: expected the name of one of the model's 7 modules, got '9'; nearest: "),
        ({"layer": ""}, r"layer: expected the name of one of the model's 7 modules, got ''"),
        ({"dim": 500}, r"dim: expected at most 72, from 120 items of 72 features, got 500"),
        ({"storage": "int2"}, "storage: expected one of int4, int8, float32, got 'int2'"),
        ({"items": []}, "items: expected at least one item, got none"),
    ],
)
def test_bad_input_is_named(network: nn.Module, images: Any, change: dict[str, Any], message: str) -> None:
    how = {"items": images, "layer": "3", "dim": 8, "progress": False} | change
    with pytest.raises(ValueError, match=message):
        side_info_from(network, **how)


def test_layers_that_do_not_run_or_do_not_exist_and_texts_without_batch() -> None:
    model, texts = TextModel(), ["a", "bc", "def"]
    with pytest.raises(ValueError, match="layer: expected one that the model runs, got 'unused'"):
        side_info_from(model, texts, layer="unused", dim=2, batch=tokenised, progress=False)
    with pytest.raises(ValueError, match="layer: expected the name of a module, since none"):
        side_info_from(model, texts, dim=2, batch=tokenised, progress=False)
    with pytest.raises(TypeError, match="items: expected an array or a tensor, or batch"):
        side_info_from(model, texts, layer="first", dim=2, progress=False)
    with pytest.raises(TypeError, match="model: expected a torch module"):
        side_info_from(3, texts, dim=2, progress=False)


# ---- the codes, wherever rows are read ----


@pytest.mark.parametrize("d", [1, 2, 7, 64])
def test_codes_survive_packing(rng: np.random.Generator, d: int) -> None:
    codes = rng.integers(-8, 8, (40, d))
    packed = pack_int4(codes)
    assert packed.values.shape == (40, (d + 1) // 2)
    np.testing.assert_array_equal(packed.codes(), codes)
    with pytest.raises(ValueError, match="codes: expected whole numbers from -8 to 7, got some from -9 to 8"):
        pack_int4(np.array([[-9, 8]]))
    with pytest.raises(ValueError, match=r"side_info: expected \(n, 4\) uint8 in PackedInt4 of d=8, got"):
        fct.transform_batch(
            np.zeros((3, 2), np.float32),
            fct.PackedInt4(np.zeros((3, 5), np.uint8), 8),
            fct.Transformation.random(2, 8, 2, inner=4),
        )


def test_fit_map_and_backfill_read_the_codes(rng: np.random.Generator, tmp_path: Path) -> None:
    old, codes = rng.standard_normal((200, 5)).astype(np.float32), rng.integers(-8, 8, (200, 7))
    new = np.tanh(np.concatenate([old, codes / 4], axis=1)).astype(np.float32)
    packed = pack_int4(codes)
    quick = FitConfig(inner=16, epochs=3, batch_size=32, standardise=True)
    h = fct.fit_transformation(old, packed, new, config=quick, side_model="layer", progress=False)
    assert h.d_side == 7
    want = fct.transform_batch(old, codes.astype(np.float32), h, precision="fp32")
    np.testing.assert_allclose(fct.transform_batch(old, packed, h, precision="fp32"), want, atol=1e-5)
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(4), 200, [None, pa.py_buffer(packed.values)])
    rows = pa.FixedSizeListArray.from_arrays(pa.array(old.ravel()), 5)
    pq.write_table(pa.table({"id": range(200), "old": rows, "side_info": column}), tmp_path / "items.parquet")
    fct.backfill(tmp_path / "items.parquet", tmp_path / "new", h, old_model="old", precision="fp32", progress=False)
    table = pq.ParquetDataset(next((tmp_path / "new").glob("*.parquet"))).read()
    vectors = next(table[name] for name in table.column_names if name not in ("id", "side_info"))
    got = np.stack(vectors.to_numpy())
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_column_of_codes_with_nulls() -> None:
    column = pa.array([b"\x21\x03", None, b"\xf8\x07"], pa.binary(2))
    block = vector_block(column, 3)
    assert block.values.tolist() == [[1, 2, 3], [-8, -1, 7]]
    assert block.rows is not None
    assert (list(block.rows), block.bad) == ([0, 2], {1: "null"})
    with pytest.raises(ValueError, match="vectors: expected 8 float32 a row, got a column of fixed_size_binary"):
        vector_block(column, 8)


class SentenceModel(nn.Module):
    """As sentence-transformers 6 has it: the network is "model", and "auto_model" a property beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TextModel()

    @property
    def auto_model(self) -> nn.Module:
        return self.model

    def forward(self, given: dict[str, Any]) -> Any:
        return self.model(given["input_ids"], given["attention_mask"])

    def encode(self, texts: Any) -> Any:
        raise AssertionError("the layer is wanted, not the embedding")


class Version6(SentenceModel):
    def preprocess(self, texts: Any) -> dict[str, Any]:
        return tokenised(texts)

    def tokenize(self, texts: Any) -> dict[str, Any]:
        raise AssertionError("deprecated")


class Version5(SentenceModel):
    def tokenize(self, texts: Any) -> dict[str, Any]:
        return tokenised(texts)


@pytest.mark.parametrize("kind", [Version5, Version6])
def test_a_layer_goes_by_the_name_of_either_version_of_sentence_transformers(
    kind: type[SentenceModel], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, texts = kind(), [f"text {i} of {i * i}" for i in range(40)]
    side = side_info_from(model, texts, layer="auto_model.first", dim=4, progress=False)
    other = side_info_from(model, texts, layer="model.first", dim=4, progress=False)
    np.testing.assert_array_equal(
        encoded(side, texts).codes(),
        encoded(other, texts).codes(),
    )
    side.save(tmp_path / "side.safetensors")
    again = LayerSideInfo.load(tmp_path / "side.safetensors", model)
    np.testing.assert_array_equal(
        encoded(again, texts).codes(),
        encoded(side, texts).codes(),
    )
    for name in ("auto_model.second", "auto_model.forward", "training", "auto_model."):
        with pytest.raises(
            ValueError, match=rf"layer: expected the name of one of the model's .* modules, got '{name}'"
        ):
            side_info_from(model, texts, layer=name, dim=4, progress=False)


def test_a_model_by_name_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    def missing(name: str, device: str) -> nn.Module:
        raise OSError(f"nothing\nat {name}")

    library: Any = ModuleType("sentence_transformers")
    library.SentenceTransformer = missing
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    with pytest.raises(
        ValueError, match=r"model: expected the name or folder .*, 'no/such' could not be loaded: nothing at"
    ):
        side_info_from("no/such", ["a"] * 9, layer="x", progress=False)
    library.SentenceTransformer = lambda name, device: Version6()
    side = side_info_from("some-name", [f"text {i * i}" for i in range(40)], layer="model.first", dim=4, progress=False)
    assert side.layer == "model.first"
