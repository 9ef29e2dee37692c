"""``config="auto"``: climbs the plan's shapes, holds h against ridge and Procrustes, and returns what is best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fct.fit.auto_plan import FitPlan, flop_of
from fct.fit.linear_map import PENALTIES, LinearMap, RidgePath, procrustes_map
from fct.fit.neighbours import NeighbourTest
from fct.fit.pair_training import EpochReport, PairTraining, Scalings, scalings_of
from fct.fit.pairs import Pairs, fold_pairs
from fct.fit.recipes import FitConfig
from fct.types import Floats, Indices

__all__ = ["AutoFit", "Climb", "Judged", "Tell", "climb", "judge"]

GAIN = 0.01  # a dearer shape has to gain this share of recall@10
_MOST_JUDGED = 8_192  # held-out rows that recall is measured on
_BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
_CLEAR = 0.005  # h alone is kept unless a blend gains this share of recall@10

Tell = Callable[[str], None]  # hears each choice in a line
State = Callable[[int], Path | None]  # the checkpoint of the i-th training
Hear = Callable[[EpochReport], None]


@dataclass(frozen=True, eq=False, slots=True)
class Climb:
    """The shape that was chosen, trained; what it and the linear maps say of the held-out rows.

    training: the chosen h's. config: its numbers. judged: the pairs that all was measured on. raw: (n, d_new) h's
    output for them, not normalised, by a training that had not seen them. linears, linear_raws: the linear maps,
    fitted on all training pairs, and their output for the judged pairs, likewise unseen.
    recalls: what each shape reached, in the order it was tried, as (words, MFLOP a row, recall@10).
    parts: of a cross-fit: the judged rows that each training had left out; None: one training left out all.
    """

    training: PairTraining
    config: FitConfig
    judged: Pairs
    test: NeighbourTest
    raw: Floats
    linears: tuple[LinearMap, ...]
    linear_raws: tuple[Floats, ...]
    recalls: tuple[tuple[str, float, float], ...]
    parts: tuple[Indices, ...] | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Judged:
    """share: of h in what is returned, the rest is ``linear``'s: 1 is h alone, 0 the linear map alone.

    recall: recall@10 among the judged rows of h, of each linear map, and of what is returned, by name.
    """

    share: float
    linear: LinearMap
    raw: Floats
    recall: dict[str, float]


class AutoFit:
    """What every training of one call shares."""

    def __init__(
        self,
        train: Pairs,
        held: Pairs | None,
        plan: FitPlan,
        *,
        seed: int,
        device: torch.device,
        make_test: Callable[[Floats], NeighbourTest],
        tell: Tell,
        state: State,
        checkpoint_seconds: float = 30.0,
        on_epoch: Hear | None = None,
    ) -> None:
        self.train, self.held, self.plan, self.seed, self.device = train, held, plan, seed, device
        self.make_test, self.tell, self._on_epoch = make_test, tell, on_epoch
        self._state, self._checkpoint_seconds = state, checkpoint_seconds
        self._count = 0

    def one(
        self,
        train: Pairs,
        held: Pairs,
        config: FitConfig,
        scalings: Scalings,
        linear: LinearMap | None,
        seed: int | None = None,
    ) -> PairTraining:
        """Trains one h; its checkpoint is its own, since trainings come in the same order in every run."""
        training = PairTraining(train, held, config, self.seed if seed is None else seed, self.device, scalings, linear)
        training.run(self._state(self._count), self._checkpoint_seconds, self._on_epoch)
        self._count += 1
        return training


def climb(fit: AutoFit) -> Climb:
    """Trains the plan's shapes from the cheapest on, until a dearer one no longer gains a hundredth of recall@10."""
    return _climb_folds(fit) if fit.plan.folds else _climb_held(fit)


def _linear_maps(fit: AutoFit, train: Pairs, judged: Pairs, test: NeighbourTest) -> list[tuple[LinearMap, Floats]]:
    """Ridge of the penalty that does best on ``judged``, and Procrustes, each with what it says of ``judged``."""
    old, side, _ = judged.loaded()
    path = RidgePath(train, fit.seed)
    maps = [(m, m(old, side)) for m in map(path.at, PENALTIES)]
    best = max(maps, key=lambda pair: test.recall(test.finished(pair[1])))
    rotation = procrustes_map(train, fit.seed)
    return [best, (rotation, rotation(old, side))]


def _climb_held(fit: AutoFit) -> Climb:
    assert fit.held is not None
    judged = fit.held.sample(_MOST_JUDGED, fit.seed)
    test = fit.make_test(judged.loaded()[2])
    linears = _linear_maps(fit, fit.train, judged, test)
    scalings = scalings_of(fit.train, True, fit.seed)
    plan = fit.plan

    def trained(config: FitConfig, pairs: Pairs) -> tuple[PairTraining, Floats]:
        assert fit.held is not None
        training = fit.one(pairs, fit.held, config, scalings, linears[0][0])
        return training, training.predict(judged)

    pilot = plan.pilot_epochs is not None
    sample = fit.train.sample(plan.pilot_pairs, fit.seed) if pilot else fit.train
    rungs = [_shortened(c, plan.pilot_epochs) for c in plan.rungs] if plan.pilot_epochs else list(plan.rungs)
    tried: list[tuple[PairTraining, Floats]] = []
    recalls: list[tuple[str, float, float]] = []
    for config in rungs:
        tried.append(trained(config, sample))
        recalls.append(_told(fit, config, test.recall(test.finished(tried[-1][1])), pilot))
        if _no_gain(recalls):
            break
    chosen = _cheapest(recalls)
    training, raw = tried[chosen]
    config = plan.rungs[chosen]
    if pilot:
        training, raw = trained(config, fit.train)
        recalls.append(_told(fit, config, test.recall(test.finished(raw)), False))
    maps, raws = zip(*linears, strict=True)
    return Climb(training, config, judged, test, raw, maps, raws, tuple(recalls))


