"""An embedding model as one .safetensors file: weights, what network it is, what images it reads."""

from __future__ import annotations

import json
import os

from fct.artifact.content_checksum import CHECKSUM, content_checksum
from fct.atomic_files import atomic_path
from fct.checks import check_path
from fct.errors import ArtifactError
from fct.fit.backbones import EmbeddingModel, embedding_model
from fct.types import JsonDict

__all__ = ["load_model", "save_model"]

_KEY = "fct-model"
_NAMES = {"backbone", "dim", "image_shape", "info", CHECKSUM}  # version 0.1 wrote all but the last


def _checksum(header: JsonDict, tensors: JsonDict) -> str:
    return content_checksum(header, {name: value.numpy() for name, value in tensors.items()})


def save_model(
    model: EmbeddingModel,
    path: str | os.PathLike[str],
    *,
    backbone: str,
    image_shape: tuple[int, int, int],
    info: JsonDict | None = None,
) -> None:
    """Writes the model beside ``path``, then renames.

    Args:
        backbone: the name that :func:`fct.fit.backbones.backbone` knows it by.
        image_shape: (c, h, w) of what it reads.
        info: plain values to keep with it (method, epochs, seed).

    Examples:
        >>> import tempfile
        >>> from fct.fit.backbones import embedding_model
        >>> from fct.fit.model_file import load_model, save_model
        >>> model = embedding_model("small_cnn", dim=8, image_shape=(1, 28, 28))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(model, f"{folder}/m.safetensors", backbone="small_cnn", image_shape=(1, 28, 28))
        ...     load_model(f"{folder}/m.safetensors").dim
        8
    """
    from safetensors.torch import save_file

    check_path(path, "path")
    header = {"backbone": backbone, "dim": model.dim, "image_shape": list(image_shape), "info": info or {}}
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
    header[CHECKSUM] = _checksum(header, tensors)
    with atomic_path(path) as part:
        save_file(tensors, str(part), metadata={_KEY: json.dumps(header)})


def load_model(path: str | os.PathLike[str]) -> EmbeddingModel:
    """The model in ``path``, in eval mode. ArtifactError: the file is truncated, or no embedding model."""
    from safetensors import SafetensorError, safe_open

    if not check_path(path, "path").is_file():
        raise FileNotFoundError(f"model: expected a .safetensors file, found none at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if not isinstance(header, dict):
            raise ArtifactError(f"model: expected an embedding model that fct saved, {path} is none")
        if (set(header) - _NAMES) or header.get(CHECKSUM, None) not in (None, _checksum(header, tensors)):
            raise ArtifactError(f"model: {path} does not match its checksum: the file was damaged or changed")
        shape = header["image_shape"]
        model = embedding_model(header["backbone"], dim=header["dim"], image_shape=(shape[0], shape[1], shape[2]))
        model.load_state_dict(tensors)
    except (
        SafetensorError,
        OSError,
        KeyError,
        ValueError,
        RuntimeError,
        TypeError,
        IndexError,
        RecursionError,
    ) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"model: expected a whole embedding model, {path} is not: {error}") from error
    return model.eval()
