"""Bars of long calls: what they are told, and what a terminal sees of them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import textwrap
import time
from typing import Any

import numpy as np
import pytest

import fct
from fct import _C, progress
from fct.ops import registry as dispatch
from fct.ops import weights
from fct.ops.search import cpu_search as topk_cpu
from fct.rows import rows_of


@pytest.fixture
def x(rng: np.random.Generator) -> Any:
    return rng.standard_normal((50_000, 64), dtype=np.float32)


def rises_to_the_end(told: list[float], least: float) -> None:
    assert len(told) >= 3
    assert told == sorted(told)
    assert 0 <= told[0] < 0.7
    assert least <= told[-1] <= 1


@pytest.mark.parametrize("path", ["shadow", "every row", "exhausted", "ranks"])
def test_the_share_done_rises_to_the_end(x: Any, path: str, rng: np.random.Generator) -> None:
    """Of the compiled calls, told every 100 ms; a call may end some time after it last told anything."""
    told: list[float] = []
    g = rows_of(x, "g")
    begun = time.monotonic()
    if path == "ranks":
        labels = np.arange(len(x)) % 100
        topk_cpu.ranks_cpu(g[:4000], g, labels[:4000], labels, "l2", True, threads=1, report=told.append)
    elif path == "every row":
        topk_cpu.topk_cpu(g[:3000], g, None, 10, "l2", False, threads=1, report=told.append)
    elif path == "exhausted":  # each query goes through every row after a scan in vain
        same = rows_of(np.repeat(x[:1], len(x), axis=0), "g")
        shadow = topk_cpu.build_shadow(same, "l2", threads=1)
        topk_cpu.topk_cpu(g[:3000], same, shadow, 10, "l2", False, threads=1, report=told.append)
    else:
        big = rows_of(np.tile(x, (4, 1)) + rng.standard_normal((200_000, 64), dtype=np.float32), "g")
        shadow = topk_cpu.build_shadow(big, "l2", threads=1)
        begun = time.monotonic()
        topk_cpu.topk_cpu(g[:10_000], big, shadow, 10, "l2", False, threads=1, report=told.append)
    took = time.monotonic() - begun
    if path == "exhausted":  # more work was found, once: the share falls, and rises to the end from there
        falls = [i for i in range(1, len(told)) if told[i] < told[i - 1]]
        assert len(falls) == 1
        told = told[falls[0] :]
    rises_to_the_end(told, min(0.75, 1 - 0.5 / took))


def test_slices_and_packing_count(x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    monkeypatch.setattr(topk_cpu, "_PACKED_AT_ONCE", 64 * 64 * 100)
    shadow = topk_cpu.build_shadow(rows_of(x, "g"), "l2", threads=1, report=told.append)
    assert told == pytest.approx([6400 / 50_000 * i for i in range(1, 8)] + [1.0])
    told.clear()
    monkeypatch.setattr(topk_cpu, "_SLICE", 10_000)
    real = _C.topk
    monkeypatch.setattr(_C, "topk", lambda *a: (a[-1](0.0), a[-1](1.0), real(*a))[-1])
    queries = rows_of(x[:20_000, :], "q")
    topk_cpu.topk_cpu(queries, rows_of(x[:64], "g"), None, 1, "l2", False, threads=2, report=told.append)
    assert [told[0], told[1], told[-1]] == [0.0, 0.5, 1.0]
    assert shadow.n == len(x)


@pytest.mark.parametrize("backend", ["cpu", "torch", "ref"])
def test_a_transformation_tells_its_share(x: Any, backend: str) -> None:
    told: list[float] = []
    h = fct.Transformation.random(64, 64, 16, inner=1024 if backend == "cpu" else 32)
    chosen, precision = dispatch.pick_transform(h, "fp32", "cpu", backend)
    old, out = rows_of(x, "old"), rows_of(np.empty((len(x), 16), np.float32), "out", finite=False, write=True)
    chosen.run(weights.packed(chosen, h, precision, "cpu"), old, old, out, threads=1, report=told.append)
    rises_to_the_end(told, 0.75 if backend == "cpu" else 1.0)
    np.testing.assert_allclose(out.values, fct.transform_batch(x, x, h, precision="fp32"), rtol=1e-3, atol=1e-3)


def test_an_exception_in_the_bar_comes_out(x: Any) -> None:
    def broken(share: float) -> None:
        raise RuntimeError("the bar")

    g = rows_of(x, "g")
    with pytest.raises(RuntimeError, match="the bar"):
        topk_cpu.topk_cpu(g, g, None, 10, "l2", False, threads=2, report=broken)
    h = fct.Transformation.random(64, 64, 64, inner=1024)
    chosen, _ = dispatch.pick_transform(h, "fp32", "cpu", "cpu")
    out = rows_of(np.empty_like(x), "out", finite=False, write=True)
    with pytest.raises(RuntimeError, match="the bar"):
        chosen.run(weights.packed(chosen, h, "fp32", "cpu"), g, g, out, threads=1, report=broken)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_of_steps_is_drawn_on_stderr_where_somebody_watches(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    with progress.step_bar(True) as bar:
        assert list(bar.track(range(3), description="steps")) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert (out, "steps" in err, err == "") == ("", terminal, not terminal)
    with progress.step_bar(False) as bar:
        assert list(bar.track(range(3), description="steps")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


CALLS = """
import sys, numpy as np, fct
from fct import progress
progress._AFTER_SECONDS = {after}
x = np.random.default_rng(0).standard_normal((30_000, 64), dtype=np.float32)
labels = np.arange(30_000) % 100
if {call!r} == "topk":
    fct.topk(x[:2500], x, 10, precision="fp32", threads=1{more})
