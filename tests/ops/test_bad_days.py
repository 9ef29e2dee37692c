"""What a user reads on a GPU's bad days, word for word. Only torch's answers are made up, or a stand-in's memory."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeDevice, plain

import fct
from fct import doctor, ref
from fct.errors import BackendError, DeviceLostError
from fct.info import build_info
from fct.ops import proof as selfproof
from fct.ops.device import state as devices
from fct.ops.device.state import Device, numbered, why_no_cuda, why_no_gpu

OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)


def raises(error: Exception) -> Any:
    def call(*_: Any) -> Any:
        raise error

    return call


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A CUDA build of torch on a machine with two GPUs, which answers but computes nothing."""
    answers = {"_is_in_bad_fork": lambda: False, "init": lambda: None, "device_count": lambda: 2,
               "get_device_capability": lambda index: (8, 0), "current_device": lambda: 0}  # fmt: skip
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(devices, "_lost", set())
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return monkeypatch


@pytest.mark.parametrize(
    ("answers", "device", "says"),
    [
        ({"init": raises(RuntimeError(OLD_DRIVER))}, "cuda:0", f"CUDA does not start: {OLD_DRIVER}"),
        ({"init": raises(AssertionError("Torch not compiled with CUDA enabled"))}, "cuda:0",
         "CUDA does not start: Torch not compiled with CUDA enabled"),
        ({"_is_in_bad_fork": lambda: True, "init": raises(RuntimeError("Cannot re-initialize CUDA"))}, "cuda:0",
         "this process was forked after CUDA was initialised; start workers with the spawn method"),
        ({}, "cuda:2", "expected one of 2 CUDA devices, got cuda:2"),
        ({"device_count": lambda: 0}, "cuda:0", "expected one of 0 CUDA devices, got cuda:0"),
    ],
    ids=["driver", "no CUDA in torch", "fork", "number", "none"],
)  # fmt: skip
def test_no_such_device(machine: Any, answers: dict[str, Any], device: str, says: str, tmp_path: Path) -> None:
    """The reason alone, from every backend and search that wants a GPU; in the error; in info and doctor."""
    for name, answer in answers.items():
        machine.setattr(torch.cuda, name, answer)
    machine.setenv("FCT_CACHE", str(tmp_path))
    assert why_no_cuda(device) == why_no_gpu(device) == [says]
    h, x = fct.Transformation.random(5, 5, 6, inner=8), np.ones((3, 5), np.float32)
    for backend in ("triton", "torch"):
        with pytest.raises(BackendError) as error:
            fct.transform_batch(x, x, h, device=device, precision="bf16", backend=backend)
        assert str(error.value) == f"no backend can run this transformation on {device}: {backend} (bf16): {says}"
    assert fct.transform_batch(x, x, h).shape == (3, 6)  # the CPU path goes on
    if device == "cuda:0":
        facts = build_info()
        assert facts["backends"]["triton"] == {"device": "cuda", "runs": False, "why_not": [says.replace(":0", "")]}
        assert facts["searches"]["triton"]["why_not"] == facts["searches"]["torch"]["why_not"] == [says]
        assert doctor.devices()["cuda"] == says


def test_too_old_a_gpu(machine: Any) -> None:
    machine.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6) if index == 0 else (7, 5))
    assert why_no_gpu("cuda:1") == ["needs compute capability 8.0 or later, cuda:1 has 7.5"]
    assert why_no_gpu("cuda:0") == why_no_cuda("cuda:1") == []


# ---- several GPUs ----
def test_cuda_is_the_device_that_is_current_now(machine: Any, tmp_path: Path) -> None:
    """Weights and buffers are kept by name, so the name must not mean another device tomorrow."""
    first, second = FakeDevice(index=0), FakeDevice("sm_80", index=1)
    first.install(machine, tmp_path, second)
    h, x = fct.Transformation.random(5, 5, 6, inner=8), np.ones((3, 5), np.float32)
    for index, place in ((0, first), (1, second), (0, first)):
        machine.setattr(torch.cuda, "current_device", lambda index=index: index)
        assert numbered("cuda") == f"cuda:{index}"
        before = {place.name: len(place.launches) for place in (first, second)}
        got = fct.transform_batch(x, x, h, device="cuda", backend="triton", precision="fp32")
        np.testing.assert_allclose(got, ref.transform(x, x, h), rtol=1e-4, atol=1e-4)
        other = first if place is second else second
        assert len(place.launches) > before[place.name]
        assert len(other.launches) == before[other.name]
    machine.setattr(torch.cuda, "current_device", raises(AssertionError("Torch not compiled with CUDA enabled")))
    assert numbered("cuda") == "cuda:0"
    assert numbered("cuda:1") == "cuda:1"


