"""Today: learn a side-information model and store its vectors beside the embeddings of a gallery.

    python examples/store_side_information.py --out gallery

Runs as it stands on made-up images; put your own model into `embed_old` and your own images into `load_images`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import fct
from fct.fit.images import embed
from fct.fit.model_file import save_model


def load_images(count: int, seed: int = 0) -> np.ndarray:
    """(n, 24, 24) uint8: bright boxes of any place, size and grey on noise. Yours: what your model reads."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 40, (count, 24, 24))
    for image, (x, y, width, height, grey) in zip(images, rng.integers(2, 12, (count, 5)), strict=True):
        image[y : y + height, x : x + width] += 16 * grey
    return images.astype(np.uint8)


def embed_old(images: np.ndarray) -> np.ndarray:
    """(n, 64) float32. Yours: the model that is in production today."""
    weights = np.random.default_rng(7).standard_normal((24 * 24, 64)) / 24
    return np.tanh(images.reshape(len(images), -1) / 64 @ weights).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gallery"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=5, help="few, for a look; 100 and more for real use")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    # 1. A model of the images that knows nothing of today's task: no labels go in.
    images = load_images(options.images)
    side_model = fct.train_side_info(images, method="simclr", dim=32, epochs=options.epochs, backbone="small_cnn")
    # Frozen from here on: one model, one h. fct.fit.model_file.load_model reads it back.
    save_model(
        side_model,  # type: ignore[arg-type]
        options.out / "side-model.safetensors",
        backbone="small_cnn",
        image_shape=(1, *images.shape[1:]),  # type: ignore[arg-type]
    )

    # 2. Beside each embedding, the side-information; float16 halves the bytes.
    np.save(options.out / "id.npy", np.arange(len(images)))
    np.save(options.out / "old.npy", embed_old(images))
    np.save(options.out / "side.npy", embed(side_model, images).astype(np.float16))

    side = np.load(options.out / "side.npy", mmap_mode="r")
    print(f"{len(side):,} rows in {options.out}; side-information: {side.nbytes / len(side):.0f} bytes a row")


if __name__ == "__main__":
    main()
