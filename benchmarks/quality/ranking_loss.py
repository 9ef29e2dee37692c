"""Does a ranking loss over neighbours mined once in the new space help beside the point term?

The difference that D3still (CVPR 2024) teaches by: how the new model ranks a row's nearest others is matched by how h
ranks them, as a divergence of two softmaxes. ``python -m benchmarks.quality.ranking_loss --vectors img.npz``; an .npz
with old_, new_ and feat_ (side-information) of train and test, as docs/results.md describes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import fct
from fct.fit.pair_training import PairTraining

_NEIGHBOURS, _ROWS = 32, 64


@contextmanager
def ranking_term(weight: float) -> Iterator[None]:
    """While it lasts, every training adds ``weight`` times the term to its loss; neighbours are mined at its first
    step."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", required=True)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.03, 0.3])
    given = parser.parse_args()
    with np.load(given.vectors) as file:
        rows = np.random.default_rng(given.seed).permutation(len(file["old_train"]))[: given.pairs]
        train = [file[f"{name}_train"][rows] for name in ("old", "new")]
        test = [file[f"{name}_test"] for name in ("old", "new")]
    space = fct.EmbeddingSpace("new", train[1].shape[1], normalised=True)
    nearest = fct.topk(test[1], test[1], 10, same_items=True, progress=False).indices
    for weight in given.weights:
        with ranking_term(weight):
            h = fct.fit_transformation(
                train[0], None, train[1], config="auto", seed=given.seed, new_space=space, progress=False
            )
        mapped = fct.transform_batch(test[0], None, h, precision="fp32", progress=False)
        found = fct.topk(test[1], mapped, 10, same_items=True, progress=False).indices
        recall = float(
            np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), nearest.tolist(), strict=True)])
        )
        print(f"weight {weight:g}: recall@10 {100 * recall:.2f} % on {len(mapped):,} test rows", flush=True)


if __name__ == "__main__":
    main()
