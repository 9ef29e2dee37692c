"""The one training loop of backbones and side-information: AdamW, one cycle, checkpoints, a bar."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from fct.checks import check_number, check_positive, check_seed, check_whole
from fct.fit.images import Images
from fct.fit.training_device import training_device
from fct.fit.training_state import read_state, write_state
from fct.progress import step_bar
from fct.types import JsonDict

__all__ = ["TrainConfig", "train"]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How a network is trained.

    epochs, batch_size: passes over the images; images per step.
    lr, warmup: peak learning rate of one cycle (linear rise over the ``warmup`` share of all steps, then cosine to 0).
    weight_decay: AdamW's.
    seed: initialisation, order and augmentation.
    device: "auto" (a GPU where torch sees one), "cpu", "cuda".
    """

    epochs: int = 20
    batch_size: int = 128
    lr: float = 3e-3
    warmup: float = 0.2
    weight_decay: float = 0.01
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            object.__setattr__(self, name, check_whole(getattr(self, name), name, 1))  # numpy's become plain ones
        object.__setattr__(self, "lr", check_positive(self.lr, "lr"))
        object.__setattr__(self, "weight_decay", check_number(self.weight_decay, "weight_decay", 0))
        object.__setattr__(self, "seed", check_seed(self.seed))
        if not isinstance(self.device, str):
            raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {self.device!r}")

    def torch_device(self) -> torch.device:
        return training_device(self.device)


def train(
    modules: nn.ModuleDict,
    loss: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    images: Images,
    config: TrainConfig,
    *,
    describe: str,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    on_epoch: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Trains ``modules`` in place to lower ``loss(images, labels)``; gives the mean loss of each epoch.

    bfloat16 products on a GPU that has them. The order, the augmentation and dropout of an epoch depend on (seed,
    epoch) alone, so that a run resumed from ``checkpoint`` (removed when done) ends with the same weights.

    Raises:
        FloatingPointError: the loss became NaN or infinite. ArtifactError: the checkpoint belongs to another run.
    """
    if len(images) < 2:
        raise ValueError(f"images: expected at least 2 to train on, got {len(images)}")
    device = config.torch_device()
    modules.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(
        [p for p in modules.parameters() if p.requires_grad], lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    epochs = _Epochs(images, config, loss, optimiser, device)
    state = _State(modules, optimiser, _identity(modules, images, config, describe))
    path = Path(checkpoint) if checkpoint is not None else None
    if path is not None and path.exists():
        state.load(path, device)
    saved = time.monotonic()
    cuda = [device] if device.type == "cuda" else []
    with step_bar(progress) as bar, torch.random.fork_rng(devices=cuda):
        task = bar.add_task(describe, total=epochs.steps * config.epochs, completed=state.epoch * epochs.steps)
        while state.epoch < config.epochs:
            state.losses.append(epochs.run(state.epoch, lambda: bar.advance(task)))
            state.epoch += 1
            if not math.isfinite(state.losses[-1]):
                raise FloatingPointError(
                    f"{describe}: the loss became {state.losses[-1]} in epoch {state.epoch}; "
                    f"try a smaller lr than {config.lr}"
                )
            if on_epoch is not None:
                on_epoch(state.epoch, state.losses[-1])
            if path is not None and time.monotonic() - saved >= checkpoint_seconds:
                state.save(path)
                saved = time.monotonic()
    if path is not None:
        path.unlink(missing_ok=True)
    modules.eval()
    return state.losses


@dataclass(frozen=True)
class _Epochs:
    """One pass over the images at a time; what a pass does depends on the seed, its number and the weights alone."""

    images: Images
    config: TrainConfig
    loss: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    optimiser: torch.optim.Optimizer
    device: torch.device

    @property
    def batch(self) -> int:
        return min(self.config.batch_size, len(self.images))

    @property
    def steps(self) -> int:
        """Of one epoch."""
        return len(self.images) // self.batch

    def run(self, epoch: int, stepped: Callable[[], None]) -> float:
        """Trains for one epoch; its mean loss. stepped: told of every step."""
        config, device = self.config, self.device
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        torch.manual_seed(config.seed * 1_000_003 + epoch)
        running = 0.0
        batches = self.images.batches(self.batch, seed=(config.seed, epoch), drop_last=True)
        for step, (x, y) in enumerate(batches, epoch * self.steps):
            for group in self.optimiser.param_groups:
                group["lr"] = config.lr * _one_cycle(step, self.steps * config.epochs, config.warmup)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                value = self.loss(x.to(device), None if y is None else y.to(device))
            self.optimiser.zero_grad(set_to_none=True)
            value.backward()
            self.optimiser.step()
            running += float(value.detach())
            stepped()
        return running / self.steps


def _one_cycle(step: int, total: int, warmup: float) -> float:
    rise = max(1.0, warmup * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))


def _identity(modules: nn.ModuleDict, images: Images, config: TrainConfig, describe: str) -> str:
    shapes = [[name, list(value.shape)] for name, value in modules.state_dict().items()]
    text = json.dumps([describe, asdict(config), len(images), images.shape, shapes])
    return hashlib.sha256(text.encode()).hexdigest()


class _State:
    """What a checkpoint holds: weights, optimiser, epoch; tensors in a .safetensors file, nothing pickled."""

    def __init__(self, modules: nn.ModuleDict, optimiser: torch.optim.Optimizer, identity: str) -> None:
        self.modules, self.optimiser, self.identity = modules, optimiser, identity
        self.epoch = 0
        self.losses: list[float] = []

    def save(self, path: Path) -> None:
        tensors = {f"modules.{k}": v for k, v in self.modules.state_dict().items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{k}": torch.as_tensor(v) for k, v in values.items()}
        write_state(path, tensors, {"identity": self.identity, "epoch": self.epoch, "losses": self.losses})

    def load(self, path: Path, device: torch.device) -> None:
        tensors, header = read_state(path, self.identity, device)
        prefix = "modules."
        self.modules.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        state: dict[int, JsonDict] = {}
        for name, value in tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        for parameter, values in self.optimiser.state.items():  # the fused step wants the parameter's memory format
            for key, value in values.items():
                if value.shape == parameter.shape:
                    values[key] = torch.empty_like(parameter).copy_(value)
        self.epoch, self.losses = header["epoch"], header["losses"]
