"""``fct …`` in this process. A process of its own costs seconds of imports, and is what tests/cli is about."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from unittest import mock

from fct.cli import main

__all__ = ["run_here"]


def run_here(*words: object, environment: dict[str, str] | None = None, columns: int = 200) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of ``fct words…`` in ``environment``, this process's by default."""
    wanted = {**(os.environ if environment is None else environment), "COLUMNS": str(columns)}
    out, err, code = io.StringIO(), io.StringIO(), 0
    with mock.patch.dict(os.environ, wanted, clear=True), warnings.catch_warnings():
        warnings.resetwarnings()  # as in a process of its own a warning is said, where pytest makes an error of it
        for kind in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main([str(word) for word in words])
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else int(left.code is not None)
    return code, out.getvalue(), err.getvalue()
