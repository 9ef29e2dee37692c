"""Imports every module that registers commands on :data:`fct.cli.app.app`, one line each, in the order of
``fct --help``: that of an upgrade, then what looks at the machine."""

# isort: off
from fct.cli import quickstart as quickstart
from fct.cli import train_side_info as train_side_info
from fct.cli import fit as fit
from fct.cli import evaluate as evaluate
from fct.cli import backfill as backfill
from fct.cli import reproduce as reproduce
from fct.cli import info as info
from fct.cli import doctor as doctor
from fct.cli import bench as bench
