"""A script that was written for version 0.1 still finds the modules it imported."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from fct.moved_modules import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_the_old_name_is_the_new_module(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is {MOVED[old]} since fct 0.2"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert module.__name__ == MOVED[old]


def test_from_imports_and_the_new_module_stay_as_they_are() -> None:
    code = (
        "import fct.rows, fct.arrays; assert fct.arrays is fct.rows\n"
        "from fct.ops.dispatch import default_threads; import fct.training.config\n"
        "import fct.ops.registry as r, importlib.util\n"
        "assert r.__spec__.name == 'fct.ops.registry', r.__spec__\n"
        "try:\n    import fct.nothing\nexcept ModuleNotFoundError as e: assert 'fct.nothing' in str(e)\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], check=True)
