"""On a GPU: the transformation and the search beside what users would run there instead.

``pytest benchmarks/test_gpu.py`` measures; ``--full`` goes to a million rows and a million gallery rows. Where there is
no GPU every test is skipped with the reason, and tests/test_gpu_benchmark.py runs this code on a stand-in. A time is
the host's, from the call until the result lies in device memory. What is not installed or does not run is a row too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fct
from fct import ref
from fct.artifact.transformation import Transformation
from fct.bench.data_sheets import published_peak
from fct.bench.measure import interleave, timing_fields
from fct.bench.peers import torch_module
from fct.bench.throughput import error_of, same_neighbours
from fct.errors import BackendError
from fct.fit.precision_choice import calibrate
from fct.ops.backend import GPU_PRECISIONS, PRECISIONS
from fct.ops.registry import transform_backends
from fct.ops.weights import packed
from fct.rows import Rows, rows_of

PLACE = "cuda:0"
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2, "int8": 1e-1, "fp8": 2e-1}
Call = Callable[[], Any]
Record = Callable[..., None]


def settled(call: Call, place: str) -> Call:
    """``call`` and then the wait for what it queued."""
    from fct.ops.device.state import device_of

    device = device_of(place)

    def whole() -> Any:
        result = call()
        device.finish(device.record())
        return result

    return whole


def host(values: Any, place: str) -> Any:
    """Tensor or array -> numpy, on the host."""
    from fct.ops.device.state import device_of

    if isinstance(values, np.ndarray):
        return values
    return np.asarray(device_of(place).download(values.float() if values.is_floating_point() else values))


# ---- the transformation ----
def ours(h: Transformation, old: Any, side: Any, place: str) -> dict[tuple[str, str], Callable[[], Call]]:
    """(who, precision) -> what makes its call. old, side: float32 tensors on the device."""
    from fct.ops.device.state import device_of

    def build(backend: Any, precision: str) -> Callable[[], Call]:
        def make() -> Call:
            why = backend.why_not(h, precision, place)
            if why:
                raise RuntimeError("; ".join(why))
            weights = packed(backend, h, precision, place)
            out = device_of(place).empty((len(old), h.d_new), "float32")
            a, b, to = (Rows(x, "float32", None, place, "torch") for x in (old, side, out))

            def call() -> Any:
                backend.run(weights, a, b, to, threads=1)
                return out

            return call

        return make

    return {
        (f"fct {backend.name}", precision): build(backend, precision)
        for backend in transform_backends()
        if backend.name in ("cuda", "triton")
        for precision in (*PRECISIONS, *GPU_PRECISIONS)
    }


def torch_peers(h: Transformation, old: Any, side: Any) -> dict[tuple[str, str], Callable[[], Call]]:
    """Plain torch, torch.compile, and cuBLASLt's products with bias and ReLU in their epilogues."""
    import torch

    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

    def module(precision: str, compiled: bool) -> Call:
        net = torch_module(h, types[precision]).to(old.device)
        if compiled:
            net = torch.compile(net, mode="max-autotune-no-cudagraphs")

        def call() -> Any:
            with torch.inference_mode():
                return net(old.to(types[precision]), side.to(types[precision])).float()

        return call

    def epilogues(precision: str) -> Call:
        """torch._addmm_activation is cuBLASLt's matmul with its RELU_BIAS epilogue."""
        kind = types[precision]

        def chain(layers: Any) -> list[tuple[Any, Any, bool]]:
            return [
                (
                    torch.from_numpy(layer.weight.copy()).to(old.device, kind).t(),
                    torch.from_numpy(layer.bias.copy()).to(old.device, kind),
                    layer.relu,
                )
                for layer in layers
            ]

        chains = [chain(h.old), chain(h.side), chain(h.mixer), [] if h.skip is None else chain([h.skip])]

        def along(x: Any, layers: list[tuple[Any, Any, bool]]) -> Any:
            for weight, bias, relu in layers:
                x = torch._addmm_activation(bias, x, weight) if relu else torch.addmm(bias, x, weight)
            return x

        def call() -> Any:
            with torch.inference_mode():
                joined = torch.cat([along(old.to(kind), chains[0]), along(side.to(kind), chains[1])], 1)
                y = along(joined, chains[2]).float()
                if h.skip is not None:
                    rows = torch.cat([old, side], 1) if h.uses_side_info else old
                    y = y + along(rows.to(kind), chains[3])
                return torch.nn.functional.normalize(y) * h.length if h.normalise else y

        return call

    found: dict[tuple[str, str], Callable[[], Call]] = {}
    for precision in types:
        found["torch eager", precision] = lambda p=precision: module(p, False)  # type: ignore[misc]
        found["torch.compile", precision] = lambda p=precision: module(p, True)  # type: ignore[misc]
        found["cuBLASLt", precision] = lambda p=precision: epilogues(p)  # type: ignore[misc]
    return found


