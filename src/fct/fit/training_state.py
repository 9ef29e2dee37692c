"""The file that an interrupted fit goes on from: tensors and a JSON header under a checksum, nothing pickled."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from fct.atomic_files import atomic_path
from fct.errors import ArtifactError
from fct.types import JsonDict

__all__ = ["read_state", "write_state"]

_KEY = "fct-fit"


def write_state(path: Path, tensors: dict[str, torch.Tensor], header: JsonDict) -> None:
    """Writes both to ``path``; a file that stood there survives until the new one is whole."""
    from safetensors.torch import save_file

    owned = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    metadata = {_KEY: json.dumps(header, sort_keys=True), "checksum": _checksum(owned, header)}
    with atomic_path(path) as part:
        save_file(owned, str(part), metadata=metadata)


def read_state(path: Path, identity: str, device: torch.device) -> tuple[dict[str, torch.Tensor], JsonDict]:
    """(tensors on ``device``, header) of a file by :func:`write_state`.

    Raises:
        ArtifactError: it is truncated, one of its bytes differs from what was written, or its "identity" is another.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            header = json.loads(metadata[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        sum_found = _checksum(tensors, header)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"checkpoint: expected a whole .safetensors file, {path} is not: {error}") from error
    if metadata.get("checksum") != sum_found:
        raise ArtifactError(
            f"checkpoint: {path} is damaged: its contents do not match its checksum; remove it to begin anew"
        )
    if header["identity"] != identity:
        raise ArtifactError(
            f"checkpoint: {path} belongs to another fit (other pairs, settings or seed); remove it or name another"
        )
    return {name: value.to(device) for name, value in tensors.items()}, header


def _checksum(tensors: dict[str, torch.Tensor], header: JsonDict) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
