"""fct.topk, prepare_gallery and evaluate on a GPU's tensors: proof, dispatch and bad days, on the stand-in device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_support as support
import numpy as np
import pytest
import torch
from fake_device import FakeDevice, GpuTensor

import fct
from fct import ref
from fct.errors import BackendError, DeviceLostError, FctWarning
from fct.kernels import search_kernels as kernels
from fct.ops import proof as selfproof
from fct.ops import registry
from fct.ops.device import cuda_runtime
from fct.ops.device import state as devices
from fct.ops.search import cuda_search
from fct.ops.search import gpu_search as topk_gpu
from fct.ops.search import triton_search as topk_triton
from fct.ops.search.cuda_search import CudaSearch

METRICS, KINDS = ("l2", "ip", "cosine"), ("bf16", "int8")
WHOLE_PROOF = selfproof.SEARCHES
# which search, and whether it is CUDA's kernels in the emulator or Triton's in the interpreter
BACKENDS = [pytest.param("cuda", marks=support.needs_cxx), "triton"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeDevice]:
    device, second = FakeDevice(seed=7), FakeDevice("sm_80", index=1, seed=8)
    device.install(monkeypatch, tmp_path, second)
    device.second = second
    monkeypatch.delenv("FCT_BACKEND", raising=False)
    # the proof's shapes shrink to what the interpreter does in seconds; test_triton_topk.py has larger ones
    monkeypatch.setattr(selfproof, "SEARCHES", ((1, 1, 1, 1), (3, 90, 9, 7)))
    with device.torch(second):
        yield device


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernels are there, in the emulator."""
    runtime = support.EmulatedRuntime()
    monkeypatch.setattr(CudaSearch.__init__, "__kwdefaults__", {"part": 1 << 30})
    search = CudaSearch
    monkeypatch.setattr(cuda_search, "CudaSearch", lambda: search(runtime))


@pytest.fixture(params=BACKENDS)
def backend(request: Any, fake: FakeDevice) -> str:
    """One of the two searches is at hand, the other is not."""
    if request.param == "cuda":
        request.getfixturevalue("emulated")
    return str(request.param)


@pytest.fixture
def triton(fake: FakeDevice) -> None:
    """No CUDA kernels here: whatever is asked of a shadow, Triton answers."""


def on(device: FakeDevice, x: Any) -> Any:
    return device.upload(x)


def sides(rng: Any, n_q: int = 17, n: int = 301, d: int = 9) -> tuple[Any, Any]:
    q, g = (rng.integers(-3, 4, (m, d)).astype(np.float32) for m in (n_q, n))
    return q, g


def same(found: Any, q: Any, g: Any, k: int, **how: Any) -> None:
    want = ref.topk(q, g, k, **how)
    assert isinstance(found.indices, GpuTensor)
    np.testing.assert_array_equal(found.indices.cpu().numpy(), want[1])
    np.testing.assert_array_equal(found.distances.cpu().numpy(), want[0])


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("not to be asked")


# ---- dispatch and proof ----
def test_the_kernels_answer_and_the_verdict_is_kept(fake: FakeDevice, backend: str, rng: Any, monkeypatch: Any) -> None:
    q, g = sides(rng)
    monkeypatch.setattr(topk_gpu, "topk_blocked", never)
    same(fct.topk(on(fake, q), on(fake, g), 9), q, g, 9)
    verdicts = selfproof.read_verdicts()
    assert list(verdicts.values()) == [""]
    assert next(iter(verdicts)).startswith(f"{backend} search bf16 l2 fake sm_90 ")
    assert selfproof.search_verdict(backend, "l2", "bf16", "cuda:0") == ""
    assert selfproof.search_verdict(backend, "l2", "int8", "cuda:0") is None


def test_few_queries_do_not_pack_a_shadow(fake: FakeDevice, triton: None, rng: Any, monkeypatch: Any) -> None:
    q, g = sides(rng, n_q=15)
    packed: list[int] = []
    prepare = topk_triton.TritonSearch.prepare
    monkeypatch.setattr(
        topk_triton.TritonSearch, "prepare", lambda s, rows, *a: packed.append(rows.n) or prepare(s, rows, *a)
    )
    ours, theirs = on(fake, q), on(fake, g)
    fct.topk(ours, theirs, 3)  # proves itself, on galleries of its own
    packed.clear()
    same(fct.topk(ours, theirs, 3), q, g, 3)
    assert packed == []
    same(fct.topk(ours, theirs, 3, precision="bf16"), q, g, 3)
    assert packed == [301]
    prepared = fct.prepare_gallery(theirs)
    before = len(fake.launches)
    same(fct.topk(ours[:1], prepared, 3), q[:1], g, 3)
    assert fake.launches[before:] == ["scan", "rescore"]
    assert packed == [301, 301]