elif {call!r} == "evaluate":
    fct.evaluate(x[:3000], x, labels[:3000], labels, threads=1{more})
elif {call!r} == "transform_batch":
    h = fct.Transformation.random(64, 64, 64, inner=1024)
    fct.transform_batch(x, x, h, precision="fp32", threads=1{more})
else:
    from fct.ops.search import cpu_search as topk_cpu
    topk_cpu._PACKED_AT_ONCE = 1 << 16
    fct.prepare_gallery(x, threads=1{more})
assert "rich" in sys.modules or not {seen!r}
assert {seen!r} or "rich" not in sys.modules  # a short or silent call does not even load it
"""


def said(call: str, *, terminal: bool, after: float = 0.05, more: str = "", seen: bool = False) -> str:
    """What a process that makes the call writes to stderr, a terminal or a pipe."""
    code = textwrap.dedent(CALLS.format(call=call, after=after, more=more, seen=seen))
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    if not terminal:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        os.close(theirs)
        heard = b""
        try:
            while part := os.read(ours, 65536):
                heard += part
        except OSError:  # the other end is closed
            pass
        os.close(ours)
        assert process.stdout is not None
        assert process.stdout.read() == b""
    assert process.returncode == 0, heard.decode()
    return heard.decode()


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("topk", "searching"),
        ("evaluate", "ranking"),
        ("prepare_gallery", "packing the gallery"),
        ("transform_batch", "transforming"),
    ],
)
def test_a_terminal_sees_a_bar(call: str, what: str) -> None:
    text = said(call, terminal=True, seen=True, after=0.0 if call == "prepare_gallery" else 0.05)
    assert what in text
    assert "%" in text
    assert text.rstrip().endswith(("\x1b[2K", "\x1b[?25h")), "the bar is taken away at the end"


def test_nothing_is_shown_unless_long_and_to_a_terminal() -> None:
    assert said("topk", terminal=False) == ""
    assert said("topk", terminal=True, after=100.0) == ""
    for call in ("topk", "transform_batch"):
        assert said(call, terminal=True, more=", progress=False") == ""


class Terminal:
    closed = False

    def __init__(self, broken: bool = False) -> None:
        self.broken, self.text = broken, ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.broken:
            raise OSError(5, "Input/output error")
        self.text += text
        return len(text)

    def flush(self) -> None:
        if self.broken:
            raise OSError(5, "Input/output error")


def test_a_lost_terminal_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", Terminal(broken=True))
    for _ in range(2):
        with progress.LongCall(True) as call:
            report = call.stage("searching")
            assert report is not None
            report(0.1)
            report(0.2)


def test_one_bar_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_AFTER_SECONDS", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def tell(call: progress.LongCall, what: str) -> None:
        report = call.stage(what)
        assert report is not None
        report(0.5)

    with progress.LongCall(True) as outer:
        tell(outer, "outer")
        with progress.LongCall(True) as inner:
            tell(inner, "inner")
    with progress.LongCall(True) as later:
        tell(later, "later")
    assert "outer" in terminal.text
    assert "inner" not in terminal.text
    assert "later" in terminal.text


def test_progress_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="progress: expected True or False, got 'no'"):
        fct.topk(np.ones((2, 2), np.float32), np.ones((2, 2), np.float32), 1, progress="no")  # type: ignore[call-overload]  # refused
    h = fct.Transformation.random(2, 2, 2, inner=4)
    with pytest.raises(ValueError, match="progress: expected True or False, got 'no'"):
        fct.transform_batch(np.ones((2, 2)), np.ones((2, 2)), h, progress="no")  # type: ignore[call-overload]  # refused
