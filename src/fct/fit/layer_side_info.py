"""Side-information for nothing: what an inner layer of the old model says, pooled, reduced and stored in few bits.

An embedding forgets what its training did not ask for; the layers before it have not forgotten yet. Nothing is
trained but a principal component analysis, and no second model is run or kept.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fct.artifact.content_checksum import CHECKSUM, content_checksum
from fct.atomic_files import atomic_path
from fct.checks import check_choice, check_flag, check_path, check_seed, check_whole
from fct.errors import ArtifactError
from fct.fit.training_device import training_device
from fct.packed_int4 import PackedInt4, pack_int4
from fct.progress import step_bar
from fct.rows import ScaledInt8
from fct.types import Array, Floats

__all__ = ["STORAGES", "LayerSideInfo", "side_info_from"]

STORAGES = ("int4", "int8", "float32")
_KEY = "fct-layer-side-info"
_GRID = 3  # a map of features is averaged over a grid of so many by so many cells
_EXACT = 2_048  # features up to which all principal components are computed, beyond only the first
_FITTED_ON = 20_000  # items that the components are taken from
_RANGE = {"int8": 4.5, "int4": 2.5}  # standard deviations that the codes span

Items: TypeAlias = "Sequence[object] | Array | torch.Tensor"
Batch = Callable[[Sequence[object]], object]
Pool = Callable[[object, object], torch.Tensor]


@dataclass(frozen=True, eq=False)
class LayerSideInfo:
    """A layer of a model, and what makes side-information of its output. Made by :func:`side_info_from`.

    model: the old model. layer: the module's name. mean: (f,), components: (f, dim), scale: (dim,) float32: the
    principal components of the pooled output, and the unit of the codes. storage: "int4", "int8" or "float32".
    """

    model: nn.Module
    layer: str
    mean: Floats
    components: Floats
    scale: Floats
    storage: str
    batch: Batch | None = None
    pool: Pool | None = None
    batch_size: int = 256

    @property
    def dim(self) -> int:
        return int(self.components.shape[1])

    @property
    def bytes_per_item(self) -> int:
        return {"int4": (self.dim + 1) // 2, "int8": self.dim, "float32": 4 * self.dim}[self.storage]

    @property
    def id(self) -> str:
        """For ``side_model``: names the layer, the form, and by a digest the components."""
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in (self.mean, self.components)))
        return f"layer {self.layer}, {self.dim}-d {self.storage}, {digest.hexdigest()[:12]}"

    def encode(self, items: Items, *, device: str = "auto", progress: bool = True) -> PackedInt4 | ScaledInt8 | Array:
        """Side-information of items, as it is stored and as every fct function takes it.

        Args:
            items: what :func:`side_info_from` was given.

        Returns:
            (n, dim): float32 numpy, :class:`fct.ScaledInt8` of scale 1, or :class:`fct.PackedInt4`.
        """
        features = _features(self, cast("Sequence[object]", items), device, progress)
        values = (features - self.mean) @ self.components
        if self.storage == "float32":
            return values.astype(np.float32)
        codes = values / self.scale
        if self.storage == "int8":
            return ScaledInt8(np.clip(np.rint(codes), -127, 127).astype(np.int8), 1.0)
        return pack_int4(np.clip(np.floor(codes), -8, 7).astype(np.int8))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all but the model to one ``.safetensors`` file."""
        from safetensors.numpy import save_file

        check_path(path, "path")
        header = {"layer": self.layer, "storage": self.storage, "dim": self.dim, "batch_size": self.batch_size}
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in ("mean", "components", "scale")}
        header[CHECKSUM] = content_checksum(header, tensors)
        with atomic_path(check_path(path, "path")) as part:
            save_file(tensors, str(part), metadata={_KEY: json.dumps(header)})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: object, *, batch: Batch | None = None, pool: Pool | None = None
    ) -> LayerSideInfo:
        """What :meth:`save` wrote, for the same model. ArtifactError: the file is damaged or another one."""
        from safetensors import SafetensorError, safe_open

        if not check_path(path, "path").is_file():
            raise FileNotFoundError(f"side-information: expected a .safetensors file, found none at {path}")
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = json.loads((file.metadata() or {})[_KEY])
                arrays = {name: file.get_tensor(name) for name in ("mean", "components", "scale")}
            if CHECKSUM in header and header[CHECKSUM] != content_checksum(header, arrays):
                raise ValueError("it does not match its checksum")
            layer, storage, size = str(header["layer"]), str(header["storage"]), int(header["batch_size"])
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise ArtifactError(
                f"side-information: expected a file by LayerSideInfo.save, {path} is not: {error}"
            ) from error
        check_choice(storage, "storage", STORAGES)
        network, own = _network(model)
        _module(network, layer)
        return cls(network, layer, **arrays, storage=storage, batch=batch or own, pool=pool, batch_size=size)