def test_forced(fake: FakeDevice, emulated: None, rng: Any, monkeypatch: Any) -> None:
    q, g = sides(rng, n_q=3)
    for name in ("cuda", "triton", "torch"):
        monkeypatch.setenv("FCT_BACKEND", name)
        before = len(fake.launches)
        same(fct.topk(on(fake, q), on(fake, g), 4), q, g, 4)
        assert ("scan" in fake.launches[before:]) == (name == "triton")
        assert any(key.startswith("cuda") for key in selfproof.read_verdicts())
    with pytest.raises(BackendError, match=r"precision: expected auto or fp32 with FCT_BACKEND=torch, got 'int8'"):
        fct.topk(on(fake, q), on(fake, g), 4, precision="int8")
    monkeypatch.setenv("FCT_BACKEND", "triton")
    with pytest.raises(BackendError, match=r"expected auto, bf16 or int8 with FCT_BACKEND=triton, got 'fp32'"):
        fct.topk(on(fake, q), on(fake, g), 4, precision="fp32")
    monkeypatch.setenv("FCT_BACKEND", "cpu")
    with pytest.raises(BackendError, match="FCT_BACKEND: expected cuda, triton, torch for a search on cu"):
        fct.topk(on(fake, q), on(fake, g), 4)


def test_a_forced_search_that_can_not_run_says_why(fake: FakeDevice, rng: Any, monkeypatch: Any) -> None:
    q, g = (on(fake, x) for x in sides(rng))
    monkeypatch.setattr(cuda_runtime.CudaRuntime, "check_device", lambda self, device: ["the CUDA driver is too old"])
    monkeypatch.setenv("FCT_BACKEND", "cuda")
    with pytest.raises(
        BackendError, match=r"no search over a bf16 shadow .* on cuda:0: cuda: the CUDA driver is too o"
    ):
        fct.topk(q, g, 4)


@pytest.mark.grid(5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_proved_for_every_metric_and_kind(
    fake: FakeDevice, backend: str, metric: str, kind: str, monkeypatch: Any
) -> None:
    if backend == "cuda":  # the emulator is fast enough for all of them
        monkeypatch.setattr(selfproof, "SEARCHES", WHOLE_PROOF)
    search = next(s for s in registry.search_backends() if s.name == backend)
    assert selfproof._run_search(search, metric, kind, "cuda:0") == ""
    fake.check_guards()


def mutated_triton(folder: Path, old: str, new: str) -> Any:
    """kernels/search_kernels.py with an injected bug."""
    text = Path(kernels.__file__).read_text()
    assert text.count(old) == 1
    file = folder / "mutated_topk.py"
    file.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutated_topk", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("key & 0xFFFFFFFF, 0)", "(key & 0xFFFFFFFF) ^ 1, 0)"),  # rescores the neighbour
        ("inside = rows < n_g", "inside = rows < n_g - 1"),  # never sees the last row
    ],
)
def test_a_mutated_triton_search_is_refused(
    fake: FakeDevice, triton: None, tmp_path: Path, monkeypatch: Any, metric: str, kind: str, old: str, new: str
) -> None:
    broken = mutated_triton(tmp_path, old, new)
    for name in ("scan", "rescore"):
        monkeypatch.setattr(kernels, name, getattr(broken, name))
    with pytest.warns(FctWarning, match=rf"triton search \({kind}, {metric}\) is refused on cuda:0"):
        assert selfproof.prove_search(topk_triton.TritonSearch(), metric, kind, "cuda:0")


MUTATED = """
import warnings
from pathlib import Path
import cuda_support as support
import pytest
from fake_device import FakeDevice
from fct.ops import proof as selfproof
from fct.ops.search.cuda_search import CudaSearch
FakeDevice().install(pytest.MonkeyPatch(), Path({folder!r}))
line = "GPU_INLINE uint32_t key_row(uint64_t key) {{ return static_cast<uint32_t>(key)"
search = CudaSearch(support.EmulatedRuntime({{"topk_keys.cuh": [(line, line + " ^ 1u")]}}))
warnings.simplefilter("ignore")
for metric in ("l2", "ip", "cosine"):
    for kind in ("bf16", "int8"):
        print(bool(selfproof.prove_search(search, metric, kind, "cuda:0")))
"""


