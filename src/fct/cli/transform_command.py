"""``fct transform``: one file to one file."""

from __future__ import annotations

from typing import Annotated

import typer
from typing_extensions import Unpack

from fct.cli.console import console
from fct.cli.flags import flags
from fct.cli.gallery_arguments import TransformationFile
from fct.options.groups import TransformFileOptions
from fct.options.keywords import TransformFileKeywords

__all__ = ["transform"]


@flags(TransformFileOptions)
def transform(
    old: Annotated[str, typer.Argument(help="Old vectors: a file of any format that backfill reads, or its URL.")],
    out: Annotated[
        str, typer.Argument(help="New vectors, .npy, .fbin, .parquet, .arrow, .feather or .lance, on this machine.")
    ],
    transformation: TransformationFile,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    **options: Unpack[TransformFileKeywords],
) -> None:
    """Map one file to one file, in one go; a bad row stops it. For more than a few gigabytes use backfill.

    Example: fct transform old.npy new.npy --side-source side.npy -t h.safetensors --old-model mobile-1
    """
    from fct.backfilling.single import transform_file

    rows = transform_file(old, out, transformation, overwrite=overwrite, **options)
    console.print(f"{rows:,} rows -> {out}", soft_wrap=True)