def side_info_from(
    model: object,
    items: Items,
    *,
    layer: str | None = None,
    dim: int = 128,
    storage: str = "int4",
    batch: Batch | None = None,
    pool: Pool | None = None,
    batch_size: int = 256,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> LayerSideInfo:
    """Side-information from an inner layer of the OLD model; nothing is trained.

    Args:
        model: any ``torch.nn.Module``, a sentence-transformers model, or the name or folder of one.
        items: some thousand items like those that will be stored: (n, ...) numpy array or tensor that the model
            takes, or a sequence (texts, paths, ...) of which ``batch`` makes what the model takes.
        layer: the module's name, as ``model.named_modules()`` has it. None: the last one whose output is a map of
            features (images); a model without any needs a name. A layer at a third of a transformer's depth is a good
            one.
        dim: length of the side-information. More dimensions of fewer bits beat fewer of more.
        storage: "int4" (dim / 2 bytes an item), "int8" or "float32".
        batch: from a list of items to the model's input: a tensor, or a mapping of keyword arguments (a tokeniser's).
        pool: from (the layer's output, the model's input) to (n, f). None: a map (n, c, h, w) is averaged over 3 x 3
            cells, a sequence (n, t, c) over its tokens (those of ``attention_mask`` where there is one).
        batch_size: items at a time. seed: of the sample of items (20,000 at most) that the components come from.
        device: "auto", "cpu", "cuda", ...

    Returns:
        :class:`LayerSideInfo`; ``.encode(items)`` gives what to store, ``.id`` is for ``side_model=``.

    Raises:
        ValueError: no such layer (the nearest names are told), too few items for ``dim``, an output of a shape that
            needs ``pool``. MissingExtraError: a model by name without sentence-transformers.

    Source: Ramanujan et al., CVPR 2022, arXiv:2112.02805, section 3.2 names intermediate layers among the choices.

    Examples:
        >>> import numpy as np, torch, fct
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> images = np.random.default_rng(0).random((64, 1, 12, 12), dtype=np.float32)
        >>> side = fct.side_info_from(model, images, layer="1", dim=16, progress=False)
        >>> side.encode(images, progress=False).shape, side.bytes_per_item
        ((64, 16), 8)
    """
    check_whole(dim, "dim", 1)
    check_whole(batch_size, "batch_size", 1)
    check_choice(storage, "storage", STORAGES)
    check_seed(seed)
    check_flag(progress, "progress")
    for name, function in (("batch", batch), ("pool", pool)):
        if function is not None and not callable(function):
            raise TypeError(f"{name}: expected a function or None, got {type(function).__name__}")
    network, own = _network(model)
    batch = batch or own
    _require_sequence(items)
    if len(items) == 0:
        raise ValueError("items: expected at least one item, got none")
    given = cast("Sequence[object]", items)
    name = _module_by_default(network, given, batch, training_device(device)) if layer is None else layer
    _module(network, name)
    few = _sample(given, seed)
    empty = np.zeros(0, np.float32)
    draft = LayerSideInfo(network, name, empty, empty, empty, storage, batch, pool, batch_size)
    features = _features(draft, few, device, progress)
    most = min(len(features) - 1, features.shape[1])
    if dim > most:
        raise ValueError(
            f"dim: expected at most {most}, from {len(features):,} items of {features.shape[1]:,} features, got {dim}"
        )
    mean, components, deviation = _components(features, dim, seed)
    span = _RANGE.get(storage)
    half = 127 if storage == "int8" else 8
    scale = np.ones(dim, np.float32) if span is None else np.maximum(deviation * span / half, 1e-12)
    return LayerSideInfo(network, name, mean, components, scale.astype(np.float32), storage, batch, pool, batch_size)


def _require_sequence(items: object) -> None:
    if not isinstance(items, (Sequence, np.ndarray, torch.Tensor)) and not hasattr(items, "__getitem__"):
        raise TypeError(f"items: expected an array, a tensor or a sequence, got {type(items).__name__}; list(...) it")
    if isinstance(items, (str, bytes, Mapping)) or not hasattr(items, "__len__") or isinstance(items, type):
        raise TypeError(f"items: expected an array, a tensor or a sequence of items, got {type(items).__name__}")
    if isinstance(items, (np.ndarray, torch.Tensor)) and (items.ndim == 0 or _of_objects(items)):
        kind = f"{items.dtype} of shape {tuple(items.shape)}"
        raise ValueError(f"items: expected (n, ...) numbers, or a list with batch= that reads it, got {kind}")


def _of_objects(items: Array | torch.Tensor) -> bool:
    return isinstance(items, np.ndarray) and items.dtype.kind not in "biufc"


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    """Whatever a model or a function of the user's raises, as an error that says whose it is."""
    try:
        yield
    except _Caught:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{what}, got {type(error).__name__}: {text}") from error


def _network(model: object) -> tuple[nn.Module, Batch | None]:
    """(the module, how it reads items where it knows itself)."""
    if isinstance(model, (str, os.PathLike)):
        from fct.extras import need

        library, name = need("sentence_transformers", "model"), os.fspath(model)
        try:
            model = library.SentenceTransformer(name, device="cpu")
        except (OSError, ValueError) as error:
            why = " ".join(str(error).split())
            raise ValueError(
                f"model: expected the name or folder of a sentence-transformers model, {name!r} could not be "
                f"loaded: {why}"
            ) from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module or a sentence-transformers model, got {type(model).__name__}")
    tokenise: Callable[..., Any] | None = getattr(
        model, "preprocess", getattr(model, "tokenize", None)
    )  # the name since version 6, and before
    if callable(tokenise) and callable(getattr(model, "encode", None)):
        return model, lambda texts: (dict(tokenise(list(texts))),)
    return model, None


def _module(network: nn.Module, layer: str) -> nn.Module:
    known: dict[str, nn.Module] = dict(network.named_modules())
    if isinstance(layer, str) and layer and layer not in known:
        # sentence-transformers 6 calls "model" what was "auto_model", and keeps that name as a property alone.
        found: object = network
        for part in layer.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.Module) and any(found is module for module in known.values()):
            return found
    if not isinstance(layer, str) or layer not in known or not layer:
        names = [name for name in known if name]
        near = difflib.get_close_matches(str(layer), names, 5, 0.3) or names[:5]
        raise ValueError(
            f"layer: expected the name of one of the model's {len(names)} modules, got {layer!r}; nearest: "
            + ", ".join(near)
        )
    return known[layer]


