"""``fct quickstart``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fct.cli.console import console


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("fct-quickstart"),
    data_root: Annotated[
        Path | None,
        typer.Option(help="Folder with the full Fashion-MNIST's four idx files; without: the subset in the package."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same table on the same machine.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds something.")] = False,
) -> None:
    """Live through one upgrade on real images: old model, gallery, new model, h, backfill, verdict.

    Two processors are enough; no GPU, no network.

    Example: fct quickstart --seed 1 --out upgrade
    """
    from fct.life.quickstart import run_quickstart

    run_quickstart(out, data_root=data_root, seed=seed, overwrite=overwrite, console=console)
