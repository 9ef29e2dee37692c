"""What ``config="auto"`` will do for so many pairs of such dims in so many seconds: shapes, schedule, validation.

Everything follows from numbers that are known before the fit, through a cost model in nominal seconds of two cores,
so that the same pairs give the same plan (and the same h) on a slow day too. The constants were measured; see
docs/fitting.md.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from fct.fit.recipes import FitConfig

__all__ = ["FitPlan", "flop_of", "nominal_seconds", "plan_fit", "student_config"]

FEW_PAIRS = 4_000  # under this: small batches, blended pairs, cross-fitting
_FEW_STEPS, _FEW_BATCH = 600, 64
_ROWS = 600_000  # rows read in all, where that is between 16 and 48 epochs
_LEAST_EPOCHS, _MOST_EPOCHS = 16, 48
_FOLDS = 4
# (width of a branch's one block, width of the mixer's one block), cheapest first.
_SHAPES = ((128, 256), (128, 512), (256, 512), (384, 768), (512, 1024))
_WIDE_LINEAR = 1 << 20  # weights of a linear path from which on it is solved for, not trained
# Nominal costs on two cores with AVX-512: of a multiply-add's floating-point operation, of a value that passes batch
# norm, ReLU and back, of a weight in the optimiser's and the average's step, and of a step itself; seconds.
_FLOP, _VALUE, _WEIGHT, _STEP = 1 / 360e9, 2e-9, 1.4e-9, 3e-4


@dataclass(frozen=True, slots=True)
class FitPlan:
    """rungs: configurations by cost, to be climbed while a dearer one gains; pilot: what they get first where there
    is no time to train them all in full, else None; folds: parts of a cross-fit, 0 for held-out pairs; held_share:
    share of the pairs to hold out where there are no folds; seconds: the nominal budget; why: the choices in words.
    """

    rungs: tuple[FitConfig, ...]
    pilot_epochs: int | None
    pilot_pairs: int
    folds: int
    held_share: float
    seconds: float
    why: tuple[str, ...]


def flop_of(config: FitConfig, dims: tuple[int, int, int], two_inputs: bool) -> int:
    """Floating-point operations of one row through h of this shape, a multiply-add counted as two."""
    return 2 * sum(a * b for a, b in _matrices(config, dims, two_inputs))


def _matrices(config: FitConfig, dims: tuple[int, int, int], two_inputs: bool) -> list[tuple[int, int]]:
    d_old, d_side, d_new = dims
    wide = config.branch or 2 * d_new
    found = []
    for d in (d_old, d_side):
        found += [(d, wide)] if config.branch else [(d, 2 * d), (2 * d, wide)]
    widths = [2 * wide] + [config.inner] * config.mixer_blocks + [d_new]
    found += list(itertools.pairwise(widths))
    if config.skip != "none":
        found.append((d_old + (d_side if two_inputs else 0), d_new))
    return found


def nominal_seconds(config: FitConfig, pairs: int, dims: tuple[int, int, int], two_inputs: bool) -> float:
    """What one training costs in nominal seconds."""
    matrices = _matrices(config, dims, two_inputs)
    linear = [matrices.pop()] if config.skip != "none" else []
    learnt = matrices + (linear if config.skip == "learned" else [])
    flop = 6 * sum(a * b for a, b in learnt) + 2 * sum(a * b for a, b in (linear if config.skip == "ridge" else []))
    values = 2 * sum(b for _, b in matrices) + sum(dims)
    steps = config.epochs * math.ceil(pairs / config.batch_size)
    weights = sum(a * b for a, b in learnt)
    return config.epochs * pairs * (flop * _FLOP + values * _VALUE) + steps * (weights * _WEIGHT + _STEP)


def default_seconds(pairs: int, dims: tuple[int, int, int]) -> float:
    """The budget where none was given: 40 s for small vectors, 60 s for 5,000 pairs of 1,536 and 3,072 dims, 120 s for
    20,000 of them, and so on with the square root of the number; at most half an hour."""
    return min(1_800.0, max(40.0, 60.0 * math.sqrt(pairs / 5_000) * sum(dims) / 6_144))


def plan_fit(
    pairs: int, dims: tuple[int, int, int], *, two_inputs: bool, own_validation: bool, seconds: float | None
) -> FitPlan:
    """The plan for ``pairs`` pairs of ``dims`` = (d_old, d_side, d_new).

    two_inputs: whether there is side-information. own_validation: whether held-out pairs were given. seconds: the
    budget; None: :func:`default_seconds`.
    """
    few = pairs < FEW_PAIRS
    base = _few(pairs) if few else _many(pairs)
    wide = (dims[0] + (dims[1] if two_inputs else 0)) * dims[2] >= _WIDE_LINEAR
    base = replace(base, skip="ridge" if wide else "learned")
    rungs = tuple(replace(base, branch=b, inner=m) for b, m in _shapes(pairs, dims[2]))

    def cost(configs: tuple[FitConfig, ...], epochs: int | None = None, rows: int = pairs) -> float:
        chosen = configs if epochs is None else tuple(replace(c, epochs=epochs) for c in configs)
        return sum(nominal_seconds(c, rows, dims, two_inputs) for c in chosen)

    budget = seconds or max(default_seconds(pairs, dims), min(1_800.0, 2.5 * cost(rungs[-1:], 1)))
    room = 0.7 * budget  # the rest: linear maps, measuring, and a machine that has other work
    affordable = tuple(c for c in rungs if cost((c,), 1) <= 0.65 * room)
    rungs = affordable or rungs[:1]
    folds = 0
    if few and not own_validation and pairs >= 8:
        folds = _FOLDS if cost(rungs) * (_FOLDS * 0.75 + 1) <= room else 0
    held = 0.0 if own_validation or folds else max(0.05, min(0.2, 1_000 / pairs)) if pairs < 20_000 else 0.05
    pilot, sample = None, pairs
    whole = cost(rungs)
    if not folds and whole > room:
        sample = min(pairs, 50_000)
        pilot = max(1, min(math.floor(0.35 * room / cost(rungs, 1, sample)), base.epochs // 2))
        epochs = max(1, min(base.epochs, math.floor(0.65 * room / cost(rungs[-1:], 1))))
        rungs = tuple(_scheduled(c, epochs, pairs) for c in rungs)
    why = (
        f"{pairs:,} pairs: {rungs[0].epochs} epochs of {base.batch_size} rows, rate {base.lr:g}, average "
        f"{rungs[0].average:g}, mixup {base.mixup:g}" + (f" (few pairs: at least {_FEW_STEPS:,} steps)" if few else ""),
        f"{base.skip} linear skip" + (" (too wide to train: solved for)" if wide else " (trained with h)"),
        f"chosen on {folds} cross-fitted parts" if folds else "chosen on held-out pairs",
        f"budget {budget:g} nominal seconds"
        + (f": shapes compared after {pilot} epochs of {sample:,} pairs" if pilot else ": every shape trained in full"),
    )
    return FitPlan(rungs, pilot, sample, folds, held, budget, why)


def _shapes(pairs: int, d_new: int) -> tuple[tuple[int, int], ...]:
    first = 0 if d_new <= 192 else 1
    if d_new > 768:
        return (_SHAPES[0], _SHAPES[2])
    if pairs < FEW_PAIRS:
        return _SHAPES[first : first + 2]
    return _SHAPES[first : first + (4 if pairs >= 200_000 else 3)]


def _ours(pairs: int, epochs: int, batch: int) -> FitConfig:
    base = FitConfig(
        batch_size=batch,
        weight_decay=0.3,
        decoupled_decay=True,
        freeze_norm_at=1.0,
        standardise=True,
        mixed_precision=True,
        mixer_blocks=1,
        warm_average=True,
    )
    return _scheduled(base, epochs, pairs)


def _scheduled(config: FitConfig, epochs: int, pairs: int) -> FitConfig:
    steps = epochs * math.ceil(pairs / config.batch_size)
    return replace(
        config,
        epochs=epochs,
        warmup_epochs=epochs / 16,
        average=max(0.0, min(0.99, 1 - 10 / steps)),
        validate_every=max(1, epochs // 16),
    )


def _few(pairs: int) -> FitConfig:
    batch = max(2, min(_FEW_BATCH, pairs // 2))
    epochs = max(_LEAST_EPOCHS, math.ceil(_FEW_STEPS / math.ceil(pairs / batch)))
    return replace(_ours(pairs, epochs, batch), lr=8e-3, mixup=1.0)


def _many(pairs: int) -> FitConfig:
    epochs = max(_LEAST_EPOCHS, min(_MOST_EPOCHS, round(_ROWS / pairs)))
    return replace(_ours(pairs, epochs, 256), lr=4e-3)


def student_config(teacher: FitConfig, rows: int) -> FitConfig:
    """The teacher's shape with the schedule of ``rows`` rows; nothing is blended, the rows are many enough."""
    schedule = _many(rows) if rows >= FEW_PAIRS else replace(_few(rows), mixup=0.0)
    return replace(schedule, branch=teacher.branch, inner=teacher.inner, skip=teacher.skip)
