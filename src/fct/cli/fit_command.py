"""``fct fit``: h from pairs wherever they lie."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fct.cli.console import console
from fct.cli.named_arrays import named_as_options, named_vectors
from fct.cli.storage_option import StorageOption
from fct.options.groups import storage_options
from fct.types import Array, JsonDict, StorageAccess

if TYPE_CHECKING:
    from fct.artifact.transformation import Transformation
    from fct.spaces import EmbeddingSpace


_WHERE = "a file, folder, glob or URL, with :COLUMN where there are several"


def fit(
    out: Annotated[Path, typer.Option(help="Where h goes, a .safetensors file.")],
    old: Annotated[str | None, typer.Option(help=f"Old embeddings of a sample of items, (n, d_old): {_WHERE}.")] = None,
    new: Annotated[
        str | None, typer.Option(help="New embeddings of the same items in the same order, (n, d_new), likewise.")
    ] = None,
    side_info: Annotated[
        str | None, typer.Option(help="Side-information of the same items, (n, d_side), likewise; without: weaker.")
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(help="All of them at once: a gallery with columns old, new and perhaps side, or an .npz."),
    ] = None,
    config: Annotated[str, typer.Option(help="auto, our default, or paper, the published recipe.")] = "auto",
    old_model: Annotated[str, typer.Option(help="Id of the old model, stored in h.")] = "old",
    new_model: Annotated[str, typer.Option(help="Id of the new model, stored in h.")] = "new",
    side_model: Annotated[str, typer.Option(help="Id of the model behind --side-info.")] = "side-information",
    metric: Annotated[str, typer.Option(help="How the new vectors are compared: l2, ip or cosine.")] = "l2",
    seed: Annotated[int, typer.Option(help="Same seed, same h on the same machine.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    storage_option: StorageOption = None,
) -> None:
    """Fit the transformation h(old, side-information) -> new on pairs.

    A .npy file is read as a memory map, so it need not fit in memory.

    Example: fct fit --old old.npy --side-info side.npy --new new.npy --out h.safetensors --old-model mobile-1
    """
    from fct.atomic_files import refuse_existing
    from fct.fit.transformation_fit import fit_transformation
    from fct.spaces import check_metric

    check_metric(metric, "--metric")
    refuse_existing(out, overwrite=overwrite, name="--out")
    arrays = _pairs(old, side_info, new, pairs, {"storage_options": storage_options(storage_option)})
    given = {n: f"--pairs: {n}" if pairs else f"--{n.replace('_', '-')}" for n in arrays}
    with named_as_options(given):
        h = fit_transformation(
            arrays["old"],
            arrays["side_info"],
            arrays["new"],
            config=config,
            seed=seed,
            device=device,
            old_space=_space(arrays["old"], old_model, metric),
            new_space=_space(arrays["new"], new_model, metric),
            side_model=side_model,
        )
    h.save(out)
    console.print(f"{h!r}", highlight=False, soft_wrap=True)
    for line in _validation(h):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"saved to {out}", highlight=False)


def _pairs(
    old: str | None, side_info: str | None, new: str | None, pairs: str | None, access: StorageAccess
) -> JsonDict:
    """old, side_info and new as arrays, side_info None where there is none."""
    if pairs is None:
        missing = [name for name, where in (("--old", old), ("--new", new)) if where is None]
        if old is None or new is None:
            raise ValueError(f"{missing[0]}: expected vectors, or --pairs with old and new in it, got none")
        side = None if side_info is None else named_vectors(side_info, "--side-info", ("side", "side_info"), **access)
        return {
            "old": named_vectors(old, "--old", **access),
            "side_info": side,
            "new": named_vectors(new, "--new", ("new",), **access),
        }
    if not old is new is side_info is None:
        raise ValueError("--pairs: expected no --old, --new or --side-info beside it, since it holds all of them")
    from fct.gallery import load_pairs

    with named_as_options({"source": "--pairs"}):
        found = load_pairs(pairs, name="--pairs", **access)
    for name in ("old", "new"):
        if name not in found:
            raise ValueError(f"--pairs: expected arrays old and new, and perhaps side, got {', '.join(found)}")
    return {"old": found["old"], "side_info": found.get("side"), "new": found["new"]}


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


def _space(array: Array, model: str, metric: str) -> EmbeddingSpace | None:
    """The space that an array's rows lie in; None leaves a bad rank to the fit, which names the argument."""
    import numpy as np

    from fct.spaces import EmbeddingSpace

    if array.ndim != 2 or 0 in array.shape:
        return None
    sample = np.asarray(array[:: max(1, len(array) // 4096)], np.float32)
    unit = bool(np.all(np.abs(np.linalg.norm(sample, axis=1) - 1) < 1e-2))
    return EmbeddingSpace(model, int(array.shape[1]), metric=metric, normalised=unit)