@pytest.mark.slow
@support.needs_cxx
def test_a_mutated_cuda_search_is_refused(tmp_path: Path) -> None:
    """For every metric and kind; in a process of its own, which holds the mutated build alone."""
    folders = [str(support.TESTS), str(support.TESTS / "kernels")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    ran = subprocess.run(
        [sys.executable, "-c", MUTATED.format(folder=str(tmp_path))], capture_output=True, text=True, env=environment
    )
    assert ran.stdout.split() == ["True"] * 6, ran.stdout + ran.stderr


def test_a_search_that_disagrees_gives_way(fake: FakeDevice, triton: None, rng: Any, monkeypatch: Any) -> None:
    q, g = sides(rng)
    right = topk_triton.TritonSearch.search
    monkeypatch.setattr(topk_triton.TritonSearch, "search", lambda *a, **k: [x.flip(1) for x in right(*a, **k)])
    with pytest.warns(FctWarning, match=r"triton search .bf16, l2. is refused"):
        same(fct.topk(on(fake, q), on(fake, g), 9), q, g, 9)
    monkeypatch.setenv("FCT_BACKEND", "triton")
    with pytest.raises(BackendError, match="refused by the self-proof"):
        fct.topk(on(fake, q), on(fake, g), 9)


def test_a_kernel_compiled_anew_is_proved_anew(fake: FakeDevice, monkeypatch: Any) -> None:
    proofs: list[str] = []
    monkeypatch.setattr(selfproof, "_run_search", lambda *_: proofs.append("run") or "")
    for build, runs in (("one", 1), ("one", 1), ("two", 2)):
        monkeypatch.setattr(selfproof, "_build", lambda build=build: build)
        monkeypatch.setattr(selfproof, "_known", {})  # another process
        assert selfproof.prove_search(topk_triton.TritonSearch(), "l2", "bf16", "cuda:0") == ""
        assert len(proofs) == runs


# ---- prepared galleries ----
def test_a_shadow_has_low_precision(fake: FakeDevice, rng: Any) -> None:
    with pytest.raises(BackendError, match=r"precision: expected auto, bf16 or int8 for a shadow, got 'fp32'"):
        fct.prepare_gallery(on(fake, sides(rng)[1]), precision="fp32")


@pytest.mark.grid(3)
@pytest.mark.parametrize("kind", KINDS)
def test_prepared_once_and_appended(
    fake: FakeDevice, backend: str, rng: Any, monkeypatch: Any, kind: str, tmp_path: Path
) -> None:
    q, g = sides(rng, n_q=3, d=40)
    prepared = fct.prepare_gallery(on(fake, g[:200]), metric="ip", precision=kind)
    assert prepared.nbytes == 200 * (128 + 16)
    assert prepared.memory_ratio == pytest.approx(1 + 144 / 160)
    grown = prepared.append(on(fake, g[200:]))
    assert len(grown) == 301
    assert grown.nbytes == 301 * (128 + 16)
    monkeypatch.setattr(topk_gpu, "topk_blocked", never)
    search = type(next(s for s in registry.search_backends() if s.name == backend))
    monkeypatch.setattr(search, "prepare", never)
    same(fct.topk(on(fake, q), grown, 5, metric="ip"), q, g, 5, metric="ip")
    same(fct.topk(on(fake, q), prepared, 200, metric="ip"), q, g[:200], 200, metric="ip")
    same(fct.topk(on(fake, g), grown, 2, metric="ip", same_items=True), g, g, 2, metric="ip", same_items=True)
    other = KINDS[1 - KINDS.index(kind)]
    with pytest.raises(BackendError, match=f"expected auto, fp32 or {kind}, which this gallery was prepared for"):
        fct.topk(on(fake, q), grown, 5, metric="ip", precision=other)
    with pytest.raises(ValueError, match="path: expected a gallery prepared on the cpu, got one on cuda:0"):
        grown.save(tmp_path / "shadow")
    with pytest.raises(ValueError, match=r"rows: expected torch rows of float32|got one on cuda:1"):
        prepared.append(on(fake.second, g[200:]))


def test_append_scaled_int8(fake: FakeDevice, triton: None, rng: Any) -> None:
    values = rng.integers(-9, 10, (90, 6), dtype=np.int8)
    parts = [fct.ScaledInt8(on(fake, values[i:j]), 0.5 * (1 + i)) for i, j in ((0, 50), (50, 90))]
    grown = fct.prepare_gallery(parts[0]).append(parts[1])
    plain = values * np.where(np.arange(90) < 50, 0.5, 25.5)[:, None].astype(np.float32)
    same(fct.topk(on(fake, plain[:2]), grown, 7), plain[:2], plain, 7)


def test_out_of_memory(fake: FakeDevice, triton: None, rng: Any, monkeypatch: Any) -> None:
    q, g = sides(rng, n=500)
    ours, theirs = on(fake, q), on(fake, g)
    prepared = fct.prepare_gallery(theirs)
    same(fct.topk(ours, prepared, 3), q, g, 3)
    fake.memory = 30_000  # the candidates of 17 queries do not fit, those of a few do
    same(fct.topk(ours, prepared, 3), q, g, 3)
    with pytest.raises(BackendError, match=r"cuda:0 .fake sm_90.: out of memory for the bf16 shadow of 500 rows of 9"):
        fct.prepare_gallery(theirs)
    same(fct.topk(ours, theirs, 3), q, g, 3)  # auto: torch takes over
    with pytest.raises(BackendError, match=r"out of memory for a search of one query at a time among 500 rows"):
        fct.topk(ours, theirs, 3, precision="bf16")


# ---- bad days ----
def test_rows_on_two_devices(fake: FakeDevice, rng: Any) -> None:
    q, g = sides(rng)
    second = fake.second
    with pytest.raises(ValueError, match="queries: expected an array on cuda:1 like the gallery, got one on cuda:0"):
        fct.topk(on(fake, q), on(second, g), 3)
    with pytest.raises(ValueError, match="queries: expected an array on cuda:0 like the gallery, got one on cpu"):
        fct.topk(q, fct.prepare_gallery(on(fake, g)), 3)


def test_several_gpus(fake: FakeDevice, triton: None, rng: Any) -> None:
    """Rows on cuda:1 are searched there, by kernels that proved themselves on that model."""
    q, g = sides(rng)
    second = fake.second
    found = fct.topk(on(second, q), on(second, g), 3)
    same(found, q, g, 3)
    assert str(found.indices.device) == "cuda:1"
    assert fake.launches == []
    assert "scan" in second.launches
    fct.topk(on(fake, q), on(fake, g), 3)
    assert [key.split()[4:6] for key in sorted(selfproof.read_verdicts())] == [["fake", "sm_80"], ["fake", "sm_90"]]


def test_strided_and_empty(fake: FakeDevice, backend: str, rng: Any) -> None:
    q, g = sides(rng, n_q=40, d=30)
    ours, theirs = on(fake, q)[::2, 3:12], on(fake, g)[1::2, 4:13]
    same(fct.topk(ours, theirs, 4), q[::2, 3:12], g[1::2, 4:13], 4)
    same(fct.topk(ours.T.contiguous().T, theirs, 4), q[::2, 3:12], g[1::2, 4:13], 4)
    assert tuple(fct.topk(ours[:0], theirs, 4).indices.shape) == (0, 4)
    with pytest.raises(ValueError, match="k: expected 1 to 150, the rows of the gallery, got 151"):
        fct.topk(ours, theirs, 151)
    with pytest.raises(ValueError, match=r"^gallery: expected at least one row, got \(0, 9\)$"):
        fct.topk(ours, theirs[:0], 1)


def test_the_largest_k_and_beyond(fake: FakeDevice, triton: None, rng: Any, monkeypatch: Any) -> None:
    q, g = sides(rng, n_q=1, n=2100, d=4)
    same(fct.topk(on(fake, q), on(fake, g), 2048, precision="bf16"), q, g, 2048)
    with pytest.raises(BackendError, match="triton: expected k up to 2048, got 2049"):
        fct.topk(on(fake, q), on(fake, g), 2049, precision="bf16")
    monkeypatch.setattr(topk_triton.TritonSearch, "search", never)
    same(fct.topk(on(fake, q), on(fake, g), 2049), q, g, 2049)


def test_the_callers_own_stream(fake: FakeDevice, triton: None, rng: Any) -> None:
    """Behind what the caller queued there, and nothing on the default stream."""
    q, g = sides(rng, n_q=4)
    prepared = fct.prepare_gallery(on(fake, g))
    fct.topk(on(fake, q), prepared, 3)  # proved
    late, mine = fake.empty(q.shape, "float32"), fake.new_stream()
    seen: list[Any] = []
    launch = fake.launch
    fake.launch = lambda *a, **k: (seen.append(fake.current), launch(*a, **k))[1]  # type: ignore[method-assign]  # watched
    with fake.on(mine):
        fake.copy(late, fake.upload(q))  # not done when the search is called
        same(fct.topk(late, prepared, 3), q, g, 3)
    assert seen
    assert set(map(id, seen)) == {id(mine)}


@support.needs_cxx
def test_the_cuda_search_asks_for_the_current_stream(fake: FakeDevice, rng: Any, monkeypatch: Any) -> None:
    """Every compiled call gets the stream that is current on the rows' device."""

    class Current:
        device_index, cuda_stream = 1, 77

    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: asked.append(str(device)) or Current())
    calls: list[tuple[Any, Any]] = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            real = getattr(support.module(), name)
            if name in ("cuda_search", "cuda_merge_parts", "cuda_make_shadow"):
                at = {"cuda_search": 0}.get(name, -2)

                def record(*args: Any, **kwargs: Any) -> Any:
                    args_ = list(args)
                    calls.append((args_[at], args_[at + 1]))
                    args_[at], args_[at + 1] = 0, 0
                    return real(*args_, **kwargs)

                return record
            return real

    runtime = cuda_runtime.CudaRuntime()
    runtime.lib = Recorder()  # type: ignore[assignment]  # watched
    monkeypatch.setattr(cuda_runtime, "_properties", lambda lib, index: dict(support.module().cuda_device(0)))
    q, g = sides(rng)
    search = CudaSearch(runtime, part=150)
    q_rows, g_rows = (fake.second.rows(x) for x in (q, g))
    found = search.search(q_rows, search.prepare(g_rows, "l2"), 3)
    np.testing.assert_array_equal(found[1].cpu().numpy(), ref.topk(q, g, 3)[1])
    assert len(calls) >= 5  # two shadows, three parts, a merge
    assert set(calls) == {(1, 77)}
    assert set(asked) == {"cuda:1"}


