"""The artifact's one-file form: named tensors and one JSON header in a ``.safetensors`` file. Nothing is unpickled.

Version 1 is a chain of layers for each branch and the mixer. Version 2 adds the skip and the length that outputs are
brought to; a file without them stays version 1, which older versions read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from fct.artifact.content_checksum import CHECKSUM, content_checksum
from fct.atomic_files import write_bytes
from fct.checks import check_path
from fct.errors import ArtifactError
from fct.types import Float32s, JsonDict

__all__ = ["FORMAT", "NEWEST_VERSION", "read_artifact", "require_whole", "write_artifact"]

FORMAT = "fct-transformation"
NEWEST_VERSION = 2

Tensors = Mapping[str, Float32s]


def write_artifact(
    path: str | os.PathLike[str], header: Mapping[str, object], tensors: Tensors, *, version: int
) -> Path:
    """Writes one file; an old file there survives until the new one is whole."""
    from safetensors.numpy import save

    target = check_path(path, "path")
    whole = {"format": FORMAT, "version": version, **header}
    whole[CHECKSUM] = content_checksum(whole, tensors)
    write_bytes(target, save(dict(tensors), metadata={"fct": json.dumps(whole)}))
    return target


def read_artifact(path: str | os.PathLike[str]) -> tuple[Path, JsonDict, Tensors]:
    """(the path, its header, its tensors) of a file that is whole, fct's own, and of a version known here."""
    from safetensors import SafetensorError, safe_open

    source = check_path(path, "path")
    if not source.is_file():
        raise FileNotFoundError(f"transformation: expected a .safetensors file, found none at {source}")
    try:
        with safe_open(str(source), framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"transformation: expected a whole .safetensors file, {source} is not: {error}") from error
    if "fct" not in metadata:
        raise ArtifactError(
            f"transformation: {source} is a .safetensors file but not one of fct's; "
            "for Apple's ml-fct checkpoints use Transformation.from_ml_fct"
        )
    try:
        header = json.loads(metadata["fct"], object_pairs_hook=_once)
        kind, version = header.get("format"), header.get("version")
    except (AttributeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"transformation: {source} is damaged: {error!r}") from error
    if kind != FORMAT or type(version) is not int or not 1 <= version <= NEWEST_VERSION:
        raise ArtifactError(
            f"transformation: expected {FORMAT} version 1 to {NEWEST_VERSION}, {source} is {kind} version {version}"
            + ("; a later fct wrote it" if kind == FORMAT and type(version) is int and version > 1 else "")
        )
    return source, header, tensors


def _once(pairs: list[tuple[str, object]]) -> JsonDict:
    """An object whose names stand there once: of two values it would be the last that counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


_NAMES = {
    *("format", "version", "plan", "old_space", "new_space", "side_model", "normalise", "length", "fingerprint"),
    *("precisions", "tolerance", "info", CHECKSUM),
}


def require_whole(header: Mapping[str, object], tensors: Tensors, source: Path) -> None:
    """Raises ArtifactError where the checksum is another. Version 0.1 wrote none; a damaged name is not taken for
    that."""
    unknown = [name for name in header if name not in _NAMES]
    if unknown:
        raise ArtifactError(f"transformation: {source} is damaged: its header names {unknown[0]!a}")
    if CHECKSUM in header and header[CHECKSUM] != content_checksum(header, tensors):
        raise ArtifactError(f"transformation: {source} does not match its checksum: the file was damaged or changed")
