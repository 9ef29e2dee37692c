"""What could be done instead, on the same pairs: each map fitted on one part, measured on another."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from fct.artifact.transformation import Layer, Transformation
from fct.baselines import fit_procrustes, fit_residual, fit_ridge
from fct.checks import check_choice, check_items, check_number, check_positive, check_seed, check_share
from fct.errors import FctWarning
from fct.fit.transformation_fit import fit_transformation
from fct.judging.learning_curve import CurvePoint, extrapolate
from fct.judging.pair_coverage import neighbour_means, recalls_at_10, unlike_pairs
from fct.metrics import evaluate
from fct.progress import step_bar
from fct.rows import check_labels, rows_of
from fct.spaces import METRICS, EmbeddingSpace
from fct.transform import transform_batch
from fct.types import JsonDict

__all__ = ["Alternative", "Comparison", "compare_alternatives"]

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.generic]
_SHARES = (8, 4, 2, 1)
_LEAST_PAIRS = 16  # of a point of the curve
_NEIGHBOURS = (1, 3, 10, 30)
_MOST_HELD_OUT = 5_000
_LEAST_HELD_OUT = 50  # where there are 100 pairs or more: among fewer rows ten neighbours are a large part of all
_LEAST_RANKED = 12  # with eleven, every ranking finds all ten
_LOUD_CHANCE = 0.1
_LOUD_UNLIKE = 0.05


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to go on. recall_at_10, cmc1 and map are shares in [0, 1] of held-out rows; cmc1 and map need labels.

    bytes_per_row: the float32 vector that is searched, and the side-information that is kept for it.
    rows_per_s: of ``transform_batch`` on this machine. hours, cost: for the rows and the price asked about; 0 where the
    gallery stays as it is.
    """

    name: str
    recall_at_10: float
    cmc1: float | None
    map: float | None
    fit_seconds: float
    mflop_per_row: float
    rows_per_s: float | None
    bytes_per_row: int
    hours: float
    cost: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What :func:`compare_alternatives` measured.

    ceiling: recall@10 of a k-NN oracle, "old" and, with side-information, "old + side-information". An estimate from
    below: k-NN regression with the k that is best on the held-out rows, which a good map may pass.
    unlike_gallery: share of the gallery's sample that no pair resembles, None without one.
    held_out_pairs: that were measured on. notes: what a reader of the figures must know: copies among the pairs, what
        chance alone reaches, labels that say nothing, a gallery that is something else.
    mixed: :class:`fct.MixedReport` of "auto" as plain values: its gallery with 10 to 90 % true rows, as they are and
        corrected; None where the fit had too few pairs to measure it.
    """

    metric: str
    train_pairs: int
    held_out_pairs: int
    alternatives: tuple[Alternative, ...]
    ceiling: dict[str, float]
    curve: tuple[CurvePoint, ...]
    curve_of: str
    unlike_gallery: float | None
    rows: float
    notes: tuple[str, ...] = ()
    mixed: JsonDict | None = None

    def to_json(self) -> str:
        """Every figure, as text."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"


@dataclass(frozen=True, eq=False, slots=True)
class _Part:
    old: Floats
    side: Floats | None
    new: Floats

    def __len__(self) -> int:
        return len(self.old)

    def take(self, rows: npt.NDArray[np.int64]) -> _Part:
        return _Part(self.old[rows], None if self.side is None else self.side[rows], self.new[rows])


_Fit = Callable[[_Part], Transformation]


@dataclass(frozen=True, slots=True)
class _Way:
    """A map to fit. with_side: it reads side-information. of_queries: it brings new queries to the old gallery."""

    fit: _Fit
    with_side: bool = False
    of_queries: bool = False


