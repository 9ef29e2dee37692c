"""``fct fit``: h from three arrays on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fct.cli.app import app, console

if TYPE_CHECKING:
    from fct.spaces import EmbeddingSpace


@app.command()
def fit(
    old: Annotated[Path, typer.Option(help="Old embeddings, (n, d_old) .npy.")],
    new: Annotated[Path, typer.Option(help="New embeddings of the same items in the same order, (n, d_new) .npy.")],
    out: Annotated[Path, typer.Option(help="Where h goes, a .safetensors file.")],
    side_info: Annotated[
        Path | None, typer.Option(help="Side-information of the same items, (n, d_side) .npy; without: weaker.")
    ] = None,
    config: Annotated[str, typer.Option(help="auto, our default, or paper, the published recipe.")] = "auto",
    old_model: Annotated[str, typer.Option(help="Id of the old model, stored in h.")] = "old",
    new_model: Annotated[str, typer.Option(help="Id of the new model, stored in h.")] = "new",
    side_model: Annotated[str, typer.Option(help="Id of the model behind --side-info.")] = "side-information",
    metric: Annotated[str, typer.Option(help="How the new vectors are compared: l2, ip or cosine.")] = "l2",
    seed: Annotated[int, typer.Option(help="Same seed, same h on the same machine.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
) -> None:
    """Fit the transformation h(old, side-information) -> new on pairs.

    The arrays are read as memory maps, so they need not fit in memory.

    Example: fct fit --old old.npy --side-info side.npy --new new.npy --out h.safetensors
    """
    from fct.files import refuse_existing
    from fct.spaces import check_metric
    from fct.training.transformation import fit_transformation

    check_metric(metric, "--metric")
    refuse_existing(out, overwrite=overwrite, name="--out")
    arrays = {
        name: None if path is None else load_npy(path, name)
        for name, path in (("--old", old), ("--side-info", side_info), ("--new", new))
    }
    h = fit_transformation(
        arrays["--old"],
        arrays["--side-info"],
        arrays["--new"],
        config=config,
        seed=seed,
        device=device,
        old_space=_space(arrays["--old"], old_model, metric),
        new_space=_space(arrays["--new"], new_model, metric),
        side_model=side_model,
    )
    h.save(out)
    console.print(f"{h!r}", highlight=False, markup=False)
    console.print(f"saved to {out}", highlight=False, markup=False)


def load_npy(path: Path, name: str) -> Any:
    """A .npy file as a read-only memory map; nothing is unpickled."""
    import numpy as np

    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected a .npy file, found none at {path}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{name}: expected a whole .npy array, {path} is not: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name}: expected one .npy array, {path} is an archive of several")
    return array


def _space(array: Any, model: str, metric: str) -> EmbeddingSpace | None:
    """The space that an array's rows lie in; None leaves a bad rank to the fit, which names the argument."""
    import numpy as np

    from fct.spaces import EmbeddingSpace

    if array.ndim != 2 or 0 in array.shape:
        return None
    sample = np.asarray(array[:: max(1, len(array) // 4096)], np.float32)
    unit = bool(np.all(np.abs(np.linalg.norm(sample, axis=1) - 1) < 1e-2))
    return EmbeddingSpace(model, int(array.shape[1]), metric=metric, normalised=unit)
