"""Fits every recipe on every upgrade and writes the table: ``python -m benchmarks.quality --out FILE.md``.

A part of docs/results.md is this program's output; it says with which arguments. Every fit's figures go to FILE.jsonl
at once, and what stands there is not fitted again: the whole takes hours on two cores, a stopped run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

import fct
from benchmarks.quality.upgrades import (
    IMAGE_UPGRADES,
    PARTS,
    TEXT_UPGRADES,
    Rows,
    Upgrade,
    image_upgrade,
    text_upgrade,
)
from fct.baselines import fit_procrustes, fit_ridge
from fct.fit.neighbours import NeighbourTest

UPGRADES = (*IMAGE_UPGRADES, *TEXT_UPGRADES)
RECIPES = ("Procrustes", "ridge", "paper", "auto, without side-information", "auto", "best")


def reduced(upgrade: Upgrade, dim: int) -> Upgrade:
    """The side-information as its first ``dim`` principal components, which the training rows give."""
    train = upgrade["train"].side
    mean = train.mean(axis=0)
    _, axes = np.linalg.eigh(np.cov((train - mean).T))
    axes = axes[:, ::-1][:, :dim].astype(np.float32)
    return {
        part: Rows(rows.old, ((rows.side - mean) @ axes).astype(np.float32), rows.new, rows.labels, rows.keys)
        for part, rows in upgrade.items()
    }


def measured(h: fct.Transformation, test: Rows) -> dict[str, float]:
    mapped = fct.transform_batch(test.old, test.side if h.uses_side_info else None, h, precision="fp32", progress=False)
    neighbours = NeighbourTest.of(test.new, "l2", normalise=True)
    figures = fct.evaluate(test.new, mapped, test.labels, same_items=True, bootstrap=0, progress=False)
    mixed = {}
    if h.info.get("mixed"):
        half = fct.evaluate_mixed(test.old, test.side if h.uses_side_info else None, test.new, h, shares=[0.5]).points[  # type: ignore[arg-type]
            0
        ]
        mixed = {"half true": half.recall, "half true, corrected": half.corrected_recall}
    return {"recall@10": neighbours.recall(mapped), "top-1": figures.cmc1, "mAP": figures.map,
            "MFLOP": h.flop_per_row / 1e6, **mixed}  # fmt: skip


def fitted(recipe: str, train: Rows, seed: int) -> fct.Transformation:
    space = fct.EmbeddingSpace("new", train.new.shape[1], normalised=True)
    if recipe in ("ridge", "Procrustes"):
        return (fit_ridge if recipe == "ridge" else fit_procrustes)(train.old, train.new, new_space=space)
    side = None if recipe.endswith("without side-information") else train.side
    name = recipe.split(",")[0]
    return fct.fit_transformation(train.old, side, train.new, config=name, seed=seed, new_space=space, progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="Markdown table; every row goes to FILE.jsonl too.")
    parser.add_argument("--data-root", help="Folder of Fashion-MNIST's idx files; without: the subset inside fct.")
    parser.add_argument("--text-folder", type=Path, help="Texts and models (see upgrades.py); without: images alone.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=12_000)
    parser.add_argument("--text-pairs", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=6, help="Of the embedding models.")
    parser.add_argument("--side-dim", type=int, default=64)
    parser.add_argument("--recipes", default=";".join(RECIPES))
    parser.add_argument("--by-recipe", action="store_true", help="One recipe on all upgrades before the next one.")
    parser.add_argument("--cache", type=Path, help="Folder to keep the upgrades' embeddings in.")
    given = parser.parse_args()
    names = [*IMAGE_UPGRADES, *(TEXT_UPGRADES if given.text_folder else ())]
    kept = given.out.with_suffix(".jsonl")
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for recipes in (given.recipes.split(";"),) if not given.by_recipe else ([r] for r in given.recipes.split(";")):
        for seed in range(given.seeds):
            for name in names:
                done = {row["recipe"] for row in rows if (row["upgrade"], row["seed"]) == (name, seed)}
                if missing := [recipe for recipe in recipes if recipe not in done]:
                    upgrade = reduced(made(name, seed, given), given.side_dim)
                for recipe in missing:
                    begun = time.perf_counter()
                    h = fitted(recipe, upgrade["train"], seed)
                    row = {"seconds": time.perf_counter() - begun, **measured(h, upgrade["test"])}
                    rows.append({"upgrade": name, "recipe": recipe, "seed": seed, **row})
                    with kept.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    given.out.write_text(table(rows))
    given.out.write_text(table(rows))


def made(name: str, seed: int, given: argparse.Namespace) -> Upgrade:
    """The upgrade's rows, from ``--cache`` where an earlier run left them: a text upgrade takes minutes to embed."""
    file = given.cache / f"{name} {seed}.npz" if given.cache else None
    if file is not None and file.exists():
        with np.load(file) as kept:
            fields = [field.name for field in dataclasses.fields(Rows)]
            return {part: Rows(*(kept[f"{part} {field}"] for field in fields)) for part in PARTS}
    upgrade = (
        image_upgrade(name, data_root=given.data_root, seed=seed, pairs=given.pairs, epochs=given.epochs)
        if name in IMAGE_UPGRADES
        else text_upgrade(name, folder=given.text_folder, seed=seed, pairs=given.text_pairs)
    )
    if file is not None:
        named = {f"{part} {key}": x for part, rows in upgrade.items() for key, x in dataclasses.asdict(rows).items()}
        np.savez(file, **named)
    return upgrade


def table(rows: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds; shares in per cent."""
    columns = ["recall@10", "top-1", "mAP", "half true", "half true, corrected", "MFLOP", "seconds"]
    lines = [f"| upgrade | recipe | seeds | {' | '.join(columns)} |", "|---|---|" + "--:|" * (1 + len(columns))]
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (UPGRADES.index(row["upgrade"]), RECIPES.index(row["recipe"]))):
        found[row["upgrade"], row["recipe"]].append(row)
    for (name, recipe), seeds in found.items():
        cells = []
        for column in columns:
            values = [row[column] for row in seeds if column in row]
            scale = 1 if column in ("MFLOP", "seconds") else 100
            spread = f" ± {scale * np.std(values):.1f}" if len(values) > 1 and scale == 100 else ""
            digits = 2 if column == "MFLOP" else 1
            cells.append(f"{scale * np.mean(values):.{digits}f}{spread}" if values else "–")
        lines.append(f"| {name} | {recipe} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