def compare_alternatives(
    old: Floats,
    side_info: Floats | None,
    new: Floats,
    *,
    labels: Sequence[object] | Labels | None = None,
    gallery: Floats | None = None,
    extra: Sequence[str] = (),
    metric: str = "l2",
    held_out: float = 0.2,
    curve: str = "auto",
    rows: float = 1e9,
    price_per_hour: float | None = None,
    measure_seconds: float = 0.3,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Fits what users would do instead on the same pairs, and measures each on pairs that no fit has seen.

    Args:
        old: (n, d_old), side_info: (n, d_side) or None, new: (n, d_new): embeddings of the same n items, n >= 100.
        labels: (n,) integers or strings, for CMC top-1 and mAP.
        gallery: (m, d_old), a sample of the gallery's old vectors: do the pairs resemble it?
        extra: also "paper" and "best", which take minutes.
        metric: how vectors of both spaces are compared: "l2", "ip" or "cosine".
        held_out: share of the pairs, at most 5,000 of them and at least 50. Pairs of equal old vectors stay on one
            side, and whole copies of a held-out pair are left out.
        curve: what the learning curve is of: "auto", "ridge", or "none".
        rows, price_per_hour: of the gallery that hours and cost are for.
        measure_seconds: how long each map's speed is measured.
        seed: of the split and the fits. progress: show a bar.

    Returns:
        Comparison. "nothing" is old queries in the old gallery; in "residual MLP, queries to old" new queries are
        mapped and search the old gallery, which stays; in all others new queries search the mapped gallery.

    Raises:
        ValueError: arrays that do not fit, too few pairs, an unknown name.

    Examples:
        >>> import numpy as np, fct
        >>> x = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
        >>> fct.compare_alternatives(x, None, x[:, ::-1].copy(), curve="none").alternatives[1].name  # doctest: +SKIP
        'procrustes'
    """
    check_choice(metric, "metric", METRICS)
    check_choice(curve, "curve", ("auto", "ridge", "none"))
    for name in check_items(extra, "extra", "some of paper, best"):
        check_choice(name, "extra", ("paper", "best"))
    check_share(held_out, "held_out")
    check_positive(rows, "rows")
    check_positive(measure_seconds, "measure_seconds")
    if price_per_hour is not None:
        check_number(price_per_hour, "price_per_hour", 0)
    check_seed(seed)
    pairs = _checked(old, side_info, new)
    split = _Split.of(pairs, labels, held_out, seed)
    train = split.train
    unlike = None if gallery is None else unlike_pairs(pairs.old, gallery)
    judge = _Judge(split.held, split.labels, metric, rows, price_per_hour, measure_seconds)
    found = [judge.nothing()]
    recalls: dict[str, Floats] = {}
    fitted: dict[str, Transformation] = {}
    fits = _fits(train, extra, metric, seed)
    sizes = [] if curve == "none" else [n for n in (len(train) // part for part in _SHARES) if n >= _LEAST_PAIRS]
    with step_bar(progress) as bar:
        task = bar.add_task("comparing", total=len(fits) + max(0, len(sizes) - 1))
        for name, way in fits.items():
            bar.update(task, description=f"fitting {name}")
            row, recalls[name], fitted[name] = judge.map(name, way, train)
            found.append(row)
            bar.advance(task)
        points: list[Floats] = []
        for size in sizes[:-1]:
            bar.update(task, description=f"{curve} on {size:,} pairs")
            part = train.take(np.random.default_rng([seed, 3]).permutation(len(train))[:size])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FctWarning)  # of all pairs it was said already
                points.append(judge.map(curve, fits[curve], part)[1])
            bar.advance(task)
    drawn = () if curve == "none" else extrapolate(sizes, [*map(_doubles, points), _doubles(recalls[curve])], seed=seed)
    return Comparison(
        metric, len(train), len(split.held), tuple(found), judge.ceilings(train), drawn, curve, unlike, rows,
        _notes(split, found, unlike), fitted["auto"].info.get("mixed"),
    )  # fmt: skip


@dataclass(frozen=True, eq=False, slots=True)
class _Split:
    """The pairs that are fitted and those that are measured on. labels: of the latter. copies: left out of them."""

    train: _Part
    held: _Part
    labels: Labels | None
    copies: int

    @classmethod
    def of(cls, pairs: _Part, labels: Sequence[object] | Labels | None, share: float, seed: int) -> _Split:
        if len(pairs) < 2 * _LEAST_HELD_OUT:
            raise ValueError(
                f"old: expected at least {2 * _LEAST_HELD_OUT} pairs, half of them to measure on, got {len(pairs)}"
            )
        named = None if labels is None else check_labels(labels, "labels", len(pairs))
        train, held = split_apart(pairs.old, share, seed, least=_LEAST_HELD_OUT)
        different = held[_first_copies(pairs.take(held))]
        if len(different) < _LEAST_RANKED:
            raise ValueError(
                f"old: expected at least {_LEAST_RANKED} different pairs held out: among fewer every map has the "
                f"same ten neighbours, got {len(different)} and copies of them"
            )
        own = None if named is None else named[different]
        return cls(pairs.take(train), pairs.take(different), own, len(held) - len(different))


def _notes(split: _Split, found: Sequence[Alternative], unlike: float | None) -> tuple[str, ...]:
    lines = []
    held, labels = len(split.held), split.labels
    if split.copies:
        lines.append(f"{split.copies:,} held-out pairs are copies of others and were left out")
    chance = 10 / (held - 1)
    if chance > _LOUD_CHANCE:
        lines.append(
            f"{held} held-out pairs are few: ten rows drawn by lot would have a recall@10 of {100 * chance:.0f} % "
            "already"
        )
    if labels is not None and len(np.unique(labels)) == 1:
        lines.append("all held-out pairs are of one class: CMC and mAP are 100 % whatever is done")
    elif labels is not None and found[0].cmc1 is None:
        lines.append("no held-out pair has another of its class: there is no CMC and no mAP")
    if unlike is not None and unlike > _LOUD_UNLIKE:
        lines.append(
            f"{100 * unlike:.0f} % of the gallery resembles no pair (1 % is usual): the figures hold for rows like the "
            "pairs; draw the pairs from the gallery"
        )
    return tuple(lines)


def _rows_as_bytes(rows: Floats) -> npt.NDArray[np.void]:
    """(n,) one value a row; equal where every bit is."""
    return np.ascontiguousarray(rows).view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()


def _first_copies(pairs: _Part) -> npt.NDArray[np.int64]:
    """Positions of the pairs that are no copies of an earlier one, ascending."""
    parts = [pairs.old, pairs.new] if pairs.side is None else [pairs.old, pairs.side, pairs.new]
    return np.sort(np.unique(_rows_as_bytes(np.concatenate(parts, axis=1)), return_index=True)[1])


def split_apart(
    old: Floats, share: float, seed: int, *, least: int = 1
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows to fit on and rows to measure on, ``least`` of them at least; equal old vectors are on one side."""
    group = np.unique(_rows_as_bytes(old), return_inverse=True)[1].ravel()
    order = np.random.default_rng([seed, 5]).permutation(int(group.max()) + 1)
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    wanted = max(min(share, _MOST_HELD_OUT / len(old)), min(0.5, least / len(old)))
    chosen = position[group] < max(1, round(len(order) * wanted))
    train, held = np.flatnonzero(~chosen), np.flatnonzero(chosen)
    if len(held) < 3 or len(train) < 3:
        raise ValueError(
            f"old: expected different vectors, so that 3 can be held out and 3 fitted on, got {len(order)} different"
        )
    return train, held


def fit_low_rank(old: Floats, new: Floats, *, rank: int) -> Transformation:
    """Reduced-rank regression: the ridge map's predictions on their first ``rank`` principal directions.

    Source: Izenman, "Reduced-rank regression for the multivariate linear model", J. Multivariate Analysis 1975.
    """
    full = fit_ridge(old, new)
    if full.skip is None:
        raise ValueError("old: expected a linear map with a skip")
    weight = full.skip.weight.astype(np.float64)
    centred = (old - old.mean(axis=0)).astype(np.float64) @ weight.T
    directions = np.linalg.svd(centred, full_matrices=False)[2][:rank]
    inner = directions @ weight
    mean = new.mean(axis=0, dtype=np.float64)
    bias = mean - directions.T @ (inner @ old.mean(axis=0, dtype=np.float64))
    both = Layer(np.concatenate([inner, -inner]), np.zeros(2 * len(inner)), relu=True)  # relu(x) - relu(-x) = x
    last = np.concatenate([directions.T, -directions.T, np.zeros((len(mean), 1))], axis=1)
    return full.with_(old=(both,), mixer=(Layer(last, bias, relu=False),), skip=None, info={"baseline": "low-rank"})


def _fits(train: _Part, extra: Sequence[str], metric: str, seed: int) -> dict[str, _Way]:
    space, back = _space("new", train.new, metric), _space("old", train.old, metric)
    rank = max(1, min(train.old.shape[1], train.new.shape[1]) // 4)

    def learned(config: str, with_side: bool) -> _Way:
        return _Way(
            lambda p: fit_transformation(
                p.old, p.side if with_side else None, p.new, config=config, seed=seed, new_space=space, progress=False
            ),
            with_side,
        )

    side = train.side is not None
    fits = {
        "procrustes": _Way(lambda p: fit_procrustes(p.old, p.new, new_space=space)),
        "ridge": _Way(lambda p: fit_ridge(p.old, p.new, new_space=space)),
        f"low-rank {rank}": _Way(
            lambda p: fit_low_rank(p.old, p.new, rank=rank).with_(new_space=space, normalise=space.normalised)
        ),
        "residual MLP": _Way(lambda p: fit_residual(p.old, p.new, new_space=space, seed=seed, progress=False)),
        "residual MLP, queries to old": _Way(
            lambda p: fit_residual(p.new, p.old, new_space=back, seed=seed, progress=False), of_queries=True
        ),
    }
    if side:
        fits["auto, no side-information"] = learned("auto", False)
    return fits | {name: learned(name, side) for name in ("auto", *dict.fromkeys(extra))}


def _space(name: str, rows: Floats, metric: str) -> EmbeddingSpace:
    unit = bool(np.all(np.abs(np.linalg.norm(rows, axis=1) - 1) < 1e-3))
    return EmbeddingSpace(name, rows.shape[1], metric=metric, normalised=unit)


@dataclass(frozen=True, eq=False, slots=True)
class _Judge:
    """Measures on the held-out rows."""

    held: _Part
    labels: Labels | None
    metric: str
    rows: float
    price: float | None
    seconds: float

    def nothing(self) -> Alternative:
        old = self.held.old
        recall = recalls_at_10(old, old, self.held.new, gallery_metric=self.metric, metric=self.metric)
        cmc1, mean = self._by_labels(old, old)
        cost = None if self.price is None else 0.0
        return Alternative("nothing", float(recall.mean()), cmc1, mean, 0.0, 0.0, None, 4 * old.shape[1], 0.0, cost)

    def map(self, name: str, way: _Way, train: _Part) -> tuple[Alternative, Floats, Transformation]:
        begun = time.perf_counter()
        h = way.fit(train)
        took = time.perf_counter() - begun
        held = self.held
        rows, side = held.new if way.of_queries else held.old, held.side if way.with_side else None
        mapped = transform_batch(rows, side, h, progress=False)
        queries, gallery = (mapped, held.old) if way.of_queries else (held.new, mapped)
        recall = recalls_at_10(queries, gallery, held.new, gallery_metric=self.metric, metric=self.metric)
        cmc1, mean = self._by_labels(queries, gallery)
        speed = rows_per_second(h, rows, side, self.seconds)
        kept = 4 * (gallery.shape[1] + (0 if side is None else side.shape[1]))
        hours = 0.0 if way.of_queries else self.rows / speed / 3600
        cost = None if self.price is None else hours * self.price
        mflop = h.flop_per_row / 1e6
        row = Alternative(name, float(recall.mean()), cmc1, mean, took, mflop, speed, kept, hours, cost)
        return row, recall, h

    def ceilings(self, train: _Part) -> dict[str, float]:
        found = {"old": self._oracle(train.old, train.new, self.held.old)}
        if train.side is not None and self.held.side is not None:
            scales = [float(x.std()) * x.shape[1] ** 0.5 or 1.0 for x in (train.old, train.side)]
            known = np.concatenate([train.old / scales[0], train.side / scales[1]], axis=1)
            asked = np.concatenate([self.held.old / scales[0], self.held.side / scales[1]], axis=1)
            found["old + side-information"] = self._oracle(known, train.new, asked)
        return found

    def _oracle(self, known: Floats, target: Floats, asked: Floats) -> float:
        return max(float(self._recalls(neighbour_means(known, target, asked, k)).mean()) for k in _NEIGHBOURS)

    def _recalls(self, mapped: Floats) -> Floats:
        return recalls_at_10(self.held.new, mapped, self.held.new, gallery_metric=self.metric, metric=self.metric)

    def _by_labels(self, queries: Floats, gallery: Floats) -> tuple[float | None, float | None]:
        if self.labels is None:
            return None, None
        found = evaluate(
            queries, gallery, self.labels, metric=self.metric, same_items=True, bootstrap=0, progress=False
        )
        return (found.cmc1, found.map) if found.queries else (None, None)


def rows_per_second(h: Transformation, old: Floats, side: Floats | None, seconds: float) -> float:
    """Rows that ``transform_batch`` maps in a second here, in batches of 4,096 made of the given rows."""
    at = np.arange(4_096) % len(old)
    rows, beside = old[at], None if side is None else side[at]
    transform_batch(rows, beside, h, progress=False)
    begun, done = time.perf_counter(), 0
    while (took := time.perf_counter() - begun) < seconds or not done:
        transform_batch(rows, beside, h, progress=False)
        done += len(rows)
    return done / took


def _checked(old: Floats, side_info: Floats | None, new: Floats) -> _Part:
    first = rows_of(old, "old", allow_empty=False).float32()
    side = None if side_info is None else rows_of(side_info, "side_info", n=len(first), n_why="to match old").float32()
    return _Part(first, side, rows_of(new, "new", n=len(first), n_why="to match old").float32())


def _doubles(recalls: Floats) -> npt.NDArray[np.float64]:
    return recalls.astype(np.float64)