def test_rows_on_the_second_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rng: Any) -> None:
    """The transformation runs there on the caller's stream there, proved for that model; the first is not touched."""
    first, second = FakeDevice(index=0, seed=1), FakeDevice("sm_80", index=1, seed=2)
    first.install(monkeypatch, tmp_path, second)
    monkeypatch.setattr(selfproof, "ROWS", (3,))
    monkeypatch.setattr(selfproof, "SEARCHES", ((1, 1, 1, 1),))
    h, x = fct.Transformation.random(9, 5, 6, inner=8), rng.standard_normal((40, 14), dtype=np.float32)
    want = ref.transform(x[:, :9], x[:, 9:], h)
    with first.torch(second):
        fct.transform_batch(second.upload(x[:, :9]), second.upload(x[:, 9:]), h, backend="triton", precision="fp32")
        late, side, mine = second.empty((40, 9), "float32"), second.upload(x[:, 9:]), second.new_stream()
        seen: list[Any] = []
        launch = second.launch
        monkeypatch.setattr(second, "launch", lambda *a, **k: (seen.append(second.current), launch(*a, **k)))
        with second.on(mine):
            second.copy(late, second.upload(x[:, :9]))  # not there yet when h is called
            got = fct.transform_batch(late, side, h, backend="triton", precision="fp32")
            done = second.record()
        second.finish(done)
        assert str(got.device) == "cuda:1"
        np.testing.assert_allclose(plain(got).numpy(), want, rtol=1e-4, atol=1e-4)
        assert seen
        assert set(map(id, seen)) == {id(mine)}
        assert first.launches == []
        (verdict,) = selfproof.read_verdicts()
        assert "fake sm_80" in verdict
        fct.transform_batch(first.upload(x[:, :9]), first.upload(x[:, 9:]), h, backend="triton", precision="fp32")
        assert sorted("fake sm_90" in key for key in selfproof.read_verdicts()) == [False, True]
        with pytest.raises(ValueError, match=r"^side_info: expected an array on cuda:1 like old, got one on cuda:0$"):
            fct.transform_batch(late, first.upload(x[:, 9:]), h)
        # a prepared gallery lies where its rows lay
        with pytest.raises(
            ValueError, match=r"^queries: expected an array on cuda:1 like the gallery, got one on cuda:0"
        ):
            fct.topk(first.upload(x), fct.prepare_gallery(second.upload(x)), 3)


def test_launches_and_events_go_to_the_devices_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real :class:`Device` of cuda:1 while cuda:0 is current."""
    current, asked = [0], []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        yield
        current[0] = before

    class Event:
        def record(self, stream: Any) -> None:
            asked.append(("record", stream))

        def synchronize(self) -> None:
            asked.append(("finish", None))

    class Stream:
        def __init__(self, index: int) -> None:
            self.index = index

        def wait_event(self, event: Any) -> None:
            asked.append(("wait", self.index))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: Stream(index))
    place = object.__new__(Device)
    place.name, place.index, place.model = "cuda:1", 1, "second"

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda **arguments: asked.append((grid, current[0], arguments))  # type: ignore[arg-type]  # a launch, of three parts

    place.launch(Kernel(), (3, 0), {}, warps=4, stages=2)  # an empty grid is no launch
    place.launch(Kernel(), (3, 2), {"n": 5}, warps=4, stages=2)
    assert asked == [((3, 2), 1, {"n": 5, "num_warps": 4, "num_stages": 2})]
    assert current == [0]
    asked.clear()
    event = place.record()
    place.wait(event)
    place.finish(event)
    assert [(what, getattr(stream, "index", stream)) for what, stream in asked] == [
        ("record", 1), ("wait", 1), ("finish", None),
    ]  # fmt: skip


# ---- out of memory, and devices that are gone ----
@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeDevice]:
    device = FakeDevice(seed=7)
    device.install(monkeypatch, tmp_path)
    monkeypatch.setattr(selfproof, "SEARCHES", ((1, 1, 1, 1),))
    with device.torch():
        yield device


def test_out_of_memory_says_for_what(fake: FakeDevice, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fct.ops.search import gpu_search as topk_gpu

    q, g = (fake.upload(rng.standard_normal((n, 9), dtype=np.float32)) for n in (17, 500))
    for kind in ("bf16", "int8"):
        fct.topk(q, g, 3, precision=kind)  # proved
    at = "cuda:0 (fake sm_90): out of memory"
    small = FakeDevice.empty

    def full(self: FakeDevice, shape: Any, dtype: str) -> Any:
        self.memory = 100
        return small(self, shape, dtype)

    def said(call: Any) -> str:
        with pytest.raises(BackendError) as error:
            call()
        return str(error.value)

    monkeypatch.setattr(FakeDevice, "empty", full)
    assert said(lambda: fct.prepare_gallery(g)) == (
        f"{at} for the bf16 shadow of 500 rows of 9; search the rows themselves, or fewer"
    )
    assert said(lambda: fct.topk(q, g, 3, precision="int8")) == (
        f"{at} for a search of one query at a time among 500 rows of 9 over a int8 shadow"
    )
    monkeypatch.setattr(topk_gpu, "topk_blocked", lambda *_: fake.empty((1 << 40,), "int8"))
    assert said(lambda: fct.topk(q, g, 3)) == f"{at} for blocked products of 17 queries and 500 rows of 9"


def test_no_memory_for_the_proof(fake: FakeDevice, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under "auto" torch takes over, this time; what was demanded raises; nothing is remembered against the kernel."""
    q, g = rng.standard_normal((17, 9), dtype=np.float32), rng.standard_normal((90, 9), dtype=np.float32)
    ours, theirs = fake.upload(q), fake.upload(g)
    with monkeypatch.context() as full:
        full.setattr(selfproof, "_run_search", lambda *_: fake.empty((1 << 40,), "int8"))
        np.testing.assert_array_equal(plain(fct.topk(ours, theirs, 3).indices).numpy(), ref.topk(q, g, 3)[1])
        with pytest.raises(BackendError) as error:
            fct.topk(ours, theirs, 3, precision="bf16")
        assert "triton: cuda:0 (fake sm_90) is out of memory for its self-proof" in str(error.value)
        assert fake.launches == []
        full.setattr(selfproof, "_run_search", lambda *_: fake.die())
        with pytest.raises(DeviceLostError, match="failed during the self-proof of the triton search: CUDA error"):
            fct.topk(ours, theirs, 3)
    assert selfproof.read_verdicts() == {}


