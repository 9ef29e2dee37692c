"""``fct evaluate``: the measures of one retrieval system from arrays on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fct.cli.console import console
from fct.cli.npy_argument import load_npy

__all__ = ["evaluate", "load_column"]


def load_column(path: Path, column: str | None, option: str) -> Any:
    """A .npy array (memory-mapped), or a column of a .parquet file: (n,), or (n, d) where it holds lists."""
    if path.suffix == ".npy":
        return load_npy(path, option)
    if path.suffix != ".parquet":
        raise ValueError(f"{option}: expected a .npy or .parquet file, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"{option}: expected a .parquet file, found none at {path}")
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
    except pa.ArrowInvalid as error:
        raise ValueError(f"{option}: expected a Parquet file, got {path}: {error}") from error
    if column not in names:
        raise ValueError(
            f"{option}: expected a column of {path} ({', '.join(names)}), got "
            f"{'none' if column is None else repr(column)}; write FILE:COLUMN"
        )
    values = pq.read_table(path, columns=[column]).column(column).combine_chunks()
    if values.null_count:
        raise ValueError(f"{option}: expected no missing values, got {values.null_count} in {column!r} of {path}")
    if not (pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type)):
        return values.to_numpy(zero_copy_only=False) if not pa.types.is_string(values.type) else np.array(
            values.to_pylist()
        )  # fmt: skip
    lengths = {len(values[0])} if pa.types.is_fixed_size_list(values.type) and len(values) else set(
        values.value_lengths().to_pylist()
    )  # fmt: skip
    if len(lengths) > 1:
        raise ValueError(f"{option}: expected rows of one length, got lengths {sorted(lengths)[:5]} in {column!r}")
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), max(lengths, default=0))


def _load(where: str, option: str) -> Any:
    file, _, column = where.partition(".parquet:")
    return load_column(Path(file + ".parquet"), column, option) if column else load_column(Path(where), None, option)


def evaluate(
    queries: Annotated[str, typer.Option(help="(n, d): FILE.npy or FILE.parquet:COLUMN.")],
    query_labels: Annotated[str, typer.Option(help="(n,): FILE.npy or FILE.parquet:COLUMN.")],
    gallery: Annotated[str | None, typer.Option(help="(m, d), likewise; without: the queries' own rows.")] = None,
    gallery_labels: Annotated[str | None, typer.Option(help="(m,), likewise; without: the queries' labels.")] = None,
    metric: Annotated[str, typer.Option(help="l2, ip or cosine.")] = "l2",
    same_items: Annotated[
        bool, typer.Option("--same-items", help="The gallery holds the queries' items in order: leave each one's own.")
    ] = False,
    k: Annotated[list[int] | None, typer.Option(help="CMC top-k besides 1 and 5; may be repeated.")] = None,
    bootstrap: Annotated[int, typer.Option(help="Resamples for the 95 % confidence intervals; 0: none.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the figures there, as JSON.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
) -> None:
    """Measure CMC and mean average precision of queries against a gallery, exactly.

    Example: fct evaluate --queries new.npy --query-labels y.npy --gallery g.parquet:embedding --gallery-labels
    g.parquet:label
    """
    from rich.table import Table

    import fct
    from fct.atomic_files import refuse_existing, write_text

    if out is not None:
        refuse_existing(out, overwrite=overwrite, name="--out")
    rows = _load(queries, "--queries")
    found = fct.evaluate(
        rows,
        rows if gallery is None else _load(gallery, "--gallery"),
        _load(query_labels, "--query-labels"),
        None if gallery_labels is None else _load(gallery_labels, "--gallery-labels"),
        metric=metric,
        same_items=same_items or gallery is None,
        ks=tuple(k or ()),
        bootstrap=bootstrap,
        seed=seed,
    )
    table = Table("measure", "%", "95 % interval")
    for name, label, value in [("map", "mAP", found.map)] + [
        (f"cmc{n}", f"CMC top-{n}", v) for n, v in found.cmc.items()
    ]:
        pair = found.intervals.get(name)
        table.add_row(
            label, f"{100 * value:.2f}", "" if pair is None else f"{100 * pair[0]:.2f} to {100 * pair[1]:.2f}"
        )
    console.print(table)
    console.print(f"{found.queries} queries; {found.queries_without_match} more have no match and were left out")
    if out is not None:
        write_text(out, json.dumps(found.to_dict(), indent=2) + "\n")
        console.print(f"wrote {out}")