def _sample(items: Sequence[object], seed: int) -> Sequence[object]:
    if len(items) <= _FITTED_ON:
        return items
    chosen = np.sort(np.random.default_rng([seed, 31]).choice(len(items), _FITTED_ON, replace=False))
    return items[chosen] if isinstance(items, (np.ndarray, torch.Tensor)) else [items[int(i)] for i in chosen]


def _inputs(given: Sequence[object], batch: Batch | None, size: int, device: torch.device) -> Iterator[object]:
    for begin in range(0, len(given), size):
        some = given[begin : begin + size]
        part: object = some
        if batch is not None:
            with _telling("batch: expected a function that makes the model's input of a list of items"):
                part = batch(some)
        elif isinstance(part, np.ndarray):
            part = torch.from_numpy(np.ascontiguousarray(part))
        if not isinstance(part, (torch.Tensor, Mapping, tuple)):
            raise TypeError(
                f"items: expected an array or a tensor, or batch= that makes the model's input of a list, got "
                f"{type(given).__name__}"
            )
        yield _moved(part, device)


def _moved(part: object, device: torch.device) -> object:
    if isinstance(part, torch.Tensor):
        return part.to(device)
    if isinstance(part, Mapping):
        return {key: _moved(value, device) for key, value in part.items()}
    return tuple(_moved(value, device) for value in part) if isinstance(part, tuple) else part


def _call(network: nn.Module, given: object) -> None:
    with _telling("items: expected what the model takes (or batch= that makes it of them)"):
        if isinstance(given, Mapping):
            network(**given)
        elif isinstance(given, tuple):
            network(*given)
        else:
            network(given)


class _Caught(Exception):
    """The layer has answered: what comes after it need not run."""


