"""8-bit codes of embeddings, and the scale and offset that bring them back."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from fct.checks import shown
from fct.types import OneKind, Values

if TYPE_CHECKING:
    import torch


__all__ = ["ScaledInt8", "check_per_row", "is_torch", "signed"]


@dataclass(frozen=True, slots=True)
class ScaledInt8:
    """8-bit codes and what brings them back: row = values * scale + offset.

    Args:
        values: (n, d) int8 or uint8, numpy or torch. uint8 codes are copied to int8 once, and cannot be written to.
        scale: a positive float; or (n,) / (n, 1), one per row; or (1, d), one per dimension. float32.
        offset: what a code of 0 stands for: a float; or (n,) / (n, 1); or (1, d). float32. Codes with a zero point z,
            row = (values - z) * scale, have offset = -z * scale; codes made from a minimum (row = (values + 128) *
            scale + minimum, as sentence-transformers' int8) have offset = minimum + 128 * scale.

    Examples:
        >>> import numpy as np, fct
        >>> fct.ScaledInt8(np.ones((2, 3), np.int8), 0.5).shape
        (2, 3)
    """

    values: Values
    scale: Values = 1.0
    offset: Values = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def __len__(self) -> int:
        return int(self.values.shape[0])


def is_torch(x: object) -> TypeGuard[torch.Tensor]:
    torch = sys.modules.get("torch")  # a tensor can only exist once torch is imported
    return torch is not None and isinstance(x, torch.Tensor)


def signed(codes: OneKind) -> OneKind:
    """uint8 codes less 128, as int8: the same bits but the first."""
    if isinstance(codes, np.ndarray):
        return np.asarray(codes ^ np.uint8(0x80)).view(np.int8)
    import torch

    return (codes ^ 0x80).view(torch.int8)


def check_per_row(given: Values, what: str, shape: tuple[int, int], like: OneKind, name: str) -> OneKind:
    """A "scale" or an "offset" as float32 (1, 1), (n, 1) or (1, d), where the values lie."""
    n, d = shape
    kind = "a scale of positive floats" if what == "scale" else "an offset of floats"
    try:
        host = np.asarray(given.detach().cpu().float() if is_torch(given) else given)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected {kind}, got {type(given).__name__}: {error}") from error
    if host.dtype.kind not in "fiu":
        raise ValueError(f"{name}: expected {kind}, got {host.dtype} ({shown(given)})")
    with np.errstate(over="ignore"):
        host = host.astype(np.float32, copy=False)
    if host.ndim == 0:
        host = host.reshape(1, 1)
    elif host.shape == (n,):
        host = host.reshape(n, 1)
    if host.shape not in ((1, 1), (n, 1), (1, d)):
        article = "a scale" if what == "scale" else "an offset"
        raise ValueError(f"{name}: expected {article} of shape (), ({n},) or (1, {d}), got {host.shape}")
    if what == "offset" and not np.isfinite(host).all():
        raise ValueError(f"{name}: expected finite offsets, got values from {host.min()} to {host.max()}")
    if what == "scale" and host.size and not (np.isfinite(host).all() and (host > 0).all()):
        raise ValueError(f"{name}: expected positive finite scales, got values from {host.min()} to {host.max()}")
    host = np.ascontiguousarray(host)
    if isinstance(like, np.ndarray):
        return host
    import torch

    return torch.from_numpy(host).to(like.device)
