"""Where something is trained."""

from __future__ import annotations

import torch

__all__ = ["training_device"]


def training_device(device: str) -> torch.device:
    """A GPU where there is one for "auto", else the device of that name; ValueError unless torch can use it."""
    if not isinstance(device, str):
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {device!r}")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that is there, got {device!r}, but torch sees no CUDA device")
    return chosen
