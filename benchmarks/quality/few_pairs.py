"""Few pairs: what each recipe finds with some hundreds or thousands of them, and the rest of the gallery unpaired.

``python -m benchmarks.quality.few_pairs --vectors FILE.npz --pairs 500 2000 --keep DIR`` prints a Markdown table of
recall@10, and on stderr a line for every fit. The file holds old_train, new_train, old_test and new_test: rows of the
same items. Each seed draws its pairs from the training rows; "best" gets the others without their new embeddings.
Artifacts go to DIR; a stopped run goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import fct
from benchmarks.quality.chains import unit
from benchmarks.quality.kept_fits import KeptFits
from fct.baselines import fit_procrustes, fit_ridge
from fct.fit.neighbours import NeighbourTest

RECIPES = ("Procrustes", "ridge", "auto", "best")


def fitted(recipe: str, old: Any, new: Any, others: Any, seed: int, fits: KeptFits) -> fct.Transformation:
    space = fct.EmbeddingSpace("new", new.shape[1], normalised=True)
    if recipe in ("Procrustes", "ridge"):
        return (fit_ridge if recipe == "ridge" else fit_procrustes)(old, new, new_space=space)
    more = {"unpaired": (others, None)} if recipe == "best" else {}
    return fits.fit(f"{len(old)}-{recipe}-{seed}", old, None, new, seed=seed, config=recipe, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--pairs", type=int, nargs="+", default=[500, 2_000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="Folder for the artifacts: a stopped run goes on from them.")
    given = parser.parse_args()
    names = ("old_train", "new_train", "old_test", "new_test")
    with np.load(given.vectors) as file:
        old, new, old_test, new_test = (unit(file[name]) for name in names)
    queries = NeighbourTest.of(new_test, "l2", normalise=True)
    lines = [f"| pairs | {' | '.join(RECIPES)} |", "|--:|" + "--:|" * len(RECIPES)]
    with KeptFits(given.keep, len(given.pairs) * len(given.seeds) * len(RECIPES)) as fits:
        for pairs in given.pairs:
            found: dict[str, list[float]] = {recipe: [] for recipe in RECIPES}
            for seed in given.seeds:
                order = np.random.default_rng([seed, pairs]).permutation(len(old))
                chosen, others = order[:pairs], order[pairs:]
                for recipe in RECIPES:
                    h = fitted(recipe, old[chosen], new[chosen], old[others], seed, fits)
                    rows = fct.transform_batch(old_test, None, h, precision="fp32", progress=False)
                    found[recipe].append(100 * queries.recall(rows))
                    fits.tell(f"{pairs} pairs, seed {seed}, {recipe}: recall@10 {found[recipe][-1]:.1f} %")
            cells = [f"{np.mean(found[recipe]):.1f} ± {np.std(found[recipe]):.1f}" for recipe in RECIPES]
            lines.append(f"| {pairs:,} | {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
