"""``--storage-option KEY=VALUE``: what fsspec passes to the store behind a URL."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["StorageOption"]

StorageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option", metavar="KEY=VALUE", help="For the store behind a URL, as fsspec names it; may be repeated."
    ),
]
