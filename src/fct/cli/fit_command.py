"""``fct fit``: h from three arrays on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fct.cli.console import console
from fct.cli.npy_argument import load_npy

if TYPE_CHECKING:
    from fct.artifact.transformation import Transformation
    from fct.spaces import EmbeddingSpace


def fit(
    old: Annotated[Path, typer.Option(help="Old embeddings of a sample of items, (n, d_old) .npy.")],
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

    Example: fct fit --old old.npy --side-info side.npy --new new.npy --out h.safetensors --old-model mobile-1
    """
    from fct.atomic_files import refuse_existing
    from fct.fit.transformation_fit import fit_transformation
    from fct.spaces import check_metric

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
    console.print(f"{h!r}", highlight=False, soft_wrap=True)
    for line in _validation(h):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"saved to {out}", highlight=False)


def _validation(h: Transformation) -> list[str]:
    """What the fit measured on the pairs that it held out: the error, and what each faster precision changes."""
    info = h.info
    lines = [
        f"validation: R2 {info['validation']['r2']:.3f} on {info['validation_pairs']:,} held-out pairs, best epoch "
        f"{info['best_epoch']} of {info['config']['epochs']}"
    ]
    for name, effect in h.precisions.items():
        verdict = "may" if h.allows(name) else "does not"
        lines.append(f'{name} keeps {effect.top10_kept:.1%} of the ten nearest: precision "auto" {verdict} take it')
    return lines


def _space(array: Any, model: str, metric: str) -> EmbeddingSpace | None:
    """The space that an array's rows lie in; None leaves a bad rank to the fit, which names the argument."""
    import numpy as np

    from fct.spaces import EmbeddingSpace

    if array.ndim != 2 or 0 in array.shape:
        return None
    sample = np.asarray(array[:: max(1, len(array) // 4096)], np.float32)
    unit = bool(np.all(np.abs(np.linalg.norm(sample, axis=1) - 1) < 1e-2))
    return EmbeddingSpace(model, int(array.shape[1]), metric=metric, normalised=unit)
