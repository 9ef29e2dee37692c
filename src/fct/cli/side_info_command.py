"""``fct train-side-info``: the side-information model from images, and their side-information."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fct.cli.console import console

if TYPE_CHECKING:
    from fct.fit.images import Images


def train_side_info(
    images: Annotated[Path, typer.Argument(help="A folder of images, or a .npy of (n, h, w) or (n, c, h, w) uint8.")],
    out: Annotated[Path, typer.Option(help="Where the model goes, a .safetensors file.")],
    vectors: Annotated[
        Path | None, typer.Option(help="Where these images' side-information goes, (n, dim) .npy, in their order.")
    ] = None,
    method: Annotated[str, typer.Option(help="simclr, barlow_twins, autoencoder or supervised.")] = "simclr",
    dim: Annotated[int, typer.Option(help="Length of the side-information.")] = 128,
    backbone: Annotated[str, typer.Option(help="small_resnet, small_cnn, a torchvision name or timm:NAME.")] = (
        "small_resnet"
    ),
    labels: Annotated[Path | None, typer.Option(help="(n,) .npy of ints, for supervised with a .npy.")] = None,
    size: Annotated[int, typer.Option(help="Side that the images of a folder are cut to.")] = 224,
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = 60,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Same seed, same model on the same machine.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read image files.")] = 4,
    checkpoint: Annotated[Path | None, typer.Option(help="A file to go on from after an interruption.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output files.")] = False,
) -> None:
    """Train a side-information model on the images that the old model was trained on.

    Do it today: once the images are gone, side-information cannot be made.

    Example: fct train-side-info photos/train --out side.safetensors --vectors side.npy --backbone resnet18
    """
    import numpy as np

    from fct.atomic_files import atomic_path, refuse_existing
    from fct.fit.backbones import EmbeddingModel
    from fct.fit.images import embed
    from fct.fit.model_file import save_model
    from fct.fit.side_info import train_side_info as train

    refuse_existing(out, overwrite=overwrite, name="--out")
    if vectors is not None:
        refuse_existing(vectors, overwrite=overwrite, name="--vectors")
    if images.is_dir() and labels is not None:
        raise ValueError("--labels: expected none with a folder, whose subfolders are the classes")
    supervised = method == "supervised"
    source, seen = (
        _of_folder(images, size, workers, supervised=supervised)
        if images.is_dir()
        else _of_array(images, labels, method, supervised=supervised)
    )
    model = train(
        source,
        method=method,
        dim=dim,
        backbone=backbone,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        device=device,
        checkpoint=checkpoint,
    )
    assert isinstance(model, EmbeddingModel)
    info = {"method": method, "images": len(source), "epochs": epochs, "seed": seed}
    save_model(model, out, backbone=backbone, image_shape=source.shape, info=info)
    console.print(f"model: {out}", highlight=False)
    if vectors is not None:
        with atomic_path(vectors) as part, open(part, "wb") as file:
            np.save(file, embed(model, seen, progress=True), allow_pickle=False)
        console.print(f"side-information of {len(seen):,} images: {vectors}", highlight=False)


def _of_folder(images: Path, size: int, workers: int, *, supervised: bool) -> tuple[Images, Images]:
    """(to train on, cut at random; to embed)."""
    from fct.data.folders import every_image, load_image_folder
    from fct.fit.images import Images

    folder = load_image_folder(images.parent, images.name, size=size) if supervised else every_image(images, size=size)
    return Images(folder.with_(random_crop=True), workers=workers), Images(folder, workers=workers)


def _of_array(images: Path, labels: Path | None, method: str, *, supervised: bool) -> tuple[Images, Images]:
    """(to train on, with labels where they are learned from; to embed)."""
    import numpy as np

    from fct.fit.images import Images
    from fct.gallery.array_argument import map_npy

    array = np.ascontiguousarray(map_npy(images, "IMAGES"))
    if labels is not None and not supervised:
        raise ValueError(f"--labels: expected none for {method!r}, which learns without labels")
    given = None if labels is None else np.asarray(map_npy(labels, "--labels"))
    return Images(array, given), Images(array)
