"""Which faults the tests would miss: ``python -m tools.mutants [MODULE ...]``, outside CI.

One comparison, sign or small number of a core module is changed at a time, in a copy of the tree; the module's own test
files run until the first failure, and a change that none of them notices is listed. Of C++, the objects that a change
touches are compiled for it and put back behind it; with ``--folder`` the copy and its objects stay for the next run.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# module -> (its files, the test files that answer for it)
MODULES: dict[str, tuple[list[str], list[str]]] = {
    "rows": (["src/fct/rows.py"], ["tests/test_codes.py", "tests/test_row_kinds.py", "tests/test_bad_input.py"]),
    "metrics": (["src/fct/metrics.py"], ["tests/search/test_metrics.py"]),
    "search": (["src/fct/search.py"], ["tests/search/test_search.py", "tests/search/test_shadow_files.py"]),
    "transform": (["src/fct/transform.py"], ["tests/test_bad_input.py", "tests/ops/test_gpu_path.py"]),
    "job": (
        ["src/fct/backfilling/job.py"],
        [f"tests/backfilling/test_{what}.py" for what in ("job", "journal", "resuming_0_1", "backfill")],
    ),
    "journal": (
        ["src/fct/backfilling/journal.py"],
        ["tests/backfilling/test_journal.py", "tests/backfilling/test_backfill.py"],
    ),
    "row_mapper": (["src/fct/backfilling/row_mapper.py"], ["tests/backfilling/test_backfill.py"]),
    "quality": (["src/fct/backfilling/quality.py"], ["tests/backfilling/test_quality_gate.py"]),
    "verify": (["src/fct/backfilling/verify.py"], ["tests/backfilling/test_verify.py"]),
    "topk kernel": (
        ["csrc/cpu/topk_ranks.cpp", "csrc/cpu/topk_exact.cpp", "csrc/cpu/topk_scan.cpp", "csrc/cpu/topk_kernels.inl"],
        [
            *(f"tests/kernels/test_topk_{what}.py" for what in ("cpu", "levels", "halves")),
            "tests/search/test_metrics.py",
        ],
    ),
    "transform kernel": (
        [*(f"csrc/cpu/transform{what}.cpp" for what in ("", "_pack", "_portable")), "csrc/cpu/transform_kernel.h"],
        ["tests/kernels/test_transform_cpu.py"],
    ),
}

_COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
_SIGNS = {"+": "-", "-": "+"}
_CPP = re.compile(r" (<=|>=|==|!=|<|>|\+|-) (?=[\w(])")
_CPP_ONE = re.compile(r"(?<=[-+<=] )([012])(?=[;),\]\s])")


@dataclass(frozen=True)
class Mutant:
    """One change of one file: the characters from ``start`` to ``end`` become ``new``."""

    module: str
    file: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def applied(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.old} -> {self.new}"


def python_changes(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, new) of every comparison, sign and number from 0 to 2 in Python source."""
    begins = [0]
    for line in text.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    lines = text.splitlines(keepends=True)

    def at(line: int, column: int) -> int:
        return begins[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def between(left: ast.expr, right: ast.expr, table: dict[str, str]) -> Iterator[tuple[int, int, str]]:
        start = at(left.end_lineno or 0, left.end_col_offset or 0)
        gap = text[start : at(right.lineno, right.col_offset)]
        sign = gap.strip(" ()\n\\")
        if sign in table:
            first = start + gap.index(sign)
            yield first, first + len(sign), table[sign]

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare):
            for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
                yield from between(left, right, _COMPARISONS)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
            yield from between(node.left, node.right, _SIGNS)
        elif isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value <= 2:
            yield (
                at(node.lineno, node.col_offset),
                at(node.end_lineno or 0, node.end_col_offset or 0),
                str(node.value + 1),
            )


def cpp_changes(text: str) -> Iterator[tuple[int, int, str]]:
    """The same of C++ source, by its formatted operators; comments, templates and directives are left alone."""
    begin = 0
    for line in text.splitlines(keepends=True):
        code = line.partition("//")[0]
        if not code.lstrip().startswith(("#", "template", "*")) and "static_assert" not in code:
            for found in _CPP.finditer(code):
                new = (_COMPARISONS | _SIGNS)[found[1]]
                yield begin + found.start(1), begin + found.end(1), new
            for found in _CPP_ONE.finditer(code):
                yield begin + found.start(1), begin + found.end(1), str(int(found[1]) + 1)
        begin += len(line)


