"""What is not installed is named with its extra; a worker needs none (tests/install.sh asks a real base install)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import fct
from fct import extras
from tests.cli.worker import live

ROOT = Path(__file__).parents[2]


@pytest.mark.slow  # fourteen processes
def test_a_worker_needs_no_extra(tmp_path: Path) -> None:
    live("blocked", tmp_path)


def test_every_extra_named_is_one_of_the_projects() -> None:
    declared = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(extras.EXTRAS.values()) - set(declared) == set()


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(fct.MissingExtraError) as raised:
        extras.need("faiss", "faiss")
    assert str(raised.value) == "faiss: needs faiss-cpu, which is not installed: pip install 'fct-embeddings[faiss]'"


def test_a_package_that_fails_by_itself_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lance.py").write_text("import something_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "lance", raising=False)
    with pytest.raises(ModuleNotFoundError, match="something_that_is_not_there"):
        extras.need("lance", "lance")
