"""``fct verify``: whether a new gallery is whole."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from typing_extensions import Unpack

from fct.cli.console import console
from fct.cli.flags import flags
from fct.cli.gallery_arguments import shards
from fct.options.groups import VerifyOptions
from fct.options.keywords import VerifyKeywords

if TYPE_CHECKING:
    from fct.backfilling.verify import VerifyReport

__all__ = ["verify"]


@flags(VerifyOptions)
def verify(
    gallery: Annotated[str, typer.Argument(help="A backfill's destination.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **options: Unpack[VerifyKeywords],
) -> None:
    """Check a new gallery: its journal and checksums, every row's ids and payload against the source, vectors in some.

    Exit code 1 on any problem. Without --source the gallery is compared with its own journal alone, and the last line
    says what was not proven.

    Example: fct verify new-gallery/ --source gallery/
    """
    from dataclasses import asdict

    from fct.backfilling.verify import gallery_journal, verify_gallery
    from fct.gallery.stores import opening

    named = options.get("source") is not None or options.get("trust_journal")
    if not named and not as_json and sys.stdin.isatty():
        access = opening(VerifyOptions.split(options).access)
        _, job = gallery_journal(gallery, journal=options.get("journal"), **access)
        console.print(f"The gallery's journal says that it was made from {job.source}")
        options["trust_journal"] = typer.confirm("Open it and compare?", default=False)
    report = verify_gallery(gallery, **options)
    if as_json:
        typer.echo(json.dumps({**asdict(report), "ok": report.ok, "proven": report.proven}, indent=1))
    else:
        _show(report)
    if not report.ok:
        raise typer.Exit(1)


def _show(report: VerifyReport) -> None:
    console.print(
        f"{report.rows_in:,} rows in = {report.rows_out:,} out + {report.rejects:,} rejected, {shards(report.shards)}, "
        f"{report.bytes:,} bytes"
    )
    if report.source_rows is not None:
        console.print(f"the source has {report.source_rows:,} rows by another reader's count")
    if report.read_alike:
        console.print(f"{report.read_alike:,} rows are, by that reader, what was mapped")
    if report.compared:
        names = ", ".join(report.checksums)
        console.print(f"{report.compared:,} rows compared with the source's: {names}", soft_wrap=True)
    if report.spot_checked:
        console.print(f"{report.spot_checked:,} rows against the reference: worst error {report.worst_error:.2g}")
    if report.true_rows:
        console.print(f"{report.true_rows:,} re-embedded rows are the vectors that they were given")
    for problem in report.problems:
        console.say("problem:", problem, "bold red")
    for what in report.unproven:
        console.say("note:", what, "yellow")
    count = len(report.problems)
    if count:
        console.print(f"{count} {'problem' if count == 1 else 'problems'}")
    else:
        console.print("ok" if report.proven else "ok as far as it was checked")