def measure_transform(
    h: Transformation, rows: int, place: str, record: Record, *, seconds: float = 1.0, skip: tuple[str, ...] = (),
    table: str = "gpu transform",
) -> None:  # fmt: skip
    """One row of the table per who and precision. ``skip``: names of those that are left out."""
    from fct.ops.device.state import device_of

    device = device_of(place)
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((2, min(rows, 65_536), h.d_old), dtype=np.float32)
    old, side = (device.upload(np.resize(x, (rows, h.d_old))) for x in spread)
    shown = min(rows, 256)
    want = ref.transform(spread[0, :shown], spread[1, :shown], h)
    calls: dict[str, Call] = {}
    for (who, precision), build in (ours(h, old, side, place) | torch_peers(h, old, side)).items():
        if who in skip:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call = settled(build(), place)
                got = host(call()[:shown], place)
        except Exception as error:  # whatever one cannot do here, the others are measured
            status = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            record(table, who=who, precision=precision, rows=rows, gpu=device.model, status=status)
            continue
        off = error_of(got, want)
        assert off < TOLERANCE[precision], f"{who} ({precision}): error {off:.1e} against the reference"
        calls[f"{who}|{precision}"] = call
    for name, timing in interleave(calls, seconds=seconds, rounds=5).items():
        who, _, precision = name.partition("|")
        fields = timing_fields(timing, rows=rows, flop=h.flop_per_row * rows)
        peak = published_peak(device.model, precision)
        share = None if peak is None else fields["gflops"] / (1e3 * peak)
        record(table, who=who, precision=precision, rows=rows, gpu=device.model, status="ok", **fields,
               share_of_published_peak=share)  # fmt: skip


# ---- the search ----
def search_peers(q: Any, g: Any, k: int, place: str) -> dict[str, Callable[[], Call]]:
    """Exact search by inner product of tensors on the device -> (n, k) row numbers."""
    import torch

    def public() -> Call:
        try:
            gallery = fct.prepare_gallery(g, metric="ip")
        except ValueError:
            gallery = g  # rows that topk searches as they are
        return lambda: fct.topk(q, gallery, k, metric="ip").indices

    def certified(kind: str) -> Call:
        from fct.ops.search.cuda_search import CudaSearch

        search = CudaSearch()
        why = search.why_not(k, "ip", place)
        if why:
            raise RuntimeError("; ".join(why))
        gallery, queries = search.prepare(rows_of(g, "gallery"), "ip", kind), rows_of(q, "queries")
        return lambda: search.search(queries, gallery, k)[1]

    def plain() -> Call:
        def call() -> Any:
            step = max(1, (1 << 30) // (4 * len(g)))
            return torch.cat([torch.topk(q[i : i + step] @ g.T, k).indices for i in range(0, len(q), step)])

        return call

    def faiss_gpu() -> Call:
        import faiss

        if not hasattr(faiss, "StandardGpuResources"):
            raise ImportError("this faiss has no GPU part: pip install 'fct-embeddings[gpu]'")
        import faiss.contrib.torch_utils  # tensors in and out, without a copy

        index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), g.shape[1])
        index.add(g)
        return lambda: index.search(q, k)[1]

    def cuvs() -> Call:
        from cuvs.neighbors import brute_force

        index = brute_force.build(g, metric="inner_product")
        return lambda: torch.as_tensor(brute_force.search(index, q, k)[1], device=g.device)

    return {
        "fct.topk": public,
        "fct cuda, bf16 scan": lambda: certified("bf16"),
        "fct cuda, int8 scan": lambda: certified("int8"),
        "torch matmul + topk": plain,
        "FAISS GpuIndexFlatIP": faiss_gpu,
        "cuVS brute force": cuvs,
    }


