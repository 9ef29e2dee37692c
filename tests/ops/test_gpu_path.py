"""Streaming, self-proof, dispatch and doctor on the stand-in device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_device import FakeDevice

import fct
from fct import doctor, ref
from fct.artifact.transformation import Transformation
from fct.errors import BackendError, DeviceLostError, FctWarning
from fct.ops import proof as selfproof
from fct.ops import registry as dispatch
from fct.ops.device import state as device_module
from fct.ops.device import streaming
from fct.ops.transform import triton_backend as backend
from fct.rows import Rows, rows_of


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDevice:
    """A GPU for every module that asks for one."""
    device = FakeDevice(seed=7)
    device.install(monkeypatch, tmp_path / "cache")
    return device


def stream(h: Transformation, old: Any, side: Any, out: Any, **how: Any) -> None:
    weights = backend.TritonTransform().pack(h, "fp32", "cuda:0")
    streaming.stream_transform(
        lambda o, s, to: backend.run_chunks(weights, o, s, to),
        rows_of(old, "old"), rows_of(side, "side_info"), rows_of(out, "out", finite=False), device="cuda:0", **how,
    )  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_streaming_in_any_order_that_the_events_allow(fake: FakeDevice, rng: Any, seed: int) -> None:
    fake.random.seed(seed)
    h = Transformation.random(5, 4, 6, inner=8)
    n = 5 * 40 + 7
    old = fct.ScaledInt8(rng.integers(-99, 99, (n, 5), dtype=np.int8), rng.random(n, dtype=np.float32) * 0.02 + 0.01)
    side = rng.standard_normal((n, 4)).astype(np.float16)
    out = np.full((n, 6), np.nan, np.float32)
    done: list[tuple[int, int]] = []

    def check(part: slice) -> None:
        assert np.isfinite(out[part]).all()
        done.append((part.start, part.stop))

    stream(h, old, side, out, block=40, on_done=check)
    np.testing.assert_allclose(out, ref.transform(old.values * old.scale[:, None], side, h), rtol=1e-4, atol=1e-4)
    assert done == [(i, min(i + 40, n)) for i in range(0, n, 40)]
    fake.check_guards()


def test_a_missing_wait_is_seen(fake: FakeDevice, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in's own proof: without the events, some order gives wrong rows."""
    monkeypatch.setattr(fake, "wait", lambda event: None)
    h = Transformation.random(5, 5, 6, inner=8)
    x = rng.standard_normal((200, 5), dtype=np.float32)
    wrong = 0
    for seed in range(4):
        fake.random.seed(seed)
        out = np.zeros((200, 6), np.float32)
        stream(h, x, x, out, block=40)
        wrong += not np.allclose(out, ref.transform(x, x, h), rtol=1e-3, atol=1e-3)
    assert wrong


def test_out_of_memory_halves_the_block_then_says_so(fake: FakeDevice, rng: Any) -> None:
    h = Transformation.random(5, 5, 6, inner=8)
    x = rng.standard_normal((2100, 5), dtype=np.float32)
    out = np.zeros((2100, 6), np.float32)
    fake.memory, fake.largest = 1024 * 6 * 4 + 100000, 0
    stream(h, x, x, out, block=2100)
    np.testing.assert_allclose(out, ref.transform(x, x, h), rtol=1e-4, atol=1e-4)
    weights_fit = fake.memory = 4000
    with pytest.raises(BackendError, match=r"out of memory even with blocks of 2[0-9][0-9] rows"):
        stream(h, x, x, out, block=2100)
    assert fake.memory == weights_fit


def test_a_device_that_dies_in_the_middle_is_no_success(fake: FakeDevice, rng: Any) -> None:
    h = Transformation.random(5, 5, 6, inner=8)
    x = rng.standard_normal((400, 5), dtype=np.float32)
    out = np.full((400, 6), np.nan, np.float32)
    done: list[slice] = []
    fake.fail_at = 14  # launches; a block takes four
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        stream(h, x, x, out, block=40, on_done=done.append)
    assert 0 < len(done) < 10
    whole = done[-1].stop
    np.testing.assert_allclose(out[:whole], ref.transform(x, x, h)[:whole], rtol=1e-4, atol=1e-4)
    assert "cuda:0" in device_module._lost


