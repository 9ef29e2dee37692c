"""Fitting h on pairs of (old embedding, side-information, new embedding)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fct.artifact.transformation import Tolerance, Transformation
from fct.atomic_files import atomic_path
from fct.checks import check_flag, check_number, check_path, check_seed
from fct.errors import ArtifactError
from fct.fit.module import Scaling, TransformationModule, to_transformation
from fct.fit.pairs import Pairs, check_pairs, split_pairs
from fct.fit.recipes import FitConfig, resolve_config
from fct.fit.training_device import training_device
from fct.progress import step_bar
from fct.spaces import EmbeddingSpace, check_space

__all__ = ["EpochReport", "fit_transformation"]

_SCALING_SAMPLE = 200_000  # rows that the mean and the scale are taken from
_MEASURED_PAIRS = 4_096  # validation rows that the precisions are measured on


@dataclass(frozen=True, slots=True)
class EpochReport:
    """One epoch: mean squared errors per element, in the new space's own units."""

    epoch: int
    train_mse: float
    validation_mse: float
    seconds: float


def fit_transformation(
    old: Any,
    side_info: Any,
    new: Any,
    *,
    validation: float | tuple[Any, Any, Any] | None = None,
    config: str | FitConfig = "auto",
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
    old_space: EmbeddingSpace | None = None,
    new_space: EmbeddingSpace | None = None,
    side_model: str = "side-information",
    tolerance: Tolerance | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> Transformation:
    """Learns h with ``h(old, side_info) ≈ new`` from pairs; no other network runs here.

    Args:
        old, new: (n, d_old) and (n, d_new) embeddings of the same n items by the old and the new model; float32,
            float16, bfloat16 or :class:`fct.ScaledInt8`; numpy (mapped files too: the pairs need not fit in memory),
            torch or DLPack.
        side_info: (n, d_side) side-information of the same items, or None: the old embedding takes its place.
        validation: a share to hold out (None: 5 %, at most 20,000 rows), or a tuple (old, side_info, new) of its own.
        config: "auto" (our default), "paper" (Ramanujan et al. to the letter), or a
            :class:`fct.fit.recipes.FitConfig`.
        seed: same seed, same data and same machine give the same h.
        device: "auto" (a GPU where torch sees one), "cpu", "cuda", ...
        progress: show a bar on stderr, where that is a terminal or a notebook.
        old_space, new_space: whose vectors these are; by default named "old" and "new", normalised where every row
            given is of unit length. h's output is normalised where the new space is.
        side_model: the id of the model that made side_info.
        tolerance: what ``precision="auto"`` may cost later.
        checkpoint: a file to write the state to every ``checkpoint_seconds`` and to go on from; removed when done.
        on_epoch: called after each epoch.

    Returns:
        The h of the epoch with the lowest validation error; its ``info`` holds the figures, its ``precisions`` the
        measured effect of bf16 and int8 on retrieval among the validation pairs.

    Raises:
        TypeError, ValueError: bad arrays or settings. ArtifactError: the checkpoint belongs to another fit.

    Source: Ramanujan et al., "Forward Compatible Training for Large-Scale Embedding Retrieval Systems", CVPR 2022,
    arXiv:2112.02805.

    Example:
        >>> import numpy as np, fct
        >>> from fct.fit.recipes import FitConfig
        >>> rng = np.random.default_rng(0)
        >>> old, side = rng.standard_normal((2, 200, 8)).astype(np.float32)
        >>> h = fct.fit_transformation(old, side, np.tanh(old + side), progress=False,
        ...                            config=FitConfig(inner=16, epochs=2, batch_size=64))
        >>> h.d_new
        8
    """
    settings = resolve_config(config)
    check_seed(seed)
    check_flag(progress, "progress")
    check_number(checkpoint_seconds, "checkpoint_seconds", 0)
    if tolerance is not None and not isinstance(tolerance, Tolerance):
        raise TypeError(f"tolerance: expected a Tolerance or None, got {type(tolerance).__name__}")
    state = None if checkpoint is None else check_path(checkpoint, "checkpoint", "a path or None")
    if on_epoch is not None and not callable(on_epoch):
        raise TypeError(f"on_epoch: expected a function or None, got {type(on_epoch).__name__}")
    pairs = check_pairs(old, side_info, new)
    train, held = _split(pairs, validation, seed)
    _check_space(old_space, train.old.d, "old_space")
    _check_space(new_space, train.new.d, "new_space")
    target = training_device(device)
    sample = train.sample(_SCALING_SAMPLE, seed).loaded()
    old_space = old_space or _guess_space("old", sample[0])
    new_space = new_space or _guess_space("new", sample[2])

    fit = _Fit(train, held, settings, seed, target, sample)
    if state is not None:
        fit.resume(state)
    begun = time.monotonic()
    fit.run(progress, state, checkpoint_seconds, on_epoch)
    best = fit.best
    variance = fit.held_variance
    h = to_transformation(
        fit.best_module(),
        old_scaling=fit.scalings[0],
        side_scaling=fit.scalings[1],
        new_scaling=fit.scalings[2],
        old_space=old_space,
        new_space=new_space,
        side_model=None if train.side is None else side_model,
        normalise=new_space.normalised,
        info={
            "config": settings.to_dict(),
            "recipe": config if isinstance(config, str) else "custom",
            "seed": seed,
            "pairs": len(train),
            "validation_pairs": len(held),
            "best_epoch": best["epoch"],
            "validation": {"mse": best["mse"], "r2": 1 - best["mse"] / variance if variance > 0 else 0.0},
            "history": fit.history,
            "seconds": round(time.monotonic() - begun, 3),
            "device": str(target),
            "torch": torch.__version__,
        },
    )
    h = _measure(h.with_(tolerance=tolerance or Tolerance()), train, held, seed, progress)
    if state is not None:
        state.unlink(missing_ok=True)
    return h


def _split(pairs: Pairs, validation: Any, seed: int) -> tuple[Pairs, Pairs]:
    if validation is None:
        return split_pairs(pairs, 0.05, seed)
    if isinstance(validation, float):
        return split_pairs(pairs, validation, seed)
    if not isinstance(validation, tuple) or len(validation) != 3:
        raise ValueError(
            f"validation: expected a share or a tuple (old, side_info, new), got {type(validation).__name__}"
        )
    held = check_pairs(*validation, prefix="validation ")
    if (held.side is None) != (pairs.side is None):
        raise ValueError("validation: expected side_info in both or in neither of training and validation pairs")
    if held.dims != pairs.dims:
        raise ValueError(f"validation: expected dims {pairs.dims} to match the training pairs, got {held.dims}")
    if len(pairs) < 2:
        raise ValueError(f"old: expected at least 2 rows to train on, got {len(pairs)}")
    return pairs, held


def _check_space(space: EmbeddingSpace | None, d: int, name: str) -> None:
    check_space(space, name)
    if space is not None and space.dim != d:
        raise ValueError(f"{name}: expected dim {d} to match the rows, got {space}")


def _guess_space(model_id: str, rows: Any) -> EmbeddingSpace:
    unit = bool(np.all(np.abs(np.linalg.norm(rows, axis=1) - 1) < 1e-2))
    return EmbeddingSpace(model_id, int(rows.shape[1]), normalised=unit)


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Where an older torch does not tell, fp32.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _measure(h: Transformation, train: Pairs, held: Pairs, seed: int, progress: bool) -> Transformation:
    """Calibrates int8 on training rows and stores how each precision changes retrieval on the held-out ones."""
    from fct.fit.precision_choice import calibrate, measure_precisions

    old, side, _ = train.sample(_MEASURED_PAIRS, seed).loaded()
    h = calibrate(h, old, side)
    old, side, new = held.sample(_MEASURED_PAIRS, seed).loaded()
    return measure_precisions(h, old, side, new, progress=progress)


class _Fit:
    """The state of one fit: module, optimiser, average, best checkpoint, history; and its loop."""

    def __init__(
        self,
        train: Pairs,
        held: Pairs,
        config: FitConfig,
        seed: int,
        device: torch.device,
        sample: tuple[Any, Any, Any],
    ) -> None:
        self.train, self.held, self.config, self.seed, self.device = train, held, config, seed, device
        d_old, d_side, d_new = train.dims
        self.scalings = _scalings(sample, config.standardise)
        self.held_data = self._to_device(held.loaded())
        scale = torch.as_tensor(self.scalings[2][1], device=device)
        self._unit = float(scale) ** 2  # from the loss's units to the new space's
        self.held_variance = float(self.held_data[2].var(dim=0, unbiased=False).mean()) * self._unit
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = TransformationModule(d_old, d_side, d_new, config.inner)
        self.module.to(device)
        adam = torch.optim.AdamW if config.decoupled_decay else torch.optim.Adam
        self.optimiser = adam(self.module.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.averaged: AveragedModel | None = None
        if config.average:
            decay = get_ema_multi_avg_fn(config.average)
            self.averaged = AveragedModel(self.module, multi_avg_fn=decay, use_buffers=True)
        self.epoch = 0
        self.step = 0
        self.best: dict[str, Any] = {"epoch": 0, "mse": math.inf, "state": {}}
        self.history: list[dict[str, float]] = []
        self._bf16 = config.mixed_precision and _has_fast_bf16(device)
        self._cached = self._to_device(train.loaded()) if train.fits_in_memory else None

    # ---- data ----
    def _to_device(self, arrays: tuple[Any, Any, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        def scaled(array: Any, scaling: Scaling) -> torch.Tensor:
            mean, scale = scaling
            if not self.config.standardise:
                return torch.from_numpy(array).to(self.device)
            return torch.from_numpy((array - mean) / scale).to(self.device)

        old, new = scaled(arrays[0], self.scalings[0]), scaled(arrays[2], self.scalings[2])
        return old, old if arrays[1] is None else scaled(arrays[1], self.scalings[1]), new

    # ---- the loop ----
    def run(
        self,
        progress: bool,
        checkpoint: Path | None,
        checkpoint_seconds: float,
        on_epoch: Callable[[EpochReport], None] | None,
    ) -> None:
        saved = time.monotonic()
        with step_bar(progress) as bar:
            task = bar.add_task("fitting h", total=self.config.epochs, completed=self.epoch)
            while self.epoch < self.config.epochs:
                report = self._one_epoch()
                if on_epoch is not None:
                    on_epoch(report)
                if checkpoint is not None and time.monotonic() - saved >= checkpoint_seconds:
                    self.save(checkpoint)
                    saved = time.monotonic()
                text = f"fitting h (validation mse {self.best['mse']:.3g})"
                bar.update(task, completed=self.epoch, description=text)

    def _one_epoch(self) -> EpochReport:
        begun = time.monotonic()
        config = self.config
        self.module.train()
        if self.epoch >= round(config.freeze_norm_at * config.epochs):
            self.module.freeze_norm()
        total, rows = torch.zeros((), device=self.device), 0
        for pool in self.train.order(self.seed, self.epoch):
            if self._cached is not None:
                data, order = self._cached, torch.from_numpy(pool).to(self.device)
            else:
                data, order = self._to_device(self.train.take(pool)), torch.arange(len(pool), device=self.device)
            for index in order.split(config.batch_size):
                if len(index) < 2:  # batch norm has no variance of one row; the next epoch's order differs
                    continue
                total += self._one_step(*(part.index_select(0, index) for part in data)) * len(index)
                rows += len(index)
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
        if self.averaged is not None:
            self.averaged.update_parameters(self.module)
        return loss.detach()

    def _schedule(self) -> float:
        """Share of the peak learning rate at this step: a linear rise, then half a cosine."""
        per_epoch = max(1, math.ceil(len(self.train) / self.config.batch_size))
        at, warm, end = (self.step + 1) / per_epoch, self.config.warmup_epochs, float(self.config.epochs)
        if at < warm:
            return at / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (at - warm) / max(end - warm, 1e-9))))

    def _candidate(self) -> TransformationModule:
        module = self.averaged.module if self.averaged is not None else self.module
        assert isinstance(module, TransformationModule)
        return module

    @torch.inference_mode()
    def _validate(self) -> float:
        module = self._candidate().eval()
        old, side, new = self.held_data
        total = 0.0
        for part in torch.arange(len(new), device=self.device).split(4096):
            total += float(functional.mse_loss(module(old[part], side[part]), new[part], reduction="sum"))
        mse = total / new.numel() * self._unit
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
        module = TransformationModule(*self.train.dims, self.config.inner)
        module.load_state_dict(self.best["state"])
        return module.eval()

    # ---- checkpoints: tensors in a .safetensors file, nothing pickled ----
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
        from safetensors.torch import save_file

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
        with atomic_path(path) as part:
            owned = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
            save_file(owned, str(part), metadata={"fct-fit": json.dumps(header)})

    def resume(self, path: Path) -> None:
        """Goes on from ``path`` where it exists; refuses the checkpoint of another fit."""
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            return
        try:
            with safe_open(str(path), framework="pt", device=str(self.device)) as file:
                header = json.loads((file.metadata() or {}).get("fct-fit", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(f"checkpoint: expected a whole .safetensors file, {path} is not: {error}") from error
        if not isinstance(header, dict) or header["identity"] != self._identity():
            raise ArtifactError(
                f"checkpoint: {path} belongs to another fit (other pairs, settings or seed); remove it or name another"
            )

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


def _scalings(sample: tuple[Any, Any, Any], standardise: bool) -> tuple[Scaling, Scaling, Scaling]:
    """(mean, scale) of old, side and new: each input dimension its own scale, the target one for all of them."""
    if not standardise:
        plain = (np.float32(0), np.float32(1))
        return plain, plain, plain

    def per_dimension(rows: Any) -> Scaling:
        deviation = rows.std(axis=0)
        floor = max(float(deviation.max()) * 1e-3, np.finfo(np.float32).tiny)  # a constant dimension says nothing
        scale = np.where(deviation > floor, deviation, max(float(deviation.max()), 1e-12))
        return rows.mean(axis=0).astype(np.float32), scale.astype(np.float32)

    old, side, new = sample
    mean = new.mean(axis=0)
    spread = float(np.sqrt(((new - mean) ** 2).mean()))
    target = (mean.astype(np.float32), np.float32(spread if spread > 0 else 1.0))
    return per_dimension(old), per_dimension(old if side is None else side), target