@pytest.mark.parametrize(
    ("error", "lost", "memory"),
    [
        ("CUDA error: an illegal memory access was encountered", True, False),
        ("CUDA error: the launch timed out and was terminated", True, False),
        ("CUDA error: uncorrectable ECC error encountered", True, False),
        ("kernel (scan<kKind, ScanWide>), grid (1, 2, 1), block 128, 65536 bytes of shared memory, device 1: "
         "cudaErrorECCUncorrectable: uncorrectable ECC error encountered", True, False),
        ("kernel finish, device 0: cudaErrorLaunchFailure: unspecified launch failure", True, False),
        ("making device 1 current, device 0: cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or "
         "unavailable", True, False),
        ("kernel scan, device 0: cudaErrorInvalidConfiguration: invalid configuration argument", False, False),
        ("kernel scan, device 0: cudaErrorInvalidValue: invalid argument", False, False),
        ("CUDA error: out of memory", True, True),
        ("search: scratch, device 0: cudaErrorMemoryAllocation: out of memory", False, True),
    ],
)  # fmt: skip
def test_which_errors_lose_the_device(monkeypatch: pytest.MonkeyPatch, error: str, lost: bool, memory: bool) -> None:
    """torch's words and our kernels'. A launch that was wrong is our bug, but the device can still be used."""
    monkeypatch.setattr(devices, "_lost", set())
    place = object.__new__(Device)
    place.name, place.model = "cuda:1", "NVIDIA L4"
    raised = RuntimeError(error)
    assert place.is_lost(raised) == lost
    assert place.is_out_of_memory(raised) == memory
    gone = lost and not memory
    with pytest.raises(DeviceLostError if gone else RuntimeError) as caught, place.errors("the search of 3 queries"):
        raise raised
    assert str(caught.value) == (
        f"cuda:1 (NVIDIA L4) failed during the search of 3 queries: {error}" if gone else error
    )
    assert devices._lost == ({"cuda:1"} if gone else set())
    if gone:
        assert why_no_cuda("cuda:1") == ["cuda:1 failed earlier in this process; start a new one"]
        assert not any("failed earlier" in why for why in why_no_cuda("cuda:0"))


def test_a_removed_device_is_no_answer(fake: FakeDevice, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes between the preparation of a gallery and its search."""
    q, g = (fake.upload(rng.standard_normal((n, 9), dtype=np.float32)) for n in (17, 90))
    prepared = fct.prepare_gallery(g)
    monkeypatch.setattr(fake, "launch", lambda *_, **__: raises(RuntimeError("CUDA error: unknown error"))())
    with pytest.raises(DeviceLostError) as error:
        fct.topk(q, prepared, 3)
    assert str(error.value) == (
        "cuda:0 (fake sm_90) failed during the search of 17 queries among 90 rows: CUDA error: unknown error"
    )
    for call in (lambda: fct.topk(q, prepared, 3), lambda: fct.prepare_gallery(g)):
        with pytest.raises(DeviceLostError, match=re.escape("cuda:0 failed earlier in this process; start a new one")):
            call()
