"""Three upgrades in a row, v1 -> v4: two maps in turn, one fitted from v1, or one fitted from the mapped rows.

``python -m benchmarks.quality.chains --vectors text.npz --pairs 2000`` prints a Markdown table of recall@10 against the
newest model. The file holds, for each model in turn, NAME_train and NAME_test: rows of the same items.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import fct
from fct.fit.neighbours import NeighbourTest


def unit(x: Any) -> Any:
    rows = np.asarray(x, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def fitted(old: Any, new: Any, seed: int) -> fct.Transformation:
    space = fct.EmbeddingSpace("new", new.shape[1], normalised=True)
    return fct.fit_transformation(old, None, new, config="auto", seed=seed, new_space=space, progress=False)


def mapped(rows: Any, h: fct.Transformation) -> Any:
    return fct.transform_batch(rows, None, h, precision="fp32", progress=False)


def chain(train: list[Any], test: list[Any], seed: int) -> list[dict[str, float]]:
    """For v2, v3, ...: recall@10 by how the rows of v1 came there."""
    found = []
    hop_train, hop_test = train[0], test[0]  # through the maps between neighbours
    kept_train, kept_test = train[0], test[0]  # through maps fitted on what a mapped gallery holds
    for i in range(1, len(train)):
        test_of = NeighbourTest.of(test[i], "l2", normalise=True)
        step = fitted(train[i - 1], train[i], seed)
        hop_train, hop_test = mapped(hop_train, step), mapped(hop_test, step)
        direct = step if i == 1 else fitted(train[0], train[i], seed)
        again = step if i == 1 else fitted(kept_train, train[i], seed)
        kept_train, kept_test = mapped(kept_train, again), mapped(kept_test, again)
        rows = {"in turn": hop_test, "from v1": mapped(test[0], direct), "from the mapped rows": kept_test}
        found.append({name: float(test_of.recall(values)) for name, values in rows.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--models", default="old,static,l2,new", help="The arrays' names, oldest model first.")
    parser.add_argument("--pairs", type=int, nargs="+", default=[2_000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--test-rows", type=int, default=5_000)
    given = parser.parse_args()
    names = given.models.split(",")
    with np.load(given.vectors) as file:
        train = [unit(file[f"{name}_train"]) for name in names]
        test = [unit(file[f"{name}_test"][: given.test_rows]) for name in names]
    print("| pairs | v1 to | in turn | from v1 | from the mapped rows |")
    print("|--:|---|--:|--:|--:|")
    for pairs in given.pairs:
        runs = []
        for seed in given.seeds:
            chosen = np.random.default_rng([seed, 41]).permutation(len(train[0]))[:pairs]
            runs.append(chain([x[chosen] for x in train], test, seed))
        for i, name in enumerate(names[1:]):
            cells = []
            for way in runs[0][i]:
                values = 100 * np.array([run[i][way] for run in runs])
                cells.append(f"{values.mean():.1f} ± {values.std():.1f}")
            print(f"| {pairs:,} | v{i + 2} ({name}) | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
