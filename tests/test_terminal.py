"""No control sequence and no markup of somebody else's names reaches a terminal."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table
from rich.text import Text

import fct
from fct.errors import StoreError
from fct.gallery.location import with_retries
from fct.terminal import PlainConsole, plain_log, printable
from tests.command_line import run_here

SOURCE = Path(fct.__file__).parent
EVIL = "\x1b]0;title\x07\x9b31m\r\x08\u202e\udcff"


@pytest.mark.parametrize(
    "character", ["\x00", "\x07", "\x1b", "\x7f", "\x9b", "\r", "\n", "\u202e", "\u2028", "\udc80"]
)
def test_what_is_no_character_to_read_is_written_out(character: str) -> None:
    shown = printable(f"a{character}b")
    assert shown.isprintable()
    assert shown == f"a{ascii(character)[1:-1]}b"


def test_names_of_all_scripts_are_shown_as_they_are() -> None:
    assert printable("größe/ファイル/файл [red] :smile:") == "größe/ファイル/файл [red] :smile:"


def shown(width: int = 200) -> tuple[PlainConsole, io.StringIO]:
    stream = io.StringIO()
    return PlainConsole(file=stream, force_terminal=True, color_system="standard", width=width), stream


def test_a_console_shows_every_string_as_text_in_tables_too() -> None:
    console, stream = shown()
    name = f"[/x][bold]:smile:{EVIL}"
    console.print(name)
    table = Table(name, title=name)
    table.add_row(name, Text("right", "green"))
    console.print(table)
    console.say("problem:", name, "bold red")
    text = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())  # rich's own colours
    assert not set(text) - {"\n"} & set("\x1b\x07\x9b\r\x08\u202e\udcff")
    assert text.count("[/x][bold]:smile:\\x1b]0;title\\x07\\x9b31m\\r\\x08\\u202e\\udcff") == 5
    assert "\x1b[1;31mproblem:" in stream.getvalue()
    assert "\x1b[32mright" in stream.getvalue()


def test_what_a_store_answers_is_logged_printable(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ConnectionError(EVIL)

    with caplog.at_level(logging.WARNING), pytest.raises(StoreError):
        with_retries(fail, "reading s3://b/x", retries=1, first_wait=0.0)
    assert caplog.messages
    assert all(m.isprintable() for m in caplog.messages)


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_an_error_and_its_traceback_hold_no_control_sequence(
    tmp_path: Path, debug: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "x\x1b[31m\x9b.npy").write_bytes(b"junk")
    fct.Transformation.random(8, 8, 4, inner=16, side_info=False).save(tmp_path / "h.safetensors")
    words = ["transform", "g", "out.npy", "-t", "h.safetensors", "--old-model", "m", *debug]
    if debug:  # what the interpreter prints as it ends
        done = subprocess.run([sys.executable, "-m", "fct", *words], cwd=tmp_path, capture_output=True, text=True)
        code, said = done.returncode, done.stderr
    else:
        monkeypatch.chdir(tmp_path)
        code, _, said = run_here(*words)
    assert code == 1
    assert "x\\x1b[31m\\x9b.npy" in said
    assert "\x1b" not in said
    assert "\x9b" not in said
    assert ("Traceback" in said) == bool(debug)


def test_a_path_that_looks_like_markup_is_shown_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "o.npy", np.ones((10, 8), np.float32))
    fct.Transformation.random(8, 8, 4, inner=16, side_info=False).save(tmp_path / "h.safetensors")
    for name in ("t[red].npy", "t[_x].npy"):
        code, out, err = run_here("transform", "o.npy", name, "-t", "h.safetensors", "--old-model", "random-old")
        assert code == 0, err
        assert out.strip() == f"10 rows -> {name}"


def test_nothing_is_printed_but_through_the_console() -> None:
    """`print` in a command, a console of rich's own or markup in a string would go around it."""
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0]
        if room in ("terminal.py", "kernels", "bench", "_C"):
            continue
        text = path.read_text()
        assert not re.search(r"\brich\.console\b.*import.*\bConsole\b|\brich\.markup\b|markup=True", text), path
        assert not re.search(r"^\s*print\(", text, re.MULTILINE), path
        assert not re.search(r"TextColumn\((?!.*markup=False)[^)\n]*description", text), path
        if room == "cli":
            assert not re.search(r"\.echo\((?!json\.dumps)", text), f"{path}: echo of something that is not JSON"


def test_logs_name_others_files_in_characters_to_read(caplog: pytest.LogCaptureFixture) -> None:
    """Without a handler Python prints a warning to stderr as it is."""
    log = plain_log("fct.gallery")
    log.warning("source: %s came while %d%% was read", f"a{EVIL}b", 50)
    assert caplog.messages == [f"source: a{printable(EVIL)}b came while 50% was read"]


def test_every_log_of_the_package_is_plain() -> None:
    # The first says numbers alone; the others do not speak: one adds a handler, one a filter to another library's log.
    others = {"transformation_fit.py", "backfill_bar.py", "iceberg_destination.py"}
    found = {f.name for f in SOURCE.rglob("*.py") if "getLogger(" in f.read_text()}
    assert found - others == {"terminal.py"}


def test_a_text_of_lines_is_printed_line_by_line() -> None:
    out = io.StringIO()
    PlainConsole(file=out, width=20).lines("go: a\x1b[31m\n\n| a long line of a table |")
    assert out.getvalue() == "go: a\\x1b[31m\n\n| a long line of a table |\n"