def measure_search(queries: int, n: int, d: int, k: int, place: str, record: Record, *, seconds: float = 1.0) -> None:
    """One row of "gpu topk" per who."""
    from fct.ops.device.state import device_of

    device = device_of(place)
    rng = np.random.default_rng(0)
    q, g = (rng.standard_normal((m, d), dtype=np.float32) for m in (queries, n))
    shown = min(queries, 100)
    want = np.argsort(-(q[:shown].astype(np.float64) @ g.T), axis=1, kind="stable")[:, :k]
    about = {"queries": queries, "gallery": n, "d": d, "k": k, "gpu": device.model}
    calls: dict[str, Call] = {}
    for who, build in search_peers(device.upload(q), device.upload(g), k, place).items():
        try:
            call = settled(build(), place)
            got = host(call()[:shown], place)
        except Exception as error:
            status = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            record("gpu topk", who=who, **about, status=status)
            continue
        assert same_neighbours(q[:shown], g, got.astype(np.int64), want), f"{who}: other neighbours than the reference"
        calls[who] = call
    flop = 2.0 * queries * n * d
    for who, timing in interleave(calls, seconds=seconds, rounds=5).items():
        fields = timing_fields(timing, rows=queries, flop=flop)
        peak = published_peak(device.model, "int8" if "int8" in who else "bf16" if "fct" in who else "fp32")
        share = None if peak is None else fields["gflops"] / (1e3 * peak)
        record("gpu topk", who=who, **about, status="ok", **fields, share_of_published_peak=share)


def paper(d: int = 128, inner: int = 2048) -> Transformation:
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((2, 4096, d), dtype=np.float32)
    return calibrate(Transformation.random(d, d, d, inner=inner), *sample)


def small(d: int = 128, inner: int = 512) -> Transformation:
    """As ``config="auto"`` makes it: branches of one layer, one block in the mixer, a skip, rows of unit length."""
    sample = np.random.default_rng(0).standard_normal((2, 4096, d), dtype=np.float32)
    shape = {"branch": d, "blocks": 1, "skip": True, "normalise": True}
    return calibrate(Transformation.random(d, d, d, inner=inner, **shape), *sample)  # type: ignore[arg-type]


ROWS = (1, 8, 32, 256, 4096, 65_536, 1_000_000)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ROWS)
def test_transform(rows: int, full: bool, record: Record) -> None:
    """The paper's h, 128 dimensions in and out, inner 2048; torch.compile tunes for minutes, so by --full beyond one
    small and one large batch."""
    skip = () if full or rows in (32, 65_536) else ("torch.compile",)
    measure_transform(paper(), rows, PLACE, record, skip=skip)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 4096, 65_536, 1_000_000])
def test_small_transform(rows: int, full: bool, record: Record) -> None:
    """0.49 MFLOP a row: what moves rows, and how many launches, matter as much as products."""
    skip = () if full or rows in (64, 65_536) else ("torch.compile",)
    measure_transform(small(), rows, PLACE, record, skip=skip, table="gpu transform, small h")


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 100, 1000])
@pytest.mark.parametrize("k", [10, 100])
def test_topk(queries: int, k: int, full: bool, record: Record) -> None:
    measure_search(queries, 10_000_000 if full else 1_000_000, 128, k, PLACE, record)


@pytest.mark.gpu
def test_streaming(record: Record) -> None:
    """Rows in host memory through the GPU: what a gallery larger than its memory sees, against a plain copy."""
    measure_streaming(paper(), 1_000_000, PLACE, record)


def measure_streaming(h: Transformation, rows: int, place: str, record: Record) -> None:
    """One row of "gpu streaming" per precision: rows a second, and gigabytes in and out."""
    from fct.ops.device.state import device_of

    device = device_of(place)
    rng = np.random.default_rng(0)
    old, side = (np.resize(x, (rows, h.d_old)) for x in rng.standard_normal((2, 4096, h.d_old), dtype=np.float32))
    out = np.empty((rows, h.d_new), np.float32)
    want = ref.transform(old[:64], side[:64], h)
    moved = old.nbytes + side.nbytes + out.nbytes
    calls: dict[str, Call] = {}
    for precision in (*PRECISIONS, *GPU_PRECISIONS):

        def call(p: str = precision) -> Any:
            return fct.transform_batch(old, side, h, out=out, device=place, precision=p)

        try:
            call()
        except BackendError as error:
            record("gpu streaming", precision=precision, rows=rows, gpu=device.model, status=str(error)[:200])
            continue
        assert error_of(out[:64], want) < TOLERANCE[precision], precision
        calls[precision] = call
    for precision, timing in interleave(calls, seconds=2.0, rounds=3).items():
        fields = timing_fields(timing, rows=rows, flop=h.flop_per_row * rows)
        record("gpu streaming", precision=precision, rows=rows, gpu=device.model, status="ok", **fields,
               gb_per_s=moved / timing.median / 1e9)  # fmt: skip
