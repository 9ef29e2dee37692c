"""``fct search``: the k nearest gallery rows of each query, exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fct.cli.named_arrays import named_as_options
from fct.cli.storage_option import StorageOption
from fct.options.groups import storage_options
from fct.types import Array, JsonDict, StorageAccess

if TYPE_CHECKING:
    import pyarrow as pa

    import fct
    from fct.gallery.interfaces import Source

_WHERE = "a file, folder, glob or URL, with :COLUMN where there are several"
_FORMS = (".parquet", ".json", ".jsonl")


def search(
    queries: Annotated[str, typer.Option(help=f"(n, d): {_WHERE}.")],
    gallery: Annotated[str, typer.Option(help="(m, d), likewise: what a backfill wrote, for one.")],
    k: Annotated[int, typer.Option("-k", help="How many of each query's nearest.")] = 10,
    metric: Annotated[str, typer.Option(help="l2, ip or cosine; auto: the gallery's, else l2.")] = "auto",
    id_column: Annotated[
        str, typer.Option(help="Column of the gallery's ids; auto: id, _id, pk, key or uid; '': row numbers alone.")
    ] = "auto",
    query_id_column: Annotated[str, typer.Option(help="Column of the queries' ids, likewise.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="A .parquet, .json or .jsonl; without: JSON lines here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    storage_option: StorageOption = None,
) -> None:
    """Find the k nearest gallery rows of each query, exactly: their ids, row numbers and distances.

    Distances are squared for l2, and similarities, largest first, for ip and cosine; ties go to the lower row.

    Example: fct search --queries new-queries.npy --gallery new-gallery/ -k 10 --out nearest.parquet
    """
    import fct
    from fct.atomic_files import refuse_existing
    from fct.gallery.mixed_rows import warn_of_mixed

    if out is not None:
        refuse_existing(out, overwrite=overwrite, name="--out")
        if out.suffix not in _FORMS:
            raise ValueError(f"--out: expected a name ending in {', '.join(_FORMS)}, got {out}")
    access: StorageAccess = {"storage_options": storage_options(storage_option)}
    asked, asked_source = _opened(queries, "--queries", access)
    stored, stored_source = _opened(gallery, "--gallery", access)
    space = stored_source.space
    if space is not None and asked_source.space is not None:
        space.require_same(asked_source.space, "--queries")
    if metric == "auto":
        metric = space.metric if space is not None else "l2"
    warn_of_mixed(stored_source, "--gallery", metric=metric)
    with named_as_options({"queries": "--queries", "gallery": "--gallery", "k": "-k", "metric": "--metric"}):
        found = fct.topk(asked, stored, k, metric=metric)
    _write(
        _table(
            found,
            _ids(asked_source, query_id_column, "--query-id-column"),
            _ids(stored_source, id_column, "--id-column"),
        ),
        out,
    )


def _opened(location: str, option: str, access: StorageAccess) -> tuple[Array, Source]:
    """(the vectors, the open gallery)"""
    from fct.gallery import load_vectors, open_source, split_column

    place, column = split_column(location, **access)
    with named_as_options({"source": option}):
        source = open_source(place, name=option, **access)
        return load_vectors(source, name=option, column=column), source


def _ids(source: Source, wanted: str, option: str) -> pa.Array | None:
    """The ids as they are stored, whatever their type; None where rows go by their number."""
    from fct.gallery import load_ids

    return load_ids(source, wanted, name=option)


def _table(found: fct.TopK, asked: pa.Array | None, stored: pa.Array | None) -> pa.Table:
    """One line a query: its number, its id, and lists of k rows, ids and distances."""
    import numpy as np
    import pyarrow as pa

    n, k = found.indices.shape

    def lists(values: Array) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(np.arange(0, (n + 1) * k, k, dtype=np.int32)), values)

    rows = pa.array(np.ascontiguousarray(found.indices).ravel())
    columns: dict[str, pa.Array] = {"query": pa.array(np.arange(n))}
    if asked is not None:
        columns["query_id"] = asked
    columns["rows"] = lists(rows)
    if stored is not None:
        columns["ids"] = lists(stored.take(rows))
    columns["distances"] = lists(pa.array(np.ascontiguousarray(found.distances).ravel()))
    return pa.table(columns)


def _write(table: pa.Table, out: Path | None) -> None:
    from fct.atomic_files import atomic_path, write_text

    if out is not None and out.suffix == ".parquet":
        import pyarrow.parquet as pq

        with atomic_path(out) as part:
            pq.write_table(table, part)
        return
    rows = list(_rows(table))
    lines = [json.dumps(row, allow_nan=False) for row in rows]
    if out is None:
        for row in rows:
            typer.echo(json.dumps(row, allow_nan=False))
    elif out.suffix == ".jsonl":
        write_text(out, "".join(f"{line}\n" for line in lines))
    else:
        write_text(out, "[\n" + ",\n".join(lines) + "\n]\n")


def _rows(table: pa.Table) -> Iterator[JsonDict]:
    from collections import Counter

    from fct.gallery.json_values import json_values

    hollow: Counter[str] = Counter()
    columns = [json_values(table[name].combine_chunks(), name, 0, hollow) for name in table.schema.names]
    for row in zip(*columns, strict=True):
        yield dict(zip(table.schema.names, row, strict=True))
