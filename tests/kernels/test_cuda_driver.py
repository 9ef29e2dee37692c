"""The compiled extension on machines with a driver and no usable device, and in a forked process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cuda_support as support
import pytest

from fct import _C

pytestmark = [
    # Stays: this asks the compiled csrc/cuda/device.cu, which an extension built without nvcc does not have.
    pytest.mark.skipif(bool(_C.cuda_why_not), reason=f"no CUDA kernels in this build: {_C.cuda_why_not}"),
    support.needs_cxx,
]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1."""
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("stand_in_libcuda.c")
    command = [str(support.CXX), "-x", "c", "-std=c99", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", str(source)]
    support.run([*command, "-o", str(folder / "libcuda.so.1")])
    return folder


def said(command: list[str], folder: Path, **facts: int) -> str:
    env = os.environ | {"LD_LIBRARY_PATH": str(folder), "COLUMNS": "300"} | {k: str(v) for k, v in facts.items()}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ASK = ["-c", "from fct import _C; print(_C.cuda_why_not_here())"]
NO_DEVICE = "no CUDA device: "
# What cuInit may return, and the runtime's words for it. 35 is the runtime's own, for a driver without its functions.
RESULTS = {
    3: NO_DEVICE + "initialization error",
    34: NO_DEVICE + "CUDA driver is a stub library",
    35: NO_DEVICE + "CUDA driver version is insufficient for CUDA runtime version",
    100: NO_DEVICE + "no CUDA-capable device is detected",
    802: NO_DEVICE + "system not yet initialized",
    803: NO_DEVICE + "system has unsupported display driver / cuda driver combination",
}


@pytest.mark.parametrize("result", RESULTS)
def test_no_usable_device_in_cudas_words(stand_in: Path, result: int) -> None:
    assert said(ASK, stand_in, STAND_IN_INIT=result) == RESULTS[result]


def test_a_driver_that_is_too_old(stand_in: Path) -> None:
    words = said(ASK, stand_in, STAND_IN_VERSION=10020)
    assert words.startswith("the CUDA driver is too old: it supports CUDA 10.2, this build needs 1")


def test_no_driver(tmp_path: Path) -> None:
    """The loader finds a libcuda.so.1 that is none, before any that this machine has."""
    (tmp_path / "libcuda.so.1").write_bytes(b"")
    assert said(ASK, tmp_path) == "no CUDA driver on this machine (libcuda.so.1)"


def test_fct_info_says_it(stand_in: Path) -> None:
    words = said(["-m", "fct", "info"], stand_in, STAND_IN_INIT=803)
    assert RESULTS[803] in " ".join(words.split())


FORK = """
import os
from fct import _C
def ask():
    try:
        _C.cuda_device(0)
    except RuntimeError as error:
        return str(error)
first = ask()
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, ask().encode())
    os._exit(0)
os.wait()
print(first, os.read(read, 9999).decode().replace(str(os.getpid()), "PID"), ask() == first, sep="\\n")
"""


def test_a_forked_process_is_refused(stand_in: Path) -> None:
    first, forked, as_before = said(["-c", FORK], stand_in).splitlines()
    assert first.startswith("reading the properties of device 0, device ")
    assert "cudaErrorNoDevice: no CUDA-capable device is detected" in first
    assert forked == (
        "CUDA was first used in process PID, before this one was forked from it; "
        "start workers with 'spawn' or 'forkserver'"
    )
    assert as_before == "True"
