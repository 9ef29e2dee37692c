"""One training of h on pairs: module, optimiser, average, best weights, history; and its loop."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch.nn import functional

from fct.fit.linear_map import LinearMap
from fct.fit.module import Scaling, TransformationModule
from fct.fit.pairs import Pairs, Taken
from fct.fit.recipes import FitConfig
from fct.fit.training_state import read_state, write_state
from fct.types import Floats, JsonDict

__all__ = ["EpochReport", "PairTraining", "Scalings", "scalings_of"]

_SCALING_SAMPLE = 200_000  # rows that the mean and the scale are taken from
_CHUNK = 4_096
_SMALL_BATCH = 64

Scalings = tuple[Scaling, Scaling, Scaling]  # of old, side and new
_Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class EpochReport:
    """One epoch: mean squared errors per element, in the new space's own units; NaN where none was measured."""

    epoch: int
    train_mse: float
    validation_mse: float
    seconds: float


class PairTraining:
    """Trains one module on ``train``; keeps the weights that do best on ``held``.

    linear: the fixed map of ``config.skip == "ridge"``.
    """

    def __init__(
        self,
        train: Pairs,
        held: Pairs,
        config: FitConfig,
        seed: int,
        device: torch.device,
        scalings: Scalings,
        linear: LinearMap | None = None,
    ) -> None:
        self.train, self.held, self.config, self.seed, self.device = train, held, config, seed, device
        self.scalings = scalings
        self._scale = [self._scaling_tensors(scaling) for scaling in scalings]
        self._unit = float(scalings[2][1]) ** 2  # from the loss's units to the new space's
        self.module = self._new_module()
        if config.skip == "ridge":
            if linear is None:
                raise ValueError("linear: expected the map of skip='ridge', got None")
            self._set_linear(linear)
        learnt = [p for p in self.module.parameters() if p.requires_grad]
        adam = torch.optim.AdamW if config.decoupled_decay else torch.optim.Adam
        self.optimiser = adam(learnt, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.averaged = self._new_module() if config.average else None
        self._averages: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        if self.averaged is not None:
            self.averaged.load_state_dict(self.module.state_dict())
            both = zip(self.averaged.state_dict().values(), self.module.state_dict().values(), strict=True)
            moving = [(a, b) for a, b in both if a.is_floating_point()]
            self._averages = [a for a, _ in moving], [b for _, b in moving]
        self.epoch = 0
        self.step = 0
        self.best: JsonDict = {"epoch": 0, "mse": math.inf, "state": {}}
        self.history: list[dict[str, float]] = []
        self._bf16 = config.mixed_precision and _has_fast_bf16(device)
        # Rows that lie in this process's memory are read where they are; a mapped file is brought there once.
        self._cached = None
        if train.fits_in_memory and (device.type != "cpu" or train.mapped):
            self._cached = self._to_device(train.loaded())

    def _new_module(self) -> TransformationModule:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            two = self.train.side is not None
            return TransformationModule(*self.train.dims, self.config, two_inputs=two).to(self.device)

    def _set_linear(self, linear: LinearMap) -> None:
        """The fixed linear path, in the units of the loss."""
        (mean_old, scale_old), (mean_side, scale_side), (mean_new, scale_new) = self.scalings
        two = self.train.side is not None
        mean = np.concatenate([mean_old, mean_side]) if two else np.asarray(mean_old)
        scale = np.concatenate([scale_old, scale_side]) if two else np.asarray(scale_old)
        mean = mean.astype(np.float64)
        last = self.module.mixer[-1]
        assert self.module.skip is not None
        assert isinstance(last, torch.nn.Linear)
        with torch.no_grad():
            self.module.skip.weight.copy_(torch.from_numpy(linear.weight * scale / float(scale_new)))
            last.bias.copy_(torch.from_numpy((linear.weight @ mean + linear.bias - mean_new) / float(scale_new)))

    # ---- data ----
    def _scaling_tensors(self, scaling: Scaling) -> tuple[torch.Tensor, torch.Tensor]:
        mean, scale = (torch.as_tensor(np.asarray(part, np.float32), device=self.device) for part in scaling)
        return mean, scale

    def _to_device(self, arrays: Taken) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        old, side, new = (None if x is None else torch.from_numpy(x).to(self.device) for x in arrays)
        assert old is not None
        assert new is not None
        return old, side, new

    def _scaled(self, arrays: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]) -> _Batch:
        """A batch in the units of the loss; the old embedding stands in where there is no side-information."""
        if not self.config.standardise:
            return arrays[0], arrays[0] if arrays[1] is None else arrays[1], arrays[2]
        old, side, new = (
            None if x is None else (x - mean) / scale for x, (mean, scale) in zip(arrays, self._scale, strict=True)
        )
        assert old is not None
        assert new is not None
        return old, old if side is None else side, new

    def _batches(self) -> Iterator[_Batch]:
        size = self.config.batch_size
        for pool in self.train.order(self.seed, self.epoch):
            if self._cached is None and self.train.fits_in_memory:
                for begin in range(0, len(pool), size):
                    yield self._scaled(self._to_device(self.train.take(pool[begin : begin + size])))
                continue
            if self._cached is not None:
                data, order = self._cached, torch.from_numpy(pool).to(self.device)
            else:
                data, order = self._to_device(self.train.take(pool)), torch.arange(len(pool), device=self.device)
            for index in order.split(size):
                old, side, new = data
                some = None if side is None else side.index_select(0, index)
                yield self._scaled((old.index_select(0, index), some, new.index_select(0, index)))

    # ---- the loop ----
    def run(
        self,
        checkpoint: Path | None = None,
        checkpoint_seconds: float = 30.0,
        on_epoch: Callable[[EpochReport], None] | None = None,
    ) -> PairTraining:
        """Trains to the end, from ``checkpoint`` where that file is there; its last state is written there too."""
        if checkpoint is not None and checkpoint.exists():
            self.resume(checkpoint)
        with _threads_for(self.config, self.device):
            self._run(checkpoint, checkpoint_seconds, on_epoch)
        self._cached = None  # a fit keeps every shape it tried, and none needs a copy of the pairs any more
        return self

    def _run(
        self, checkpoint: Path | None, checkpoint_seconds: float, on_epoch: Callable[[EpochReport], None] | None
    ) -> None:
        saved = time.monotonic()
        while self.epoch < self.config.epochs:
            report = self.one_epoch()
            if on_epoch is not None:
                on_epoch(report)
            over = self.epoch == self.config.epochs
            if checkpoint is not None and (over or time.monotonic() - saved >= checkpoint_seconds):
                self.save(checkpoint)
                saved = time.monotonic()

    def one_epoch(self) -> EpochReport:
        begun = time.monotonic()
        config = self.config
        self.module.train()
        if self.epoch >= round(config.freeze_norm_at * config.epochs):
            self.module.freeze_norm()
        draws = np.random.default_rng([self.seed, self.epoch, 3])
        total, rows = torch.zeros((), device=self.device), 0
        for batch in self._batches():
            count = len(batch[0])
            if count < 2:  # batch norm has no variance of one row; the next epoch's order differs
                continue
            total += self._one_step(*(_mixed_up(batch, config.mixup, draws) if config.mixup else batch)) * count
            rows += count
        self.epoch += 1
        validation = math.nan
        if self.epoch % config.validate_every == 0 or self.epoch == config.epochs:
            validation = self._validate()
        report = EpochReport(self.epoch, float(total) / max(rows, 1) * self._unit, validation, time.monotonic() - begun)
        self.history.append({"epoch": self.epoch, "train_mse": report.train_mse, "validation_mse": validation})
        return report

    def _one_step(self, old: torch.Tensor, side: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr * self._schedule()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            out = self.module(old, side)
        loss = functional.mse_loss(out.float(), new)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.step += 1
        self._update_average()
        return loss.detach()

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.averaged is None:
            return
        decay = self.config.average
        if self.config.warm_average:
            decay = min(decay, self.step / (self.step + 9))
        elif self.step == 1:  # the average begins as the weights after the first step
            decay = 0.0
        torch._foreach_lerp_(*self._averages, 1 - decay)

    def _schedule(self) -> float:
        """Share of the peak learning rate at this step: a linear rise, then half a cosine."""
        per_epoch = max(1, math.ceil(len(self.train) / self.config.batch_size))
        at, warm, end = (self.step + 1) / per_epoch, self.config.warmup_epochs, float(self.config.epochs)
        if at < warm:
            return at / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (at - warm) / max(end - warm, 1e-9))))

    @torch.inference_mode()
    def _validate(self) -> float:
        module = (self.averaged or self.module).eval()
        total, size = 0.0, 0
        for begin in range(0, len(self.held), _CHUNK):
            old, side, new = self._scaled(self._to_device(self.held.take(slice(begin, begin + _CHUNK))))
            total += float(functional.mse_loss(module(old, side), new, reduction="sum"))
            size += new.numel()
        mse = total / size * self._unit
        if not math.isfinite(mse):
            raise FloatingPointError(
                f"fit: the validation error became {mse} in epoch {self.epoch}; a smaller lr than {self.config.lr} "
                "or config='auto' usually helps"
            )
        if mse < self.best["mse"]:
            state = {name: value.detach().clone() for name, value in module.state_dict().items()}
            self.best = {"epoch": self.epoch, "mse": mse, "state": state}
        return mse

    def best_module(self) -> TransformationModule:
        """The weights with the lowest validation error, ready to predict."""
        module = self._new_module()
        module.load_state_dict(self.best["state"])
        return module.eval()

    @torch.inference_mode()
    def predict(self, pairs: Pairs) -> Floats:
        """(n, d_new) float32: the best weights' output in the new space's units, not normalised."""
        module, parts = self.best_module(), []
        mean, scale = self._scale[2]
        for begin in range(0, len(pairs), _CHUNK):
            old, side, _ = self._scaled(self._to_device(pairs.take(slice(begin, begin + _CHUNK))))
            out = module(old, side)
            parts.append((out * scale + mean if self.config.standardise else out).cpu().numpy())
        return np.concatenate(parts)

    # ---- checkpoints ----
    def _identity(self) -> str:
        """What a checkpoint must agree with: settings, seed, sizes and a sample of the data itself."""
        digest = hashlib.sha256(
            json.dumps([self.config.to_dict(), self.seed, self.train.dims, len(self.train)]).encode()
        )
        for array in self.train.sample(256, self.seed).loaded():
            if array is not None:
                digest.update(array.tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        tensors = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        if self.averaged is not None:
            tensors |= {f"averaged.{k}": v for k, v in self.averaged.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best["state"].items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
        header = {
            "identity": self._identity(),
            "epoch": self.epoch,
            "step": self.step,
            "best": {k: v for k, v in self.best.items() if k != "state"},
            "history": self.history,
        }
        write_state(path, tensors, header)

    def resume(self, path: Path) -> None:
        """Goes on from ``path``; refuses a damaged file and the checkpoint of another fit."""
        tensors, header = read_state(path, self._identity(), self.device)

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.module.load_state_dict(part("module."))
        if self.averaged is not None:
            self.averaged.load_state_dict(part("averaged."))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in part("optimiser.").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.epoch, self.step, self.history = header["epoch"], header["step"], header["history"]
        self.best = {**header["best"], "state": part("best.")}


@contextlib.contextmanager
def _threads_for(config: FitConfig, device: torch.device) -> Iterator[None]:
    """One thread for batches that are too small to share: on a busy machine two wait for each other at every step."""
    before = torch.get_num_threads()
    if device.type == "cpu" and config.batch_size <= _SMALL_BATCH and config.skip != "ridge":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _mixed_up(batch: _Batch, strength: float, draws: np.random.Generator) -> _Batch:
    """Each row blended with another one of the batch, inputs and targets alike."""
    count = len(batch[0])
    share = draws.beta(strength, strength, (count, 1)).astype(np.float32)
    weight = torch.from_numpy(share).to(batch[0].device)
    other = torch.from_numpy(draws.permutation(count)).to(batch[0].device)
    old, side, new = batch
    blended = [torch.lerp(x[other], x, weight) for x in (old, new)]
    return blended[0], blended[0] if side is old else torch.lerp(side[other], side, weight), blended[1]


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Where an older torch does not tell, fp32.
    capabilities: JsonDict = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


Moment: TypeAlias = "tuple[int, Floats, Floats, Floats]"  # rows, shift, sum, sum of squares


def scalings_of(pairs: Pairs, standardise: bool, seed: int) -> Scalings:
    """(mean, scale) of old, side and new: each input dimension its own scale, the target one for all of them."""
    if not standardise:
        plain = (np.float32(0), np.float32(1))
        return plain, plain, plain
    sample = pairs.sample(_SCALING_SAMPLE, seed)
    moments: list[Moment | None] = [None, None, None]
    for begin in range(0, len(sample), _CHUNK):
        for i, rows in enumerate(sample.take(slice(begin, begin + _CHUNK))):
            if rows is not None:
                moments[i] = _added(moments[i], rows)

    def deviation_of(moment: Moment | None) -> tuple[Floats, Floats]:
        assert moment is not None  # there are pairs
        count, shift, total, squares = moment
        mean = total / count
        return mean + shift, np.sqrt(np.maximum(squares / count - mean**2, 0))

    def per_dimension(moment: Moment | None) -> Scaling:
        mean, deviation = deviation_of(moment)
        floor = max(float(deviation.max()) * 1e-3, np.finfo(np.float32).tiny)  # a constant dimension says nothing
        scale = np.where(deviation > floor, deviation, max(float(deviation.max()), 1e-12))
        return mean.astype(np.float32), scale.astype(np.float32)

    mean, deviation = deviation_of(moments[2])
    spread = float(np.sqrt((deviation**2).mean()))
    target = (mean.astype(np.float32), np.float32(spread if spread > 0 else 1.0))
    return per_dimension(moments[0]), per_dimension(moments[0] if moments[1] is None else moments[1]), target


def _added(moment: Moment | None, rows: Floats) -> Moment:
    """(rows, shift, sum, sum of squares) in float64, about a shift near the mean so that no digits are lost to it."""
    shift = rows.mean(axis=0, dtype=np.float64) if moment is None else moment[1]
    centred = rows.astype(np.float64) - shift
    count, total, squares = (0, 0.0, 0.0) if moment is None else (moment[0], moment[2], moment[3])
    return count + len(rows), shift, total + centred.sum(axis=0), squares + (centred**2).sum(axis=0)
