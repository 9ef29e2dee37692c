"""Every command: help with an example whose options exist, errors in one line, tracebacks with --debug, exit codes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import fct
from fct.cli import app as cli
from fct.cli import commands, main
from fct.fit import auto_plan

assert commands
COMMANDS: Any = typer.main.get_group(cli.app).commands


def run(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(args)
    out = capsys.readouterr()
    return int(left.value.code or 0), out.out, out.err


def plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


def test_the_commands_stand_in_the_order_of_an_upgrade() -> None:
    assert list(COMMANDS) == [
        "quickstart", "inspect", "train-side-info", "compare", "fit", "evaluate", "search", "plan",
        "backfill", "verify", "judge", "report", "transform", "export", "reproduce", "info", "doctor", "bench",
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_has_an_example_that_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([name, "--help"], capsys)
    assert code == 0
    assert f"Example: fct {name}" in plain(out), "no example in the help"
    command: Any = COMMANDS[name]
    known = {flag for parameter in command.params for flag in [*parameter.opts, *parameter.secondary_opts]}
    known |= {"--help", "--debug"}
    for line in re.findall(rf"Example: fct ({name}[^\n]*)", command.help):
        words = shlex.split(line)[1:]
        assert {w.split("=")[0] for w in words if w.startswith("-")} <= known, line
        command.make_context(name, words, resilient_parsing=True)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_is_explained(name: str) -> None:
    for parameter in COMMANDS[name].params:
        if parameter.opts and parameter.opts[0].startswith("-") and parameter.opts[0] != "--help":
            assert parameter.help, f"fct {name} {parameter.opts[0]} has no help"


def test_an_unknown_option_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(["info", "--colour"], capsys)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "--colour" in err


def test_a_missing_option_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(["fit", "--old", "a.npy"], capsys)
    assert code == 2
    assert "--new" in err or "--out" in err
    assert err.endswith("(see fct fit --help)\n")
    assert err.count("\n") == 1


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(["upgrade"], capsys)
    assert code == 2
    assert "upgrade" in err
    assert err.endswith("(see fct --help)\n")


def fit_args(tmp_path: Path) -> list[str]:
    words = ["fit"]
    for name, d in (("old", 6), ("new", 5), ("side-info", 4)):
        path = tmp_path / f"{name}.npy"
        np.save(path, np.random.default_rng(d).standard_normal((40, d)).astype(np.float32))
        words += [f"--{name}", str(path)]
    return [*words, "--out", str(tmp_path / "h.safetensors")]


def test_fit_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_plan, "_FEW_STEPS", 60)  # how good h is, tests/fit asks
    words = [*fit_args(tmp_path), "--old-model", "mobile-1", "--new-model", "resnet-2", "--metric", "cosine"]
    code, out, err = run(words, capsys)
    assert (code, err) == (0, "")
    assert "h.safetensors" in out
    assert out.startswith("Transformation(")  # where nobody watches, no bar leaves a line
    assert re.search(r"on \d+ held-out pairs, best epoch", out)
    h = fct.Transformation.load(tmp_path / "h.safetensors")
    assert (h.d_old, h.d_side, h.d_new) == (6, 4, 5)
    assert (h.old_space.model_id, h.new_space.model_id, h.new_space.metric) == ("mobile-1", "resnet-2", "cosine")
    before = (tmp_path / "h.safetensors").read_bytes()
    code, _, err = run(words, capsys)
    assert code == 1
    assert "exists; choose another place or pass --overwrite" in err
    assert (tmp_path / "h.safetensors").read_bytes() == before


def test_fit_names_the_bad_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = fit_args(tmp_path)
    np.save(tmp_path / "side-info.npy", np.zeros((39, 4), np.float32))
    code, _, err = run(words, capsys)
    assert code == 1
    assert "--side-info: expected (40, d) to match old, got (39, 4)" in err
    assert err.count("\n") == 1
    (tmp_path / "side-info.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr'")
    code, _, err = run(words, capsys)
    assert code == 1
    assert "--side-info: expected a whole .npy file" in err
    (tmp_path / "side-info.npy").unlink()
    code, _, err = run(words, capsys)
    assert code == 1
    assert "--side-info: expected a gallery, found nothing at" in err
    code, _, err = run([*words, "--metric", "l3"], capsys)
    assert code == 1
    assert "--metric: expected one of l2, ip, cosine, got 'l3'" in err
    assert not (tmp_path / "h.safetensors").exists()


def test_objects_in_an_npy_file_are_never_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = fit_args(tmp_path)
    np.save(tmp_path / "old.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    code, _, err = run(words, capsys)
    assert code == 1
    assert "--old: expected numbers in" in err


def test_debug_gives_the_traceback_anywhere_on_the_line(tmp_path: Path) -> None:
    words = fit_args(tmp_path)
    (tmp_path / "old.npy").unlink()
    for args in (["--debug", *words], [*words, "--debug"]):
        with pytest.raises(FileNotFoundError, match=r"--old: expected a gallery, found nothing at .*old\.npy"):
            main(args)


def test_brackets_in_a_message_survive(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise ValueError("rows: expected [n, 3], got [/red] " + "x" * 200)

    monkeypatch.setattr("fct.info.build_info", broken)
    code, _, err = run(["info"], capsys)
    assert code == 1
    assert err == "error: rows: expected [n, 3], got [/red] " + "x" * 200 + "\n"


def test_an_unexpected_error_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise RuntimeError("first\n  second")

    monkeypatch.setattr("fct.info.build_info", broken)
    code, _, err = run(["info"], capsys)
    assert code == 1
    assert err == "error: RuntimeError: first second (run again with --debug for the traceback)\n"


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fct.info.build_info", broken)
    code, _, err = run(["info"], capsys)
    assert code == 130
    assert "interrupted" in err


def test_the_installed_program(tmp_path: Path) -> None:
    """As users start it: no terminal, no stdin, a narrow pipe."""
    environment = {**os.environ, "COLUMNS": "80", "CI": "true"}
    ask = [sys.executable, "-m", "fct"]
    done = subprocess.run(
        [*ask, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, f"fct {fct.__version__}\n")
    done = subprocess.run(
        [*ask, "info"], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout
