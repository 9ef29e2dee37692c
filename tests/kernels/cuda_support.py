"""Builds the CUDA kernels for the CPU: the emulator (plain, under sanitizers, with injected bugs) and the PTX.

Builds lie in a scratch folder named after everything that went into them, so that a second run finds them.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fct.ops.device.cuda_runtime import CudaRuntime
from fct.rows import Rows

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
SIMT, CUDA = TESTS / "emulators" / "simt", ROOT / "csrc" / "cuda"
WITHOUT_GIL = ROOT / "csrc" / "without_gil.h"
sys.path.insert(0, str(TESTS / "emulators" / "ptxsim"))

CXX = shutil.which(os.environ.get("CXX", "g++"))
NVCC = shutil.which("nvcc")
needs_cxx = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(NVCC is None or CXX is None, reason="no nvcc")

FLAVOURS = {
    "plain": ["-O1"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-fsanitize=thread"],
}
_WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes"]
_FLAGS = ["-std=c++17", "-g1", "-DFCT_SIMT"]

# file name -> [(text, replacement), ...]: what an injected bug changes
Edits = Mapping[str, list[tuple[str, str]]]


def run(command: list[str], **kwargs: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for folder in (SIMT, CUDA):
        for file in sorted(folder.iterdir()):
            if file.is_file():
                digest.update(file.name.encode() + file.read_bytes())
    digest.update(WITHOUT_GIL.read_bytes())
    digest.update(repr((CXX, NVCC, sys.executable, Path(__file__).read_bytes(), parts)).encode())
    return digest.hexdigest()[:16]


def _built(name: str, key: tuple[Any, ...], make: Any) -> Path:
    """The file that ``make(path)`` writes, kept between runs; complete or not there."""
    folder = Path(tempfile.gettempdir()) / f"fct-kernel-tests-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    stem, _, suffix = name.partition(".")
    target = folder / f"{stem}-{_digest(name, *key)}{'.' if suffix else ''}{suffix}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            make(Path(scratch) / name, Path(scratch))
            os.replace(Path(scratch) / name, target)
    return target


def sources_with(edits: Edits, folder: Path) -> Path:
    """A copy of csrc/cuda with an injected bug; the original where there is none."""
    if not edits:
        return CUDA
    copy = folder / "cuda"
    shutil.copytree(CUDA, copy)
    shutil.copy2(CUDA.parent / "codes.h", folder)
    for name, changes in edits.items():
        text = (copy / name).read_text()
        for old, new in changes:
            assert text.count(old) == 1, f"{name}: expected {old!r} once, found it {text.count(old)} times"
            text = text.replace(old, new)
        (copy / name).write_text(text)
    return copy


@cache
def runtime_object() -> Path:
    """The emulator itself, never under sanitizers: it finds them by weak symbols."""

    def make(path: Path, _: Path) -> None:
        run([str(CXX), "-std=c++17", "-O2", "-fPIC", f"-I{SIMT}", "-c", str(SIMT / "simt_rt.cpp"), "-o", str(path)])

    return _built("runtime.o", (), make)


def driver(half: str, flavour: str = "plain", edits: Edits | None = None) -> Path:
    """tests/emulators/simt/driver.cpp for "TOPK" or "TRANSFORM"."""

    def make(path: Path, folder: Path) -> None:
        sources = sources_with(edits or {}, folder)
        command = [str(CXX), *_FLAGS, *([] if edits else _WARNINGS), *FLAVOURS[flavour], f"-DFCT_{half}", f"-I{SIMT}"]
        command += [f"-I{sources}", str(SIMT / "driver.cpp"), str(runtime_object()), "-o", str(path)]
        run(command if edits is None else [*command, "-w"])

    return _built(f"driver_{half.lower()}_{flavour}", (sorted((edits or {}).items()),), make)


def drive(
    program: Path, case: str, schedule: int, seed: int = 5, resident: int = 2
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TSAN_OPTIONS": "history_size=7 halt_on_error=1 exitcode=66", "ASAN_OPTIONS": "detect_leaks=0"}
    command = [str(program), case, str(schedule), str(seed), str(resident)]
    if "tsan" in program.name and shutil.which("setarch"):
        command = ["setarch", "-R", *command]  # TSan's shadow wants the usual address layout
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


@cache
def module() -> Any:
    """fct_simt: the CUDA section of fct._C over the emulator."""
    return load_module({})


def load_module(edits: Edits) -> Any:
    """The same with an injected bug; one build a process, since pybind11 hands out the first again."""
    pybind = importlib.import_module("pybind11").get_include()

    def make(path: Path, folder: Path) -> None:
        cuda = sources_with(edits, folder)
        include = [f"-I{pybind}", f"-I{sysconfig.get_path('include')}", f"-I{SIMT}", f"-I{cuda}"]

        def compile_one(source: Path) -> str:
            out = folder / (source.stem + ".o")
            run(
                [
                    str(CXX),
                    *_FLAGS,
                    "-O2",
                    "-fPIC",
                    *include,
                    *_WARNINGS,
                    "-x",
                    "c++",
                    "-c",
                    str(source),
                    "-o",
                    str(out),
                ]
            )
            return str(out)

        sources = [SIMT / "module.cpp", cuda / "topk.cu", cuda / "transform.cu", cuda / "cublaslt.cpp"]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sources))
        run([str(CXX), "-shared", *objects, str(runtime_object()), "-ldl", "-o", str(path)])

    path = _built("fct_simt.so", (sorted(edits.items()),), make)
    spec = importlib.util.spec_from_file_location("fct_simt", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class EmulatedRuntime(CudaRuntime):
    """CPU tensors as the device's memory, the emulator as the device; one stream, 0.

    facts: what ``properties`` says otherwise than the emulator, to be planned for as another device.
    """

    def __init__(self, edits: Edits | None = None, **facts: int) -> None:
        self.lib = load_module(edits) if edits else module()
        self.facts = facts

    def properties(self, index: int) -> dict[str, Any]:
        return super().properties(index) | self.facts

    def why_not(self) -> list[str]:
        return []

    def check_device(self, device: str) -> list[str]:
        return []

    def device_and_stream(self, device: str) -> tuple[int, int]:
        return 0, 0


def rows(x: Any, dtype: str = "float32", scale: Any = None) -> Rows:
    """Host values as a block of rows on the emulated device, rounded to the dtype."""
    import torch

    if dtype == "int8":
        values = torch.from_numpy(np.clip(np.rint(x / scale), -127, 127).astype(np.int8))
        return Rows(values, dtype, torch.from_numpy(np.asarray(scale, np.float32)), "cpu", "torch")
    return Rows(torch.from_numpy(x).to(getattr(torch, dtype)), dtype, None, "cpu", "torch")


def ptx(source: str, architecture: str, edits: Edits | None = None) -> str:
    """What nvcc makes of csrc/cuda/<source>.cu for compute_<architecture>."""

    def make(path: Path, folder: Path) -> None:
        sources = sources_with(edits or {}, folder)
        options = ["-std=c++17", "-O3", f"-I{sources}", f"-arch=compute_{architecture}", "-ptx"]
        run([str(NVCC), *options, str(sources / f"{source}.cu"), "-o", str(path)])

    return _built(f"{source}_{architecture}.ptx", (sorted((edits or {}).items()),), make).read_text()


def cubin(source: str, architecture: str) -> Path:
    def make(path: Path, folder: Path) -> None:
        options = ["-std=c++17", "-O3", f"-I{CUDA}", f"-arch=sm_{architecture}", "-cubin"]
        run([str(NVCC), *options, str(CUDA / f"{source}.cu"), "-o", str(path)])

    return _built(f"{source}_{architecture}.cubin", (), make)


def segments() -> list[tuple[int, int]]:
    """Every tensor's memory: what a kernel may touch."""
    import torch

    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    storages = [t.untyped_storage() for t in tensors if t.layout == torch.strided and t.device.type == "cpu"]
    return [(s.data_ptr(), s.nbytes()) for s in storages]