def test_zero_rows(fake: FakeDevice) -> None:
    h = Transformation.random(5, 5, 6, inner=8)
    stream(h, np.empty((0, 5), np.float32), np.empty((0, 5), np.float32), np.empty((0, 6), np.float32))
    assert fake.launches == []


def test_host_rows_through_the_public_call(fake: FakeDevice, rng: Any, tmp_path: Path) -> None:
    """transform_batch(device="cuda:0"): the proof runs once and is written down, then the rows are streamed."""
    h = Transformation.random(9, 5, 6, inner=8)
    old, side = rng.standard_normal((300, 9), dtype=np.float32), rng.standard_normal((300, 5), dtype=np.float32)
    got = fct.transform_batch(old, side, h, device="cuda:0", backend="triton", precision="fp32")
    np.testing.assert_allclose(got, ref.transform(old, side, h), rtol=1e-4, atol=1e-4)
    verdicts = json.loads((tmp_path / "cache" / "selfproof.json").read_text())
    assert list(verdicts.values()) == [""]
    before = len(fake.launches)
    fct.transform_batch(old, side, h, device="cuda:0", backend="triton", precision="fp32")
    assert len(fake.launches) - before == 4


class Broken(backend.TritonTransform):
    """A kernel that is wrong in one element of its last row."""

    def run(self, packed: Any, old: Rows, side: Rows, out: Rows, *, threads: int, report: Any = None) -> None:
        super().run(packed, old, side, out, threads=threads)
        packed.device._push(lambda: out.values[-1, -1].add_(9))


