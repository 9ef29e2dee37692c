"""``fct export``: a new gallery as the files that another database imports."""

from __future__ import annotations

from typing import Annotated

import typer
from typing_extensions import Unpack

from fct.cli.console import console
from fct.cli.flags import flags
from fct.options.groups import ExportOptions
from fct.options.keywords import ExportKeywords

__all__ = ["export"]


@flags(ExportOptions)
def export(
    gallery: Annotated[str, typer.Argument(help="A gallery that a backfill wrote, or its URL.")],
    out: Annotated[str, typer.Argument(help="Folder for the files, on this machine; must be empty.")],
    to: Annotated[str, typer.Option(help="milvus, qdrant or pgvector.")],
    no_payload: Annotated[bool, typer.Option("--no-payload", help="Ids and vectors alone.")] = False,
    **options: Unpack[ExportKeywords],
) -> None:
    """Write the bulk-import files of a vector database, for an index that is built anew. docs/export.md loads them.

    Never overwrite vectors inside a built HNSW or IVF index: it stays silently worse.

    Example: fct export new-gallery/ for-postgres/ --to pgvector
    """
    from fct.gallery.bulk import export_bulk

    if no_payload:
        if options.get("columns"):
            raise ValueError("--no-payload: expected no --column beside it")
        options["columns"] = ()
    for file in export_bulk(gallery, out, to, **options):
        console.print(str(file), soft_wrap=True)
