"""Three upgrades in a row, v1 -> v4: maps in turn, one fitted from v1, or one fitted from the mapped rows.

``python -m benchmarks.quality.chains --vectors text.npz --pairs 2000 --keep DIR`` prints a Markdown table of recall@10
against the newest model, and on stderr a line for every fit. The file holds, for each model in turn, NAME_train and
NAME_test: rows of the same items. Artifacts go to DIR; a stopped run goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import fct
from benchmarks.quality.kept_fits import KeptFits
from fct.fit.neighbours import NeighbourTest

WAYS = ("in turn", "from v1", "from the mapped rows")


def unit(x: Any) -> Any:
    rows = np.asarray(x, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def mapped(rows: Any, h: fct.Transformation) -> Any:
    return fct.transform_batch(rows, None, h, precision="fp32", progress=False)


def fits_of(models: int) -> int:
    """How many fits a chain of so many models takes: the first upgrade is the same one in all three ways."""
    return 1 + 3 * (models - 2)


def chain(train: list[Any], test: list[Any], seed: int, fits: KeptFits, name: str) -> list[dict[str, float]]:
    """For v2, v3, ...: recall@10 by how the rows of v1 came there."""
    found = []
    hop_train, hop_test = train[0], test[0]  # through the maps between neighbours
    kept_train, kept_test = train[0], test[0]  # through maps fitted on what a mapped gallery holds
    for i in range(1, len(train)):
        test_of = NeighbourTest.of(test[i], "l2", normalise=True)
        reached: dict[str, float] = {}

        def measure(way: str, rows: Any, test_of: Any = test_of, reached: Any = reached, i: int = i) -> None:
            reached[way] = float(test_of.recall(rows))
            fits.tell(f"{name}, to v{i + 1} {way}: recall@10 {100 * reached[way]:.1f} %")

        step = fits.fit(f"{name}-v{i}-v{i + 1}", train[i - 1], None, train[i], seed=seed)
        hop_train, hop_test = mapped(hop_train, step), mapped(hop_test, step)
        measure(WAYS[0], hop_test)
        if i == 1:
            kept_train, kept_test = hop_train, hop_test
            found.append(dict.fromkeys(WAYS, reached[WAYS[0]]))
            continue
        measure(WAYS[1], mapped(test[0], fits.fit(f"{name}-v1-v{i + 1}", train[0], None, train[i], seed=seed)))
        again = fits.fit(f"{name}-mapped-v{i + 1}", kept_train, None, train[i], seed=seed)
        kept_train, kept_test = mapped(kept_train, again), mapped(kept_test, again)
        measure(WAYS[2], kept_test)
        found.append(reached)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--models", default="old,static,l2,new", help="The arrays' names, oldest model first.")
    parser.add_argument("--pairs", type=int, nargs="+", default=[2_000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--test-rows", type=int, default=5_000)
    parser.add_argument("--keep", type=Path, help="Folder for the artifacts: a stopped run goes on from them.")
    given = parser.parse_args()
    names = given.models.split(",")
    with np.load(given.vectors) as file:
        train = [unit(file[f"{name}_train"]) for name in names]
        test = [unit(file[f"{name}_test"][: given.test_rows]) for name in names]
    lines = ["| pairs | v1 to | in turn | from v1 | from the mapped rows |", "|--:|---|--:|--:|--:|"]
    with KeptFits(given.keep, len(given.pairs) * len(given.seeds) * fits_of(len(names))) as fits:
        for pairs in given.pairs:
            runs = []
            for seed in given.seeds:
                chosen = np.random.default_rng([seed, 41]).permutation(len(train[0]))[:pairs]
                runs.append(chain([x[chosen] for x in train], test, seed, fits, f"{pairs}-seed{seed}"))
            for i, name in enumerate(names[1:]):
                values = {way: 100 * np.array([run[i][way] for run in runs]) for way in WAYS}
                cells = [f"{found.mean():.1f} ± {found.std():.1f}" for found in values.values()]
                lines.append(f"| {pairs:,} | v{i + 2} ({name}) | {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