def _climb_folds(fit: AutoFit) -> Climb:
    """Few pairs: every row is judged by a training that left it out, and the chosen shape is then trained on all."""
    train, plan = fit.train, fit.plan
    test = fit.make_test(train.loaded()[2])
    folds = fold_pairs(train, plan.folds, fit.seed)
    where = [np.searchsorted(train.index, held.index) for _, held in folds]
    scalings = scalings_of(train, True, fit.seed)

    def gathered(parts: Sequence[Floats]) -> Floats:
        out = np.empty((len(train), train.dims[2]), np.float32)
        for rows, part in zip(where, parts, strict=True):
            out[rows] = part
        return out

    paths = [RidgePath(part, fit.seed) for part, _ in folds]
    inputs = [held.loaded()[:2] for _, held in folds]

    def ridge(penalty: float) -> Floats:
        return gathered([p.at(penalty)(*x) for p, x in zip(paths, inputs, strict=True)])

    raws = {penalty: ridge(penalty) for penalty in PENALTIES}
    penalty = max(PENALTIES, key=lambda p: test.recall(test.finished(raws[p])))
    rotated = gathered([procrustes_map(part, fit.seed)(*x) for (part, _), x in zip(folds, inputs, strict=True)])
    tried: list[Floats] = []
    recalls: list[tuple[str, float, float]] = []
    for config in plan.rungs:
        last = replace(config, validate_every=config.epochs)  # no row chooses the epoch that it is judged by
        parts = [
            fit.one(part, held, last, scalings, path.at(penalty)).predict(held)
            for (part, held), path in zip(folds, paths, strict=True)
        ]
        tried.append(gathered(parts))
        recalls.append(_told(fit, config, test.recall(test.finished(tried[-1])), False))
        if _no_gain(recalls):
            break
    chosen = _cheapest(recalls)
    config = replace(plan.rungs[chosen], validate_every=plan.rungs[chosen].epochs)
    whole = RidgePath(train, fit.seed).at(penalty)
    training = fit.one(train, train.sample(_MOST_JUDGED, fit.seed), config, scalings, whole)
    maps = (whole, procrustes_map(train, fit.seed))
    raw_maps = (raws[penalty], rotated)
    return Climb(training, config, train, test, tried[chosen], maps, raw_maps, tuple(recalls), tuple(where))


def _shortened(config: FitConfig, epochs: int) -> FitConfig:
    return replace(config, epochs=epochs, warmup_epochs=epochs / 16, validate_every=max(1, epochs // 4))


def _told(fit: AutoFit, config: FitConfig, recall: float, pilot: bool) -> tuple[str, float, float]:
    mflop = flop_of(config, fit.train.dims, fit.train.side is not None) / 1e6
    words = f"branches {config.branch}, mixer {config.inner}" + (f", {config.epochs} epochs first" if pilot else "")
    fit.tell(f"{words}: {mflop:.2f} MFLOP a row, recall@10 {recall:.3f}")
    return words, mflop, recall


def _no_gain(recalls: Sequence[tuple[str, float, float]]) -> bool:
    return len(recalls) > 1 and recalls[-1][2] < (1 + GAIN) * max(r for _, _, r in recalls[:-1])


def _cheapest(recalls: Sequence[tuple[str, float, float]]) -> int:
    """The first (cheapest) within a hundredth of the best."""
    best = max(r for _, _, r in recalls)
    return next(i for i, (_, _, r) in enumerate(recalls) if r >= (1 - GAIN) * best)


def judge(found: Climb, tell: Tell) -> Judged:
    """h, the better linear map, or a blend of the two (which folds into h's linear path): whichever finds most."""
    test = found.test
    floor = {m.name.split(" ")[0]: test.recall(test.finished(r)) for m, r in _named(found)}
    best = int(np.argmax(list(floor.values())))
    linear, other = found.linears[best], found.linear_raws[best]
    recall = {}
    for share in _BLENDS:
        recall[share] = test.recall(test.finished(share * found.raw + (1 - share) * other))
    top = max(_BLENDS, key=lambda share: recall[share])
    share = 1.0 if recall[1.0] >= (1 - _CLEAR) * recall[top] and recall[1.0] >= recall[0.0] else top
    floors = ", ".join(f"{name} {value:.3f}" for name, value in floor.items())
    kind = "h alone" if share == 1 else f"{linear.name} alone" if share == 0 else f"{share:g} h + {linear.name}"
    tell(f"recall@10 on {len(found.judged):,} held-out rows: h {recall[1.0]:.3f}, {floors}; returned: {kind}")
    names = {"h": recall[1.0], **floor, "returned": recall[share]}
    return Judged(share, linear, share * found.raw + (1 - share) * other, names)


def _named(found: Climb) -> list[tuple[LinearMap, Floats]]:
    return list(zip(found.linears, found.linear_raws, strict=True))
