"""``fct verify``: whether a new gallery is whole."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from typing_extensions import Unpack

from fct.cli.console import console
from fct.cli.flags import flags
from fct.cli.gallery_arguments import shards
from fct.options.groups import VerifyOptions
from fct.options.keywords import VerifyKeywords

__all__ = ["verify"]


@flags(VerifyOptions)
def verify(
    gallery: Annotated[str, typer.Argument(help="A backfill's destination.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **options: Unpack[VerifyKeywords],
) -> None:
    """Check a new gallery: every row there once, checksums, spaces, spot checks. Exit code 1 on any problem.

    Example: fct verify new-gallery/
    """
    from dataclasses import asdict

    from fct.backfilling.verify import verify_gallery

    report = verify_gallery(gallery, **options)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=1))
    else:
        console.print(
            f"{report.rows_in:,} rows in = {report.rows_out:,} out + {report.rejects:,} rejected, "
            f"{shards(report.shards)}, {report.bytes:,} bytes"
        )
        if report.spot_check_skipped:
            console.print(f"no spot check: {report.spot_check_skipped}", soft_wrap=True)
        else:
            console.print(f"{report.spot_checked} rows against the reference: worst error {report.worst_error:.2g}")
        for problem in report.problems:
            console.say("problem:", problem, "bold red")
        console.print("ok" if report.ok else f"{len(report.problems)} problems")
    if not report.ok:
        raise typer.Exit(1)