def test_a_kernel_that_disagrees_is_refused(fake: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    from fct.ops.transform.torch_backend import TorchTransform

    torch_backend = TorchTransform()
    monkeypatch.setattr(torch_backend, "why_not", lambda h, precision, device: [])
    monkeypatch.setattr(dispatch, "transform_backends", lambda: [Broken(), torch_backend])
    h = Transformation.random(9, 5, 6, inner=8)
    with pytest.warns(FctWarning, match=r"triton \(fp32\) is refused on cuda:0: 1 rows, .*: off by"):
        chosen, _ = dispatch.pick_transform(h, "fp32", "cuda:0")
    assert chosen is torch_backend
    assert dispatch.pick_transform(h, "fp32", "cuda:0")[0] is torch_backend  # remembered, no second warning
    with pytest.raises(BackendError, match="refused by the self-proof"):
        dispatch.pick_transform(h, "fp32", "cuda:0", "triton")


def test_writes_outside_are_seen_by_the_proof(fake: FakeDevice) -> None:
    class Spills(backend.TritonTransform):
        def run(self, packed: Any, old: Rows, side: Rows, out: Rows, *, threads: int, report: Any = None) -> None:
            super().run(packed, old, side, out, threads=threads)
            beyond = out.values.as_strided((1,), (1,), out.values.storage_offset() + out.values.numel())
            packed.device._push(lambda: beyond.fill_(0))

    assert "wrote outside" in selfproof._run(Spills(), Transformation.random(9, 5, 6, inner=8), "fp32", "cuda:0")


def test_an_unreadable_verdict_file_counts_as_empty(fake: FakeDevice, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "selfproof.json").write_text("{broken")
    assert selfproof.read_verdicts() == {}
    selfproof.write_verdict("a", "")
    assert selfproof.read_verdicts() == {"a": ""}


@pytest.mark.slow
def test_doctor_finds_the_right_and_the_wrong(fake: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    from fct.ops.transform.reference_backend import RefTransform

    monkeypatch.setattr(doctor, "devices", lambda: {"cpu": "here", "cuda:0": "fake"})
    monkeypatch.setattr(doctor, "SIZES", (1,))
    monkeypatch.setattr(selfproof, "ROWS", (3,))
    monkeypatch.setattr(doctor, "PAPER_SHAPE", (16, 16, 16, 32))
    some = [h for h in selfproof.odd_transformations() if h.d_old in (1, 9)]  # test_triton_transform.py has them all
    monkeypatch.setattr(doctor, "odd_transformations", lambda: some)
    monkeypatch.setattr(Broken, "name", "broken")
    report = doctor.examine(backends=[RefTransform(), backend.TritonTransform(), Broken()])
    verdict = {(f.backend, f.precision, f.device): f.verdict for f in report.findings}
    assert verdict["ref", "fp32", "cpu"] == "right"
    assert verdict["triton", "fp32", "cpu"] == "not here"
    assert [verdict["triton", p, "cuda:0"] for p in ("fp32", "fp16", "bf16", "int8", "fp8")] == ["right"] * 5
    assert verdict["broken", "fp32", "cuda:0"] == "wrong"
    assert not report.healthy
    assert {t.backend for t in report.fastest()} == {"triton"}
    mailed = json.loads(json.dumps(report.to_dict()))
    assert mailed["format"] == "fct-doctor 2"
    assert mailed["healthy"] is False
    assert mailed["devices"]["cuda:0"] == "fake"
    assert {"backend", "precision", "device", "verdict", "detail", "worst_error", "op"} == set(mailed["findings"][0])
    assert all(t["rows_per_s"] == t["rows"] / t["seconds"] for t in mailed["timings"])
    report.devices["cuda:0"] = "NVIDIA H100 80GB HBM3, sm_90"
    h = Transformation.random(16, 16, 16, inner=32)
    for t in report.to_dict()["fastest"]:
        assert t["gflops"] == pytest.approx(t["rows"] * h.flop_per_row / t["seconds"] / 1e9)
        assert 0 < t["share_of_published_peak"] < 1


def test_doctor_on_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backend as it is: what cannot run here says so, and nothing here is wrong."""
    monkeypatch.setattr(doctor, "SIZES", (1,))
    monkeypatch.setattr(selfproof, "ROWS", (3,))
    monkeypatch.setattr(doctor, "SEARCH_GALLERY", (500, 128))
    monkeypatch.setattr(doctor, "SEARCH_SIZES", (1,))
    report = doctor.examine()
    assert report.healthy, [f for f in report.findings if f.verdict == "wrong"]
    right = {(f.op, f.backend, f.precision) for f in report.findings if f.verdict == "right" and f.device == "cpu"}
    assert {("transform", "cpu", "fp32"), ("transform", "torch", "fp32"), ("transform", "ref", "fp32")} <= right
    assert {("search", "cpu", "int8"), ("search", "cpu", "fp32"), ("search", "numpy", "fp32")} <= right
    assert {t.backend for t in report.timings if t.op == "search"} >= {"cpu", "numpy"}
    assert all(f.detail for f in report.findings if f.verdict == "not here")


def test_bad_days_name_the_argument(fake: FakeDevice, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows on two devices, a device of another kind, outputs that would need a copy: refused before any launch."""
    from fct import transform as public

    h = Transformation.random(5, 5, 6, inner=8)
    x = rng.standard_normal((7, 5), dtype=np.float32)
    on_gpu: Any = Rows(fake.upload(x), "float32", None, "cuda:0", "torch")
    known = {id(on_gpu): on_gpu}
    real = rows_of
    monkeypatch.setattr(public, "rows_of", lambda a, *rest, **how: known.get(id(a)) or real(a, *rest, **how))
    with pytest.raises(ValueError, match="side_info: expected an array on cuda:0 like old, got one on cpu"):
        fct.transform_batch(on_gpu, x, h)
    with pytest.raises(ValueError, match="out: expected an array on cuda:0 like old, got one on cpu"):
        fct.transform_batch(on_gpu, on_gpu, h, out=np.zeros((7, 6), np.float32))
    with pytest.raises(ValueError, match="device: expected cuda:0, where the rows lie, or cuda, got cpu"):
        fct.transform_batch(on_gpu, on_gpu, h, device="cpu")
    with pytest.raises(ValueError, match="device: expected cpu, where the rows lie, or cuda, got tpu:0"):
        fct.transform_batch(x, x, h, device="tpu:0")
    with pytest.raises(ValueError, match="out: expected rows whose elements are contiguous"):
        fct.transform_batch(x, x, h, out=np.zeros((6, 7), np.float32).T, device="cuda:0")
    assert fake.launches == []


def test_strided_rows_are_streamed_as_they_are(fake: FakeDevice, rng: Any) -> None:
    h = Transformation.random(5, 4, 6, inner=8)
    wide = rng.standard_normal((90, 30), dtype=np.float32)
    old, side, out = wide[::2, 3:8], wide[1::2, 20:24], np.full((45, 9), np.nan, np.float32)[:, 1:7]
    stream(h, old, side, out, block=20)
    np.testing.assert_allclose(out, ref.transform(old, side, h), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(fake: FakeDevice, rng: Any) -> None:
    """The last three rows of int8 galleries of 2^31 elements and more; the pages of the others are never touched."""
    import torch

    h, n = Transformation.random(64, 64, 64, inner=16), (1 << 25) + 3
    old, out = (torch.zeros((n, 64), dtype=torch.int8) for _ in range(2))
    old[-3:] = torch.from_numpy(rng.integers(-99, 99, (3, 64), dtype=np.int8))
    assert old.numel() > 1 << 31
    scale = fake.upload(np.full((1, 1), 0.02, np.float32))
    packed = backend.TritonTransform().pack(h, "fp32", "cuda:0")
    rows, to = (Rows(x, "int8", scale, "cuda:0", "torch") for x in (old, out))
    chunk = backend._Chunks(packed, rows, rows, to, 3)
    fake.set_counter(chunk.row0, n - 3)
    chunk._chunk(3)
    fake.drain()
    x = old[-3:].double().numpy() * np.float32(0.02)
    want = np.clip(np.rint(ref.transform(x, x, h) / np.float32(0.02)), -127, 127)
    assert np.abs(out[-3:].numpy() - want).max() <= 1
    assert (out[-3:].numpy() == want).mean() > 0.95
    assert not out[:3].any()
    assert int(chunk.row0) == n


def test_the_callers_own_stream(fake: FakeDevice, rng: Any) -> None:
    """Rows on the device: every launch goes to the stream that is current, behind what the caller queued there."""
    h = Transformation.random(5, 5, 6, inner=8)
    packed = backend.TritonTransform().pack(h, "fp32", "cuda:0")
    x = rng.standard_normal((40, 5), dtype=np.float32)
    late, out, mine = fake.rows(np.zeros_like(x)), fake.out(40, 6), fake.new_stream()
    with fake.on(mine):
        fake.copy(late.values, fake.upload(x))  # not done when the transformation is queued
        backend.run_chunks(packed, late, late, out)
        assert not fake.main.queue
        done = fake.record()
    fake.finish(done)
    np.testing.assert_allclose(fake.download(out.values), ref.transform(x, x, h), rtol=1e-4, atol=1e-4)


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doctor's searches at a size for the interpreter."""
    monkeypatch.setattr(doctor, "devices", lambda: {"cuda:0": "fake"})
    monkeypatch.setattr(doctor, "SEARCH_GALLERY", (200, 8))
    monkeypatch.setattr(doctor, "SEARCH_SIZES", (1, 64))
    monkeypatch.setattr(dispatch, "transform_backends", tuple)
    monkeypatch.setattr(doctor, "transform_backends", tuple)
    monkeypatch.setattr(selfproof, "SEARCHES", ((3, 90, 9, 7),))
    monkeypatch.delenv("FCT_BACKEND", raising=False)


def test_doctor_examines_every_search_and_dispatch_follows_its_times(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Times that make torch the fastest for one query and Triton for many; then the other way round."""
    from fct.info import build_info
    from fct.ops.registry import pick_search

    quick(monkeypatch)
    told = {"triton": {1: 9.0, 64: 1.0}, "torch": {1: 1.0, 64: 9.0}}

    def timed(name: str, precision: str, place: str, search: Any, full: bool) -> list[doctor.Timing]:
        at = ("search", 200)
        return [doctor.Timing(name, precision, place, n, s, s, s, *at) for n, s in told[name].items()]

    def picked(precision: str, queries: int) -> str:
        search, _ = pick_search(5, "l2", "cuda:0", precision, queries=queries)
        return "torch" if search is None else search.name

    monkeypatch.setattr(doctor, "_time_search", timed)
    with fake.torch():
        assert picked("auto", 1) == "triton"  # not timed: in order
        for few, many in (("torch", "triton"), ("triton", "torch")):
            report = doctor.examine()
            verdict = {(f.backend, f.precision): f.verdict for f in report.findings}
            assert verdict["triton", "bf16"] == verdict["triton", "int8"] == verdict["torch", "fp32"] == "right"
            assert verdict["cuda", "bf16"] == "not here"
            assert report.remembered == str(tmp_path / "cache" / "selfproof.json")
            for known in (selfproof._known, {}):  # this process and the next
                monkeypatch.setattr(selfproof, "_known", known)
                for n, name in ((1, few), (3, few), (40, many), (10**6, many)):
                    assert picked("auto", n) == name, n
                assert picked("bf16", 1) == "triton"  # demanded
            told["triton"], told["torch"] = told["torch"], told["triton"]
        monkeypatch.setattr(selfproof, "_build", lambda: "another build")
        assert picked("auto", 10**6) == "triton"  # its times do not count
    monkeypatch.setattr("fct.ops.device.state.why_no_gpu", lambda name: [])
    facts = build_info()
    assert facts["searches"]["triton"]["runs"]
    assert facts["searches"]["triton"]["proved"] == {"l2 bf16": ""}
    assert facts["verdicts"] == report.remembered


def test_doctor_times_searches_and_finds_a_wrong_one(fake: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    from fct.ops.search import triton_search as topk_triton

    class Wrong(topk_triton.TritonSearch):
        name = "wrong"

        def search(self, *args: Any, **how: Any) -> Any:
            distances, rows = super().search(*args, **how)
            return distances, rows.flip(1)

    quick(monkeypatch)
    monkeypatch.setattr(doctor, "SEARCH_SIZES", (2,))
    monkeypatch.setattr(dispatch, "search_backends", lambda: [topk_triton.TritonSearch(), Wrong()])
    with fake.torch():
        report = doctor.examine()
    assert {(f.backend, f.verdict) for f in report.findings} == {
        ("triton", "right"), ("wrong", "wrong"), ("torch", "right"),
    }  # fmt: skip
    assert not report.healthy
    assert {(t.backend, t.precision, t.rows, t.gallery) for t in report.timings} == {
        ("triton", "bf16", 2, 200), ("triton", "int8", 2, 200), ("torch", "fp32", 2, 200),
    }  # fmt: skip
    assert all(t["gflops"] > 0 for t in report.to_dict()["timings"])
    assert len(report.fastest()) == 1  # all answer alike, so one is the fastest


def test_the_transformation_follows_doctors_times(fake: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which backend runs flips with the measured times, by rows and by precision; a forced one is not asked."""
    from fct.ops.transform.torch_backend import TorchTransform

    monkeypatch.setattr(dispatch, "transform_backends", lambda: [backend.TritonTransform(), TorchTransform()])
    monkeypatch.setattr(selfproof, "ROWS", (3,))
    h = Transformation.random(9, 5, 6, inner=8)

    def picked(rows: int | None, precision: str = "fp32", force: str | None = None) -> str:
        return dispatch.pick_transform(h, precision, "cuda:0", force, rows=rows)[0].name

    with fake.torch():
        assert picked(1) == picked(4096) == "triton"
        times = {"triton fp32": {1: 5.0, 4096: 1.0}, "torch fp32": {1: 1.0, 4096: 5.0}}
        selfproof.remember_times("transform", "cuda:0", times)
        assert [picked(1), picked(30), picked(500), picked(None)] == ["torch", "torch", "triton", "triton"]
        assert picked(1, force="triton") == "triton"
        assert picked(1, "bf16") == "triton"  # not timed: in order
        selfproof.remember_times("transform", "cuda:0", {"torch fp32": {1: 1.0}})
        assert picked(4096) == "torch"  # what was not timed comes behind
        selfproof.write_verdict(selfproof._key("times of transform", "cuda:0", ""), "{broken")
        monkeypatch.setattr(selfproof, "_known", {})
        assert picked(1) == "triton"
