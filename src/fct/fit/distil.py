"""``config="best"``: several h averaged, and one h of the same shape taught what they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fct.fit.auto_fit import AutoFit, Climb
from fct.fit.auto_plan import student_config
from fct.fit.neighbours import NeighbourTest
from fct.fit.pair_training import PairTraining, scalings_of
from fct.fit.pairs import Pairs, check_pairs, fold_pairs
from fct.types import Floats

__all__ = ["distil"]

_MEMBERS = 3
_MEMBERS_FEW = 4
_MOST_EXTRA = 60_000  # rows without a new embedding that the student learns from


def distil(fit: AutoFit, found: Climb, extra: tuple[Floats, Floats | None] | None) -> Climb:
    """``found`` with the student in h's place, where the student finds more; else ``found``.

    The teachers are trainings of the chosen shape with other seeds. The student learns from the pairs (half the
    truth, half the teachers) and from rows without a new embedding (the teachers alone): the gallery's where they are
    given, else blends of pairs. Source: Hinton et al., arXiv:1503.02531.
    """
    if not fit.plan.folds:
        assert fit.held is not None
        student = _student(fit, found, fit.train, fit.held, extra)
        raw = student.predict(found.judged)
        better = _compared(fit, found, raw, found.raw, found.test)
        return replace(found, training=student, raw=raw) if better else found
    # Cross-fitted: one part judges whether a student pays; the one that is returned then learns from all pairs.
    part, held = fold_pairs(fit.train, fit.plan.folds, fit.seed)[0]
    rows = np.searchsorted(fit.train.index, held.index)
    student = _student(fit, found, part, held, extra)
    raw = student.predict(held)
    if not _compared(fit, found, raw, found.raw[rows], fit.make_test(held.loaded()[2])):
        return found
    whole = found.raw.copy()
    whole[rows] = raw
    student = _student(fit, found, fit.train, fit.train.sample(4_096, fit.seed), extra)
    return replace(found, training=student, raw=whole)


def _compared(fit: AutoFit, found: Climb, raw: Floats, before: Floats, test: NeighbourTest) -> bool:
    one, student = test.recall(test.finished(before)), test.recall(test.finished(raw))
    kept = "kept" if student > one else "not kept"
    fit.tell(f"student: recall@10 {student:.3f}, one h {one:.3f} on {len(raw):,} held-out rows: {kept}")
    return student > one


def _student(
    fit: AutoFit, found: Climb, train: Pairs, held: Pairs, extra: tuple[Floats, Floats | None] | None
) -> PairTraining:
    linear = found.linears[0]
    scalings = scalings_of(train, True, fit.seed)
    count = _MEMBERS_FEW if fit.plan.folds else _MEMBERS
    old, side, new = train.loaded()
    more_old, more_side = _extra_rows(old, side, extra, fit.seed)
    rows = check_pairs(more_old, more_side, np.zeros((len(more_old), train.dims[2]), np.float32))
    said_pairs, said_extra = np.zeros_like(new), np.zeros((len(rows), train.dims[2]), np.float32)
    for member in range(count):
        teacher = fit.one(train, held, found.config, scalings, linear, seed=fit.seed + 101 + member)
        said_pairs += teacher.predict(train) / count
        said_extra += teacher.predict(rows) / count
    whole = check_pairs(
        np.concatenate([old, more_old]),
        None if side is None else np.concatenate([side, more_side]),
        np.concatenate([(new + said_pairs) / 2, said_extra]),
    )
    fit.tell(f"{count} h averaged; a student learns from {len(train):,} pairs and {len(rows):,} rows without a target")
    config = student_config(found.config, len(whole))
    return fit.one(whole, held, config, scalings, linear, seed=fit.seed + 201)


def _extra_rows(
    old: Floats, side: Floats | None, extra: tuple[Floats, Floats | None] | None, seed: int
) -> tuple[Floats, Floats | None]:
    rng = np.random.default_rng([seed, 29])
    if extra is not None:
        chosen = np.sort(rng.permutation(len(extra[0]))[:_MOST_EXTRA])
        return extra[0][chosen], None if extra[1] is None else extra[1][chosen]
    count = min(2 * len(old), _MOST_EXTRA)
    a, b = rng.integers(0, len(old), (2, count))
    weight = rng.uniform(0.5, 1, (count, 1)).astype(np.float32)
    more: Floats = weight * old[a] + (1 - weight) * old[b]
    return more, None if side is None else weight * side[a] + (1 - weight) * side[b]