def mutants_of(module: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its source."""
    found = []
    for file in MODULES[module][0]:
        text = (ROOT / file).read_text()
        changes = python_changes(text) if file.endswith(".py") else cpp_changes(text)
        for start, end, new in sorted(changes):
            found.append(Mutant(module, file, text.count("\n", 0, start) + 1, start, end, text[start:end], new))
    return found


class Copy:
    """A copy of the tracked files where mutants live; the tree itself is never changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        for extension in (ROOT / "src/fct").glob("_C*.so"):
            shutil.copy2(extension, folder / "src/fct")
        if (folder / "build.kept").exists():  # the last run was ended inside a mutant
            shutil.rmtree(folder / "build", ignore_errors=True)
            shutil.rmtree(folder / "build.kept")
        if not (folder / "src/fct/kernels").exists():
            (folder / "src/fct/kernels").symlink_to(folder / "kernels")

    def environment(self) -> dict[str, str]:
        paths = f"{self.folder / 'src'}{os.pathsep}{self.folder}"
        return os.environ | {"PYTHONPATH": paths, "PYTHONPYCACHEPREFIX": "", "OMP_NUM_THREADS": "1"}

    def build(self) -> bool:
        """Builds what the extension lacks; False where the compiler refuses the mutant."""
        build = self.folder / "build"
        if not (build / "build.ninja").is_file():
            import pybind11

            pyproject = (self.folder / "pyproject.toml").read_text()
            define = {
                "CMAKE_BUILD_TYPE": "Release",
                "CMAKE_INTERPROCEDURAL_OPTIMIZATION": "OFF",  # a link would compile all of it anew
                "SKBUILD_PROJECT_VERSION": re.findall(r'^version = "(.+)"', pyproject, re.MULTILINE)[0],
                "pybind11_DIR": pybind11.get_cmake_dir(),
                "Python_EXECUTABLE": sys.executable,
                "FCT_CUDA": "off",
            }
            command = ["cmake", "-S", ".", "-B", str(build), "-G", "Ninja", *(f"-D{k}={v}" for k, v in define.items())]
            subprocess.run(command, cwd=self.folder, check=True, capture_output=True)
        if subprocess.run(["ninja", "-C", str(build), "-j", "1"], capture_output=True).returncode:
            return False
        self.install()
        return True

    def survives(self, mutant: Mutant, seconds: float) -> str:
        """ "killed", "survived" or "does not build"; a run that never ends is killed."""
        path = self.folder / mutant.file
        text, times = path.read_text(), path.stat()
        native = not mutant.file.endswith(".py")
        with contextlib.ExitStack() as stack:
            if native:
                stack.enter_context(self.objects_kept())
            path.write_text(mutant.applied(text))
            try:
                if native and not self.build():
                    return "does not build"
                return "survived" if self.passes(mutant.module, seconds) else "killed"
            finally:
                path.write_text(text)
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    @contextlib.contextmanager
    def objects_kept(self) -> Iterator[None]:
        """The built objects with their times, as they were: ninja then sees nothing to build for the next mutant."""
        build, kept = self.folder / "build", self.folder / "build.kept"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(build, kept, symlinks=True)
        try:
            yield
        finally:
            shutil.rmtree(build)
            kept.rename(build)
            self.install()

    def install(self) -> None:
        for extension in (self.folder / "build").glob("_C*.so"):
            shutil.copy2(extension, self.folder / "src/fct" / extension.name)

    def passes(self, module: str, seconds: float) -> bool:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--ff", *MODULES[module][1]]
        quiet: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
        }
        run = subprocess.Popen(command, cwd=self.folder, env=self.environment(), start_new_session=True, **quiet)
        try:
            return run.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)  # with what its tests have started
            run.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", choices=[*MODULES, []], help="by default every one")
    parser.add_argument("--each", type=int, default=20, help="at most so many mutants a module, drawn at random")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the copy lives, and stays; by default a temporary one")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the mutant is taken back, and its tests are ended
    print(f"seed {given.seed}, {given.each} mutants a module", flush=True)
    end = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        copy = Copy(given.folder.resolve() if given.folder else Path(scratch))
        for module in given.modules or MODULES:
            if time.monotonic() > end:
                break
            run_module(copy, module, random.Random(given.seed), given.each, end)


def drawn(everyone: list[Mutant], each: int, chance: random.Random) -> list[Mutant]:
    """So many of them at random, as even over a module's files as these allow, in the order of the source."""
    of_file: dict[str, list[Mutant]] = {}
    for mutant in chance.sample(everyone, len(everyone)):
        of_file.setdefault(mutant.file, []).append(mutant)
    turns = sorted((turn, file) for file, found in of_file.items() for turn in range(len(found)))
    return sorted((of_file[file][turn] for turn, file in turns[:each]), key=lambda m: (m.file, m.start))


def run_module(copy: Copy, module: str, chance: random.Random, each: int, end: float) -> None:
    """Prints each mutant and the module's sum."""
    everyone = mutants_of(module)
    chosen = drawn(everyone, each, chance)
    if any(not m.file.endswith(".py") for m in chosen) and not copy.build():
        raise SystemExit(f"{module}: the extension does not build without a mutant")
    begun = time.monotonic()
    if not copy.passes(module, 1800):
        print(f"{module}: its tests fail without a mutant: {', '.join(MODULES[module][1])}", flush=True)
        return
    limit = 60 + 5 * (time.monotonic() - begun)
    counts: dict[str, int] = {}
    for mutant in chosen:
        if time.monotonic() > end:
            break
        verdict = copy.survives(mutant, limit)
        counts[verdict] = counts.get(verdict, 0) + 1
        print(f"{verdict:14} {mutant}", flush=True)
    minutes = (time.monotonic() - begun) / 60
    print(f"{module}: {counts} of {len(everyone)} possible, in {minutes:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
