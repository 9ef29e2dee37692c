"""The day of the upgrade: fit h on a sample of pairs, measure it, and map the stored gallery. No gallery image is read.

    python examples/upgrade.py --gallery gallery

Reads what `store_side_information.py` wrote; put your own new model into `embed_new`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from store_side_information import embed_old, inputs, load_images, old_model

import fct
from fct.fit.layer_side_info import LayerSideInfo
from fct.fit.recipes import FitConfig
from fct.metrics import recall_at_k


def embed_new(images: np.ndarray) -> np.ndarray:
    """(n, 48) float32. Yours: the new model; nothing constrains it."""
    weights = np.random.default_rng(8).standard_normal((24 * 24, 48)) / 24
    return np.tanh(images.reshape(len(images), -1) / 64 @ weights).astype(np.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gallery", type=Path, default=Path("gallery"))
    parser.add_argument("--pairs", type=int, default=3000)
    options = parser.parse_args()

    side_info = LayerSideInfo.load(options.gallery / "side.safetensors", old_model())

    # 1. Pairs: items that you still have, run once through both models. They need not be in the gallery.
    items = load_images(options.pairs + 500, seed=1)
    old, side, new = embed_old(items), side_info.encode(inputs(items)), embed_new(items)
    assert isinstance(side, fct.PackedInt4)
    fit, test = slice(0, options.pairs), slice(options.pairs, None)

    # 2. h. Leave `config` out for the default recipe; this short one is for a look.
    config = FitConfig(inner=256, epochs=10, batch_size=256, lr=2e-3, warmup_epochs=1, standardise=True)
    h = fct.fit_transformation(old[fit], side[fit], new[fit], config=config)

    # 3. Is it worth it? Without labels: how much of the new model's own top-10 does new/old find, beside old/old?
    wanted = fct.topk(new[test], new[test], 10, same_items=True).indices
    mapped = fct.transform_batch(old[test], side[test], h)
    found = {
        "old/old": fct.topk(old[test], old[test], 10, same_items=True).indices,
        "new/old": fct.topk(new[test], mapped, 10, same_items=True).indices,
    }
    recall = {name: recall_at_k(indices, wanted, 10) for name, indices in found.items()}
    print(", ".join(f"{name}: recall@10 {value:.3f}" for name, value in recall.items()))
    if recall["new/old"] <= recall["old/old"]:
        print("do not migrate: new/old does not beat old/old")
        return 1

    # 4. The gallery, from its stored vectors; for one that takes hours, use the crash-safe `fct backfill`.
    h.save(options.gallery / "h.safetensors")
    stored = [np.load(options.gallery / name, mmap_mode="r") for name in ("old.npy", "side.npy")]
    np.save(options.gallery / "new.npy", fct.transform_batch(stored[0], stored[1], h))
    print(f"{len(stored[0]):,} rows mapped; h and the new gallery are in {options.gallery}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
