"""``fct export``: the files that a vector database imports in bulk."""

from __future__ import annotations

from typing import Annotated

import typer

from fct.cli.app import app, console
from fct.cli.backfill_command import storage_options


@app.command()
def export(
    gallery: Annotated[str, typer.Argument(help="A gallery that a backfill wrote, or its URL.")],
    out: Annotated[str, typer.Argument(help="Folder for the files, on this machine; must be empty.")],
    to: Annotated[str, typer.Option(help="milvus, qdrant or pgvector.")],
    id_column: Annotated[
        str, typer.Option(help="Column of the ids; auto: id, _id, pk, key or uid, else the rows' numbers; '': those.")
    ] = "auto",
    vector_column: Annotated[str, typer.Option(help="Column of the vectors; auto: the one that fct wrote.")] = "auto",
    column: Annotated[
        list[str] | None, typer.Option(help="Payload column that goes along; may be repeated. By default all.")
    ] = None,
    no_payload: Annotated[bool, typer.Option("--no-payload", help="Ids and vectors alone.")] = False,
    id_field: Annotated[str, typer.Option(help="What the ids are called there.")] = "id",
    vector_field: Annotated[
        str, typer.Option(help="What the vectors are called there; auto: vector, for pgvector embedding.")
    ] = "auto",
    table: Annotated[str, typer.Option(help="pgvector: the table that table.sql makes.")] = "items",
    halfvec: Annotated[bool, typer.Option("--halfvec", help="pgvector: vectors of float16.")] = False,
    storage_option: Annotated[
        list[str] | None,
        typer.Option("--storage-option", metavar="KEY=VALUE", help="For the store behind a URL; may be repeated."),
    ] = None,
    retries: Annotated[int, typer.Option(help="Further attempts where a store may have failed.")] = 6,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a store's answer.")] = 60.0,
) -> None:
    """Write the bulk-import files of a vector database, for an index that is built anew. docs/export.md loads them.

    Never overwrite vectors inside a built HNSW or IVF index: it stays silently worse.

    Example: fct export new-gallery/ for-postgres/ --to pgvector
    """
    from fct.gallery.bulk import export_bulk

    if no_payload and column:
        raise ValueError("--no-payload: expected no --column beside it")
    files = export_bulk(
        gallery,
        out,
        to,
        id_column=id_column,
        vector_column=vector_column,
        columns=() if no_payload else column or None,
        id_field=id_field,
        vector_field=vector_field,
        table=table,
        halfvec=halfvec,
        storage_options=storage_options(storage_option),
        retries=retries,
        timeout=timeout,
    )
    for file in files:
        console.print(str(file), soft_wrap=True)