@contextmanager
def interpreted(texts: list[str], seed: int = 0) -> Iterator[dict[str, int]]:
    """Kernels launched inside run as PTX, not as emulated C++; yields how many of each instruction were issued."""
    import ptxsim

    kernels = {name: kernel for text in texts for name, kernel in ptxsim.parse(text).items()}
    issued: dict[str, int] = {}

    def launch(name: str, grid: Any, block: Any, shared: int, cooperative: bool, args: list[bytes]) -> None:
        done = ptxsim.Launch(kernels[name], grid, block, shared, args, segments(), seed=seed, cooperative=cooperative)
        for op, count in done.issued.items():
            issued[op] = issued.get(op, 0) + count

    module().intercept(launch)
    try:
        yield issued
    finally:
        module().intercept(None)


@contextmanager
def no_bank_conflicts(runtime: Any, *, least: int) -> Iterator[None]:
    """What runs inside reads shared memory without conflicts, in more than ``least`` loads and products."""
    runtime.lib.reset_stats()
    yield
    stats = runtime.lib.stats()
    assert stats["ldmatrix"] > least
    assert stats["mma"] > least
    assert stats["bank_extra"] == 0


@contextmanager
def nothing_launched(runtime: Any) -> Iterator[None]:
    """A launch inside fails the test."""

    def refuse(*_: Any) -> None:
        raise AssertionError("launched")

    runtime.lib.intercept(refuse)
    try:
        yield
    finally:
        runtime.lib.intercept(None)
