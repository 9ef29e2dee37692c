"""Today: store side-information from an inner layer of your model beside the embeddings of a gallery.

    python examples/store_side_information.py --out gallery

Runs as it stands on made-up images; put your own model into `old_model` and your own images into `load_images`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import fct


def load_images(count: int, seed: int = 0) -> np.ndarray:
    """(n, 24, 24) uint8: bright boxes of any place, size and grey on noise. Yours: what your model reads."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 40, (count, 24, 24))
    for image, (x, y, width, height, grey) in zip(images, rng.integers(2, 12, (count, 5)), strict=True):
        image[y : y + height, x : x + width] += 16 * grey
    return images.astype(np.uint8)


def old_model() -> torch.nn.Module:
    """(n, 1, 24, 24) floats -> (n, 64). Yours: the model that is in production today; this one has drawn weights."""
    torch.manual_seed(7)
    maps = (torch.nn.Conv2d(1, 16, 5, 2), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, 2), torch.nn.ReLU())
    return torch.nn.Sequential(*maps, torch.nn.Flatten(), torch.nn.Linear(512, 64), torch.nn.Tanh()).eval()


def inputs(images: np.ndarray) -> np.ndarray:
    """What the model reads."""
    return images[:, None].astype(np.float32) / 255


@torch.inference_mode()
def embed_old(images: np.ndarray) -> np.ndarray:
    """(n, 64) float32."""
    return old_model()(torch.from_numpy(inputs(images))).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gallery"))
    parser.add_argument("--images", type=int, default=2000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    # 1. Which components of a layer are kept: nothing is trained, and no label goes in.
    images = load_images(options.images)
    side = fct.side_info_from(old_model(), inputs(images), layer="3", dim=128, storage="int4")
    side.save(options.out / "side.safetensors")  # fixed from here on: tomorrow's pairs are read by the same ones

    # 2. Beside each embedding, the side-information, as a packed .npy.
    codes = side.encode(inputs(images))
    assert isinstance(codes, fct.PackedInt4)  # as storage="int4" says
    np.save(options.out / "id.npy", np.arange(len(images)))
    np.save(options.out / "old.npy", embed_old(images))
    np.save(options.out / "side.npy", codes.records)
    print(f"{len(codes):,} rows in {options.out}; side-information: {side.bytes_per_item} bytes a row")


if __name__ == "__main__":
    main()
