"""``fct backfill``: an old gallery to a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typing_extensions import Unpack

from fct.cli.console import console
from fct.cli.flags import flags
from fct.cli.gallery_arguments import NewGallery, OldGallery, TransformationFile, shards
from fct.cli.judge_command import show_judged
from fct.options.groups import BackfillOptions
from fct.options.keywords import BackfillKeywords

__all__ = ["backfill"]


@flags(BackfillOptions)
def backfill(
    source: OldGallery,
    destination: NewGallery,
    transformation: TransformationFile,
    faiss: Annotated[
        str | None, typer.Option(help="Build a FAISS index of the new gallery: Flat, IVF4096,PQ32.")
    ] = None,
    **options: Unpack[BackfillKeywords],
) -> None:
    """Map every row of a gallery. Stop and start at will; nothing is done twice and nothing is lost.

    Exit code 0: done; 3: refused by the quality gate; 4: done, with rows in rejects/.

    Example: fct backfill gallery/ new-gallery/ -t h.safetensors --old-model mobile-1
    """
    from fct.backfilling.run import backfill as run
    from fct.errors import QualityGateError

    if faiss is not None:
        from fct.artifact.transformation import Transformation
        from fct.gallery.faiss_index import build_faiss, check_faiss

        check_faiss(destination, faiss, Transformation.load(transformation).new_space)
    try:
        report = run(source, destination, transformation, **options)
    except QualityGateError as error:
        console.say("refused:", str(error), "bold red")
        raise typer.Exit(3) from None
    console.print(
        f"{report.rows_in:,} rows in = {report.rows_out:,} out + {report.rejects:,} rejected; "
        f"{shards(report.shards_done)} done, {report.shards_kept} kept, {report.rows_per_second:,.0f} rows/s "
        f"({report.backend}, {report.precision})",
        soft_wrap=True,
    )
    if report.judged is not None:
        show_judged(report.judged)
    if report.chosen:
        console.print(f"{report.reembedded:,} rows re-embedded of {report.chosen:,} that were chosen")
    if report.unknown:
        named = ", ".join(report.unknown_ids) + (", ..." if report.unknown > len(report.unknown_ids) else "")
        console.print(
            f"--reembed: {report.unknown:,} ids are not in the gallery ({named})", soft_wrap=True, markup=False
        )
    for line in report.left_to_do:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if faiss is not None:
        journal = options.get("journal")
        out = None if journal is None else Path(journal) / "index.faiss"
        console.print(f"index: {build_faiss(destination, faiss, out)}")
    if report.rejects:
        console.print(f"rejected rows: {report.rejects_folder}")
        raise typer.Exit(4)
