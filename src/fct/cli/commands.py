"""Imports every module that registers commands on :data:`fct.cli.app.app`, one line each, in the order of
``fct --help``: that of an upgrade, then what looks at the machine."""

# isort: off
from fct.cli import quickstart_command as quickstart_command
from fct.cli import side_info_command as side_info_command
from fct.cli import fit_command as fit_command
from fct.cli import evaluate_command as evaluate_command
from fct.cli import backfill_command as backfill_command
from fct.cli import export_command as export_command
from fct.cli import reproduce_command as reproduce_command
from fct.cli import info_command as info_command
from fct.cli import doctor_command as doctor_command
from fct.cli import bench_command as bench_command
