"""What the commands over galleries name first, and how they count."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["NewGallery", "OldGallery", "TransformationFile", "duration", "shards", "size"]

OldGallery = Annotated[str, typer.Argument(help="Old gallery: folder, glob, file, .lance dataset, or URL (s3://...).")]
NewGallery = Annotated[
    str,
    typer.Argument(
        help="New gallery: a folder or a .lance dataset that need not exist, delta://PATH, "
        "iceberg://CATALOG/NAMESPACE.TABLE, or a database."
    ),
]
TransformationFile = Annotated[str, typer.Option("--transformation", "-t", help="h, a .safetensors file.")]


def shards(count: int) -> str:
    return f"{count:,} {'shard' if count == 1 else 'shards'}"


def size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
