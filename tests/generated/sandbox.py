"""Runs cases in processes that may die: each with a memory limit and a time-out, a few milliseconds a case.

``python -m tests.generated.sandbox MODULE SEED SECONDS [NAME...]`` imports MODULE once and forks from there: a maker,
which writes a parser's valid files, then workers, each of which runs cases until one of them kills it. The server
itself runs no case, starts no thread and holds no state of one. It prints a line of JSON for each fault, and one for
each parser.

MODULE holds ``JOBS``: by name, objects with ``make(folder)`` and ``case(folder, number, seed) -> str``, which returns
what became of the case and raises where that is wrong; ``modules`` names what it needs imported, ``memory`` how many
bytes of address space it may take.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Summary", "run"]

_PATIENCE = 20.0  # seconds of a case
_CASES = 400  # of one worker


@dataclass
class Summary:
    """cases: by what became of them. faults: each in a sentence, with its number. seconds: of the cases alone."""

    cases: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run(module: str, names: Sequence[str], seed: int, seconds: float, first: int = 0) -> dict[str, Summary]:
    """Runs each named job for its share of ``seconds``, in a server of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FCT_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "0"}
    command = [sys.executable, "-m", "tests.generated.sandbox", module, str(seed), str(seconds), str(first), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"the server of the sandbox ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Summary] = {}
    for line in done.stdout.splitlines():
        said = json.loads(line)
        summary = found.setdefault(said["job"], Summary())
        if "fault" in said:
            summary.faults.append(said["fault"])
        else:
            summary.cases, summary.seconds = Counter(said["cases"]), said["seconds"]
    return found


def _serve(module: str, seed: int, seconds: float, first: int, names: Sequence[str]) -> None:
    jobs = importlib.import_module(module).JOBS
    share = seconds / max(1, len(names))
    for name in names:
        folder = Path(tempfile.mkdtemp(prefix=f"fct-{name}-"))
        try:
            _serve_one(name, jobs[name], folder, seed, share, first)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _serve_one(name: str, job: Any, folder: Path, seed: int, seconds: float, first: int) -> None:
    def say(**what: Any) -> None:
        print(json.dumps({"job": name, **what}), flush=True)

    for module in job.modules:
        importlib.import_module(module)  # once, before the limit of memory is set beside what is there
    made = _fork(lambda out: job.make(folder))
    _, why = _follow(made, time.monotonic() + 120, lambda line: None)
    if why:
        say(fault=f"making the files: {why}")
        return
    cases: Counter[str] = Counter()
    begun, number, last = time.monotonic(), first, -1
    while time.monotonic() - begun < seconds:
        end = min(begun + seconds, time.monotonic() + 3600)

        def heard(line: str) -> None:
            nonlocal last
            what, _, rest = line.partition(" ")
            if what == "begin":
                last = int(rest)
            elif what == "fault":
                cases["fault"] += 1
                say(fault=f"case {last} of seed {seed}: {json.loads(rest)}")
            else:
                cases[rest] += 1

        def work(out: int, number: int = number, end: float = end) -> None:
            _work(job, folder, number, seed, end, out)

        _, why = _follow(_fork(work, memory=job.memory), None, heard)
        if why:
            cases["fault"] += 1
            say(fault=f"case {last} of seed {seed}: {why}")
        number = last + 1
    say(cases=dict(cases), seconds=time.monotonic() - begun)


def _work(job: Any, folder: Path, number: int, seed: int, end: float, out: int) -> None:
    for case in range(number, number + _CASES):
        if time.monotonic() > end:
            return
        os.write(out, f"begin {case}\n".encode())
        try:
            became = job.case(folder, case, seed)
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-3:]
            at = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in where)
            os.write(out, f"fault {json.dumps(f'{type(error).__name__}: {error}'[:600] + f' ({at})')}\n".encode())
        else:
            os.write(out, f"done {became}\n".encode())


def _fork(do: Any, *, memory: int = 0) -> tuple[int, int]:
    """(process, the end of the pipe that it writes to)."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    os.close(reading)
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the server's own lines are what is heard
            size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
        do(writing)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _follow(forked: tuple[int, int], deadline: float | None, heard: Any) -> tuple[int, str]:
    """Hears a process out: (its exit status, why it ended otherwise than it should)."""
    process, reading = forked
    held, why = b"", ""
    with contextlib.closing(os.fdopen(reading, "rb", buffering=0)) as pipe:
        while True:
            wait = _PATIENCE if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([pipe], [], [], wait)[0]:
                why = f"no answer for {wait:.0f} seconds"
                os.kill(process, signal.SIGKILL)
                break
            part = os.read(pipe.fileno(), 1 << 16)
            if not part:
                break
            *lines, held = (held + part).split(b"\n")
            for line in lines:
                heard(line.decode())
    _, status = os.waitpid(process, 0)
    if status and not why:
        code = os.waitstatus_to_exitcode(status)
        why = f"the process ended with {signal.Signals(-code).name if code < 0 else code}"
    return status, why


if __name__ == "__main__":
    sys.setrecursionlimit(1000)
    _serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
