"""Does a ranking loss over neighbours mined once in the new space help beside the point term?

The difference that D3still (CVPR 2024) teaches by: how the new model ranks a row's nearest others is matched by how h
ranks them, as a divergence of two softmaxes. ``python -m benchmarks.quality.ranking_loss --vectors img.npz --keep DIR``
prints a Markdown table, and on stderr a line for every fit; the .npz holds old_, new_, y_ (labels) and, for ``--side``,
side-information of train and test. Artifacts go to DIR; a stopped run goes on from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import fct
from benchmarks.quality.kept_fits import KeptFits
from fct.fit.neighbours import NeighbourTest
from fct.fit.pair_training import PairTraining

_NEIGHBOURS, _ROWS = 32, 64


@contextmanager
def ranking_term(weight: float) -> Iterator[None]:
    """While it lasts, every training adds ``weight`` times the term to its loss; neighbours are mined at its first
    step. 0 leaves the training as it is."""
    if weight == 0:
        yield
        return
    plain = PairTraining._one_step

    def step(self: Any, old: torch.Tensor, side: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "_mined"):
            everything = self._scaled(self._to_device(self.train.take(np.arange(len(self.train)))))
            rows = everything[2].numpy()
            found = fct.topk(rows, rows, _NEIGHBOURS, same_items=True, progress=False).indices
            self._mined = (everything, torch.from_numpy(np.asarray(found)), np.random.default_rng(self.seed))
        (olds, sides, news), near, draws = self._mined
        chosen = torch.from_numpy(draws.choice(len(olds), min(_ROWS, len(olds)), replace=False))
        others, real = news[near[chosen]], functional.mse_loss

        def with_rank(out: torch.Tensor, target: torch.Tensor, **how: Any) -> torch.Tensor:
            mapped = self.module(olds[chosen], sides[chosen]).float()
            wanted = -((news[chosen, None] - others) ** 2).sum(-1)
            scale = wanted.std() + 1e-6
            got = -((mapped[:, None] - others) ** 2).sum(-1)
            term = functional.kl_div(
                (got / scale).log_softmax(-1), (wanted / scale).log_softmax(-1), log_target=True, reduction="batchmean"
            )
            return real(out, target, **how) + weight * term

        functional.mse_loss = with_rank  # type: ignore[assignment]
        try:
            return plain(self, old, side, new)
        finally:
            functional.mse_loss = real

    PairTraining._one_step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        PairTraining._one_step = plain  # type: ignore[method-assign]


FIGURES = ("recall@10", "top-1", "mAP")


def reduced(train: Any, rows: list[Any], dim: int) -> list[Any]:
    """``rows`` as their first ``dim`` principal components, which ``train`` gives."""
    mean = train.mean(axis=0)
    axes = np.linalg.eigh(np.cov((train - mean).T))[1][:, ::-1][:, :dim].astype(np.float32)
    return [((x - mean) @ axes).astype(np.float32) for x in rows]


def measured(h: fct.Transformation, old: Any, side: Any, new: Any, labels: Any) -> dict[str, float]:
    rows = fct.transform_batch(old, side if h.uses_side_info else None, h, precision="fp32", progress=False)
    figures = fct.evaluate(new, rows, labels, same_items=True, bootstrap=0, progress=False)
    recall = NeighbourTest.of(new, "l2", normalise=True).recall(rows)
    return dict(zip(FIGURES, (recall, figures.cmc1, figures.map), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--side", help="Side-information's array, of which 64 principal components are taken.")
    parser.add_argument("--pairs", type=int, nargs="+", default=[500, 2_000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.3])
    parser.add_argument("--keep", type=Path, help="Folder for the artifacts: a stopped run goes on from them.")
    given = parser.parse_args()
    names = ["old", "new", "y", *([given.side] if given.side else [])]
    with np.load(given.vectors) as file:
        train, test = ([file[f"{name}_{part}"] for name in names] for part in ("train", "test"))
    found: dict[tuple[int, float], list[dict[str, float]]] = {}
    with KeptFits(given.keep, len(given.pairs) * len(given.seeds) * len(given.weights)) as fits:
        for pairs in given.pairs:
            for seed in given.seeds:
                rows = np.random.default_rng(seed).permutation(len(train[0]))[:pairs]
                old, new = (np.asarray(x[rows], np.float32) for x in train[:2])
                side, test_side = reduced(train[3][rows], [train[3][rows], test[3]], 64) if given.side else (None, None)
                for weight in given.weights:
                    name = f"{given.vectors.stem}-{pairs}-seed{seed}-weight{weight:g}"
                    with ranking_term(weight):
                        h = fits.fit(name, old, side, new, seed=seed)
                    figures = measured(h, np.asarray(test[0], np.float32), test_side, test[1], test[2])
                    found.setdefault((pairs, weight), []).append(figures)
                    fits.tell(f"{name}: " + ", ".join(f"{key} {100 * x:.1f} %" for key, x in figures.items()))
    print(f"| pairs | weight | {' | '.join(FIGURES)} |\n|--:|--:|{'--:|' * len(FIGURES)}")
    for (pairs, weight), runs in found.items():
        values = [100 * np.array([run[key] for run in runs]) for key in FIGURES]
        print(f"| {pairs:,} | {weight:g} | {' | '.join(f'{x.mean():.1f} ± {x.std():.1f}' for x in values)} |")


if __name__ == "__main__":
    main()
