"""Every command, in the order of ``fct --help``: that of an upgrade, then what looks at the machine."""

from __future__ import annotations

from collections.abc import Callable

from fct.cli.backfill_command import backfill
from fct.cli.bench_command import bench
from fct.cli.compare_command import compare
from fct.cli.doctor_command import doctor
from fct.cli.evaluate_command import evaluate
from fct.cli.export_command import export
from fct.cli.fit_command import fit
from fct.cli.info_command import info
from fct.cli.inspect_command import inspect
from fct.cli.judge_command import judge
from fct.cli.plan_command import plan
from fct.cli.quickstart_command import quickstart
from fct.cli.report_command import report
from fct.cli.reproduce_command import reproduce
from fct.cli.search_command import search
from fct.cli.side_info_command import train_side_info
from fct.cli.transform_command import transform
from fct.cli.verify_command import verify

__all__ = ["COMMANDS"]

COMMANDS: tuple[Callable[..., None], ...] = (
    quickstart,
    inspect,
    train_side_info,
    compare,
    fit,
    evaluate,
    search,
    plan,
    backfill,
    verify,
    judge,
    report,
    transform,
    export,
    reproduce,
    info,
    doctor,
    bench,
)
