"""The interpreter ends while daemon threads are in compiled calls: they are stopped, and the process ends in peace."""

from __future__ import annotations

import subprocess
import sys

import cuda_support as support
import pytest

CALLS = {
    "topk": "fct.topk(x, x, 10, precision='fp32', threads=2)",
    "topk by a shadow": "fct.topk(x, x, 10, threads=2)",
    "evaluate": "fct.evaluate(x, x, labels, threads=2)",
    "transform_batch": "fct.transform_batch(x, x, h, precision='fp32', backend='cpu', threads=2)",
    "prepare_gallery": "fct.prepare_gallery(x, threads=2)",
    "many short ones": "fct.topk(x[:9], x[:2000], 5, threads=2)",
}
CODE = """
import atexit, faulthandler, sys, threading, time
faulthandler.enable()
import numpy as np
import fct
x = np.random.default_rng(0).standard_normal((150_000, 128), dtype=np.float32)
labels = np.arange(len(x)) % 100
h = fct.Transformation.random(128, 128, 128)
def calls():
    while True:
        {call}
if {thread}:
    threading.Thread(target=calls, daemon=True).start()
time.sleep({seconds})
print("ending", time.monotonic())
"""


def run(call: str, seconds: float, thread: bool = True, more: str = "") -> tuple[int, str, str]:
    code = more + CODE.format(call=call, seconds=seconds, thread=thread)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("seconds", [0.2, pytest.param(0.6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("call", CALLS)
def test_a_daemon_thread_in_a_call_harms_no_exit(call: str, seconds: float) -> None:
    status, said, errors = run(CALLS[call], seconds)
    assert (status, errors) == (0, "")
    assert said.startswith("ending")


def test_exit_functions_can_still_call() -> None:
    """What was registered before the kernels were loaded runs after they were told to stop."""
    late = """
import atexit
def last():
    print("found", fct.topk(x[:3], x[:2000], 1, threads=2).indices.ravel().tolist())
atexit.register(last)
"""
    for thread in (False, True):
        status, said, errors = run(CALLS["topk"], 0.2, thread, late)
        assert (status, errors) == (0, "")
        assert said.splitlines()[1] == "found [0, 1, 2]"


LATE = """
import atexit, threading, time
import numpy as np
x = np.random.default_rng(0).standard_normal((150_000, 128), dtype=np.float32)
def last():
    time.sleep(1.5)
    print("found", fct.topk(x[:3], x[:2000], 1, threads=2).indices.ravel().tolist())
atexit.register(last)
import fct
def calls():
    time.sleep(0.3)
    while True:
        fct.topk(x, x, 10, precision='fp32', threads=2)
threading.Thread(target=calls, daemon=True).start()
"""


def test_kernels_that_a_daemon_thread_loads_during_the_exit() -> None:
    """Their own exit function comes too late to be called."""
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "found [0, 1, 2]\n", "")


EMULATED = """
import faulthandler, importlib.util, threading, time
faulthandler.enable()
import numpy as np
spec = importlib.util.spec_from_file_location("fct_simt", {module!r})
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
n, d = 8, 40
x = np.ones((n, d), np.float32)
shadow, meta = np.zeros((n, kernels.cuda_shadow_row_bytes(d, 1)), np.uint8), np.zeros((n, 4), np.float32)
rows = (x.ctypes.data, 0, n, d, d, 0, 0, 0)
def calls():
    while True:
        kernels.cuda_make_shadow(rows, 0, 1, False, shadow.ctypes.data, meta.ctypes.data, 0, 0)
threading.Thread(target=calls, daemon=True).start()
time.sleep(0.3)
print("ending", bool(shadow.any()))
"""


@support.needs_cxx
def test_a_daemon_thread_in_a_launch_harms_no_exit() -> None:
    """The CUDA bindings, over the emulator."""
    code = EMULATED.format(module=support.module().__file__)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ending True\n", "")
