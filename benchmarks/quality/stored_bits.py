"""What a byte of stored side-information brings: dimensions against bits, and a second model beside the layer.

``python -m benchmarks.quality.stored_bits --vectors FILE.npz --layer NAME [--second NAME] --keep DIR`` prints a
Markdown table of recall@10 by bytes an item, and on stderr a line for every fit. The file holds old, new, the layer's
pooled output and the second model's vectors, each as NAME_train and NAME_test: rows of the same items. Artifacts go to
DIR; a stopped run goes on from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fct
from benchmarks.quality.chains import unit
from benchmarks.quality.kept_fits import KeptFits
from fct.fit.neighbours import NeighbourTest

LAYER = ((16, "float32"), (64, "int8"), (128, "int4"), (128, "float32"))
SECOND = (16, 64)  # dimensions of a second model, in float32


def stored(train: Any, test: Any, dim: int, storage: str) -> tuple[Any, Any]:
    """Both as fct stores a layer of them: components of the training rows, in so many bits."""
    rows = torch.nn.Sequential(torch.nn.Identity())
    side = fct.side_info_from(rows, train, layer="0", dim=dim, storage=storage, progress=False)
    return side.encode(train, progress=False), side.encode(test, progress=False)


def cases(file: Any, layer: str, second: str | None) -> Iterator[tuple[str, int, Any, Any]]:
    """(words, bytes an item, training rows, test rows) of each kind of side-information."""
    yield "none", 0, None, None
    if second is not None:
        for dim in SECOND:
            yield (
                f"a second model, {dim}-d float32",
                4 * dim,
                *stored(file[f"{second}_train"], file[f"{second}_test"], dim, "float32"),
            )
    for dim, storage in LAYER:
        bits = {"float32": 32, "int8": 8, "int4": 4}[storage]
        parts = stored(file[f"{layer}_train"], file[f"{layer}_test"], dim, storage)
        yield f"the layer, {dim}-d {storage}", dim * bits // 8, *parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--layer", required=True, help="Name of the layer's arrays.")
    parser.add_argument("--second", help="Name of the second model's arrays.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Of the fits.")
    parser.add_argument("--keep", type=Path, help="Folder for the artifacts: a stopped run goes on from them.")
    given = parser.parse_args()
    with np.load(given.vectors) as file:
        old, new, old_test, new_test = (
            unit(file[f"{name}_{part}"]) for part in ("train", "test") for name in ("old", "new")
        )
        kinds = list(cases(file, given.layer, given.second))
    queries = NeighbourTest.of(new_test, "l2", normalise=True)
    found: dict[str, list[float]] = {words: [] for words, *_ in kinds}
    with KeptFits(given.keep, len(kinds) * len(given.seeds)) as fits:
        for seed in given.seeds:
            for words, _, side, side_test in kinds:
                h = fits.fit(f"{words.replace(' ', '-')}-{seed}", old, side, new, seed=seed)
                rows = fct.transform_batch(old_test, side_test, h, precision="fp32", progress=False)
                found[words].append(100 * queries.recall(rows))
                fits.tell(f"seed {seed}, {words}: recall@10 {found[words][-1]:.1f} %")
    lines = ["| side-information | bytes an item | recall@10 |", "|---|--:|--:|"]
    for words, size, *_ in kinds:
        lines.append(f"| {words} | {size} | {np.mean(found[words]):.1f} ± {np.std(found[words]):.1f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