def test_more_than_2_to_the_31_elements(fake: FakeDevice, triton: None) -> None:
    """Three rows 2^30 elements apart, in memory that exists only as address space."""
    import mmap

    from fct.rows import Rows

    stride = (1 << 30) + 64  # 0x4000 below: Linux's MAP_NORESERVE, which Python names from 3.13 on
    memory = mmap.mmap(-1, 2 * stride + 8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    with torch._C.DisableTorchFunctionSubclass():
        values = torch.frombuffer(memory, dtype=torch.int8).as_strided((3, 8), (stride, 1))
        for i in range(3):
            values[i] = torch.arange(8, dtype=torch.int8) * (i + 1)
        far = values.as_subclass(GpuTensor)
        far.fake = fake  # type: ignore[attr-defined]  # a torch.Tensor to mypy
    gallery = Rows(far, "int8", fake.upload(np.full((1, 1), 0.5, np.float32)), "cuda:0", "torch")
    offsets = np.arange(3, dtype=np.int64) * gallery.row_stride
    assert offsets.max() > 1 << 31
    search = topk_triton.TritonSearch()
    prepared = search.prepare(gallery, "l2")
    reached: list[Any] = []
    fake.launch = lambda kernel, grid, arguments, **_: reached.append(arguments)  # type: ignore[method-assign]  # watched
    scan = topk_triton._Scan
    plan = topk_triton.plan(3, 3, "bf16", 1, fake)
    scan(gallery[2:3], prepared.shadow, prepared.meta, None, prepared, 3, plan, fake)._rescore(  # type: ignore[arg-type]  # scores and rows alone count
        gallery[2:3], fake.upload(np.arange(3)[None])
    )
    assert reached[0]["gallery"].stride == stride  # an int64 to the kernel; the interpreter would copy two gigabytes
    assert (
        kernels.rescore_signature("i8", 1)[0]["gallery"].stride
        == kernels.signature("bf16", plan.tile, 32)[0]["gallery"].stride
        == "i64"
    )


def test_a_device_lost_in_a_search_is_no_answer(fake: FakeDevice, triton: None, rng: Any) -> None:
    q, g = sides(rng)
    ours = on(fake, q)
    prepared = fct.prepare_gallery(on(fake, g))
    fct.topk(ours, prepared, 3)
    fake.fail_at = len(fake.launches) + 2  # in the rescoring
    with pytest.raises(DeviceLostError, match=r"cuda:0 .* failed during the search of 17 queries among 301 rows"):
        fct.topk(ours, prepared, 3)
    assert "cuda:0" in devices._lost
    with pytest.raises((DeviceLostError, RuntimeError), match=r"failed earlier|illegal memory access"):
        fct.topk(ours, prepared, 3)
    h = fct.Transformation.random(5, 5, 6, inner=8)
    with pytest.raises(DeviceLostError, match="cuda:0 failed earlier in this process; start a new one"):
        fct.transform_batch(np.ones((3, 5), np.float32), np.ones((3, 5), np.float32), h, device="cuda:0")
    second = fake.second
    same(fct.topk(on(second, q), on(second, g), 3), q, g, 3)  # the other one works on


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        ({"_is_in_bad_fork": lambda: True}, "forked after CUDA was initialised; start workers with the spawn method"),
        (
            {"init": lambda: (_ for _ in ()).throw(RuntimeError("The NVIDIA driver on your system is too old (found "
                                                                "version 11040).\nPlease update."))},
            r"CUDA does not start: The NVIDIA driver on your system is too old \(found version 11040\)\.",
        ),
    ],
)  # fmt: skip
def test_forked_or_an_old_driver(monkeypatch: Any, patch: dict[str, Any], says: str) -> None:
    """What every GPU backend answers, and a streamed call's error; the CPU path goes on."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    for name, value in patch.items():
        monkeypatch.setattr(torch.cuda, name, value)
    h = fct.Transformation.random(5, 5, 6, inner=8)
    x = np.ones((3, 5), np.float32)
    with pytest.raises(BackendError, match=says) as error:
        fct.transform_batch(x, x, h, device="cuda:0", precision="bf16")
    for name in ("cuda", "triton", "torch"):
        assert f"{name} (bf16): " in str(error.value)
    for search in registry.search_backends():
        assert search.why_not(5, "l2", "cuda:0")
    assert any(says[:30].replace("\\", "") in why for why in topk_triton.TritonSearch().why_not(5, "l2", "cuda:0"))
    assert fct.transform_batch(x, x, h).shape == (3, 6)


# ---- evaluate ----
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("same_items", [False, True])
def test_evaluate_equals_the_cpu(fake: FakeDevice, rng: Any, monkeypatch: Any, metric: str, same_items: bool) -> None:
    """Many ties, and scores that are exact (cosine: nearly), in several blocks of queries."""
    from fct.ops.search import float64 as topk

    q, g = sides(rng, n_q=120, n=120, d=3)
    q[5] = g[3] = 0
    if metric == "cosine":
        q, g = (rng.standard_normal((120, 3)).astype(np.float32) for _ in range(2))
    labels = rng.integers(0, 30, 120)
    labels[7] = 99  # without a match
    others = labels if same_items else rng.integers(0, 30, 120)
    g = q if same_items else g
    monkeypatch.setattr(topk, "_BLOCK_BYTES", 24 * 120 * 50)
    how: dict[str, Any] = {"metric": metric, "same_items": same_items, "bootstrap": 0}
    want = fct.evaluate(q, g, labels, others, **how)
    got = fct.evaluate(on(fake, q), on(fake, g), labels, others, **how)
    np.testing.assert_array_equal(got.first_match, want.first_match)
    np.testing.assert_allclose(got.average_precision, want.average_precision, rtol=1e-13)
    assert got.queries_without_match == want.queries_without_match > 0
    prepared = fct.prepare_gallery(on(fake, g), metric=metric)
    np.testing.assert_array_equal(
        fct.evaluate(on(fake, q), prepared, labels, others, **how).first_match,  # type: ignore[arg-type]  # rows on the stand-in
        want.first_match,  # type: ignore[arg-type]  # rows on the stand-in
    )


def test_evaluate_on_a_lost_device_and_without_memory(fake: FakeDevice, rng: Any, monkeypatch: Any) -> None:
    q, g = (on(fake, x) for x in sides(rng))
    labels = np.zeros(17, int), np.zeros(301, int)

    def full(*_: Any) -> Any:
        fake.empty((1 << 40,), "int8")

    monkeypatch.setattr(topk_gpu, "ranks_on_device", full)
    with pytest.raises(BackendError, match=r"cuda:0 .fake sm_90.: out of memory for the ranks of one query among"):
        fct.evaluate(q, g, *labels)
    monkeypatch.setattr(topk_gpu, "ranks_on_device", lambda *_: fake.die())
    with pytest.raises(DeviceLostError, match="failed during the ranks of 17 queries"):
        fct.evaluate(q, g, *labels)