@torch.inference_mode()
def _features(side: LayerSideInfo, items: Sequence[object], device: str, progress: bool) -> Floats:
    """(n, f) float32: the pooled output of the layer for every item."""
    target = training_device(device)
    network, caught = side.model.to(target), []
    training = network.training

    def catch(_module: nn.Module, _inputs: object, output: object) -> None:
        caught.append(output)
        raise _Caught

    hook = _module(network, side.layer).register_forward_hook(catch)
    parts = []
    try:
        network.eval()
        with step_bar(progress) as bar:
            total = -(-len(items) // side.batch_size)
            for given in bar.track(
                _inputs(items, side.batch, side.batch_size, target), total=total, description="reading the layer"
            ):
                try:
                    _call(network, given)
                except _Caught:
                    pass
                else:
                    raise ValueError(f"layer: expected one that the model runs, got {side.layer!r}, which it did not")
                parts.append(_pooled(caught.pop(), given, side).float().cpu().numpy())
                if parts[-1].shape[1] != parts[0].shape[1]:
                    sizes = f"{parts[0].shape[1]} and {parts[-1].shape[1]}"
                    raise ValueError(f"layer: expected as many features of every item, got {sizes}; name pool=")
    finally:
        hook.remove()
        network.train(training)
    out = np.concatenate(parts)
    if len(out) != len(items):
        raise ValueError(f"items: expected {len(items)} rows from the layer, got {len(out)}")
    if not np.isfinite(out).all():
        raise ValueError(f"layer: expected finite outputs, got NaN or infinity from {side.layer!r}")
    return out


def _pooled(output: object, given: object, side: LayerSideInfo) -> torch.Tensor:
    if side.pool is not None:
        with _telling("pool: expected a function of the layer's output and the model's input"):
            pooled: object = side.pool(output, given)
        if not isinstance(pooled, torch.Tensor) or pooled.ndim != 2:
            shape = tuple(pooled.shape) if isinstance(pooled, torch.Tensor) else type(pooled).__name__
            raise ValueError(f"pool: expected an (n, f) tensor, got {shape}")
        return pooled
    if isinstance(output, Mapping):
        output = output.get("last_hidden_state", next(iter(output.values()), None))
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, torch.Tensor) or output.ndim not in (2, 3, 4):
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(
            f"layer: expected (n, f), (n, t, c) or (n, c, h, w) from {side.layer!r}, got {shape}; name pool="
        )
    if output.ndim == 4:
        return functional.adaptive_avg_pool2d(output.float(), _GRID).flatten(1)
    if output.ndim == 2:
        return output
    mask = _mask(given)
    if mask is None or mask.shape != output.shape[:2]:
        return output.float().mean(dim=1)
    weight = mask[..., None].float()
    averaged: torch.Tensor = (output.float() * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)
    return averaged


def _mask(given: object) -> torch.Tensor | None:
    if isinstance(given, tuple):
        return next((m for m in map(_mask, given) if m is not None), None)
    return given.get("attention_mask") if isinstance(given, Mapping) else None


@torch.inference_mode()
def _module_by_default(network: nn.Module, items: Sequence[object], batch: Batch | None, device: torch.device) -> str:
    """The last module whose output is a map of features of at least 3 x 3."""
    found: list[str] = []

    def noting(name: str) -> Callable[[nn.Module, object, object], None]:
        def note(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor) and output.ndim == 4 and min(output.shape[2:]) >= _GRID:
                found.append(name)

        return note

    named = [(name, module) for name, module in network.named_modules() if name]
    hooks = [module.register_forward_hook(noting(name)) for name, module in named]
    training = network.training
    try:
        network.eval().to(device)
        _call(network, next(_inputs(items[:2], batch, 2, device)))
    finally:
        for hook in hooks:
            hook.remove()
        network.train(training)
    if not found:
        names = ", ".join(name for name, _ in named[:12])
        raise ValueError(
            f"layer: expected the name of a module, since none of this model's gives a map of features; it has {names}"
            + (", ..." if len(named) > 12 else "")
        )
    return found[-1]


def _components(features: Floats, dim: int, seed: int) -> tuple[Floats, Floats, Floats]:
    """(mean, the first ``dim`` principal axes as columns, the deviation along each)."""
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features - mean.astype(np.float32)
    if features.shape[1] <= _EXACT:
        _, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))
        axes = axes[:, ::-1][:, :dim]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _, _, found = torch.svd_lowrank(torch.from_numpy(centred), q=min(dim + 16, *features.shape), niter=4)
        axes = found[:, :dim].numpy()
    signs = np.where(axes[np.abs(axes).argmax(axis=0), np.arange(dim)] < 0, -1, 1)  # eigenvectors have no sign
    axes = (axes * signs).astype(np.float32)
    return mean.astype(np.float32), axes, (centred @ axes).std(axis=0)
