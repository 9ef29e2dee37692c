"""The fused C++ transformation against the float64 reference, on every instruction set this processor has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from drawn import DTYPES, narrow, placed, scales, wrapped
from hypothesis import given, settings
from hypothesis import strategies as st

import fct
from fct import _C, ref
from fct.artifact.transformation import BRANCHES, Layer, Transformation
from fct.fit.precision_choice import calibrate
from fct.ops.isa import using_isa
from fct.ops.numerics.quantise import layer_plans
from fct.ops.numerics.rounding import SIGMAS, deviation
from fct.ops.transform import cpu_backend
from fct.rows import rows_of
from fct.spaces import EmbeddingSpace
from fct.transform import transform_finite

ISAS = _C.isa_names[: _C.detected_isa() + 1]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FCT_ISA", raising=False)
    monkeypatch.delenv("FCT_BACKEND", raising=False)


def run(old: Any, side: Any, h: Transformation, isa: str, precision: str, **more: Any) -> Any:
    with using_isa(isa):
        return fct.transform_batch(old, side, h, precision=precision, backend="cpu", **more)


def chains(
    rng: np.random.Generator, widths: dict[str, list[int]], *, integers: bool = False, skip: bool = False, **more: Any
) -> Any:
    """A transformation of any depth: widths[branch] = [d_in, ..., d_out]."""

    def layer(a: int, b: int, relu: bool) -> Layer:
        if integers:
            return Layer(
                rng.integers(-1, 2, (b, a)).astype(np.float32), rng.integers(-2, 3, b).astype(np.float32), relu
            )
        weight = rng.standard_normal((b, a)) * np.sqrt(2 / a)
        return Layer(weight.astype(np.float32), rng.standard_normal(b).astype(np.float32) * 0.1, relu)

    parts: dict[str, Any] = {}
    for branch in BRANCHES:
        w = widths[branch]
        last = len(w) - 2
        parts[branch] = tuple(layer(w[i], w[i + 1], branch != "mixer" or i != last) for i in range(last + 1))
    d_old, d_side, d_new = widths["old"][0], widths["side"][0], widths["mixer"][-1]
    return Transformation(
        **parts,
        old_space=EmbeddingSpace("old", d_old),
        new_space=EmbeddingSpace("new", d_new),
        side_model="side",
        skip=layer(d_old + d_side, d_new, False) if skip else None,
        **more,
    )


def emulate(old: Any, side: Any, h: Transformation, fine: str) -> Any:
    """The int8 plan in numpy, integers in int64: what every instruction set must compute, up to fp32 epilogues."""
    plans = layer_plans(h, "int8", fine=fine)

    def chain(x: Any, layers: Any) -> Any:
        for plan in layers:
            if plan.precision in ("fp32", "bf16"):
                weight = ref_bf16(plan.weight) if plan.precision == "bf16" else plan.weight
                x = (ref_bf16(x) if plan.precision == "bf16" else x) @ weight.astype(np.float64).T + plan.bias
            else:
                least, most = (0, 255) if plan.precision == "int8" else (-4095, 4095)
                q = np.clip(np.rint(x * plan.in_mul.astype(np.float64) + plan.in_add), least, most)
                sums = q @ plan.weight.astype(np.float64).T
                assert np.abs(sums).max() < 2**31  # or int32 would not hold them
                x = sums * plan.scale + plan.bias
            if plan.relu:
                x = np.maximum(x, 0)
        return x

    joined = np.concatenate([chain(old, plans["old"]), chain(side, plans["side"])], axis=1)
    out = chain(joined, plans["mixer"])
    if h.skip is not None:
        out = out + chain(np.concatenate([old, side], axis=1) if h.uses_side_info else old, plans["skip"])
    if h.normalise:
        out = h.length * out / np.linalg.norm(out, axis=1, keepdims=True)
    return out


def ref_bf16(x: Any) -> Any:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(np.float64)


def worst(got: Any, want: Any) -> float:
    return float(np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-30))


def rounding_variance(old: Any, side: Any, h: Transformation, unit: float) -> Any:
    """What independent roundings of every product, sum and activation to ``unit`` add up to, element by element.

    Relative to the terms of a sum, not to the sum: where terms cancel, any order of adding is that far off.
    """

    def chain(x: Any, variance: Any, layers: Any) -> Any:
        for layer in layers:
            w2 = layer.weight.astype(np.float64) ** 2
            z = x @ layer.weight.astype(np.float64).T + layer.bias
            # Both factors of a product are rounded; then every one of d_in + 1 partial sums, in fp32.
            sums = (x**2) @ w2.T + z**2 + layer.bias.astype(np.float64) ** 2
            variance = variance @ w2.T + (2 * unit**2 + (w2.shape[1] + 1) * 2.0**-48) * sums
            x = np.maximum(z, 0) if layer.relu else z
        return x, variance

    (x, vx), (y, vy) = (chain(v.astype(np.float64), np.zeros(v.shape), c) for v, c in ((old, h.old), (side, h.side)))
    z, variance = chain(np.concatenate([x, y], 1), np.concatenate([vx, vy], 1), h.mixer)
    if h.skip is not None:
        rows = np.concatenate([old, side], 1).astype(np.float64)
        added, of_skip = chain(rows, np.zeros(rows.shape), (h.skip,))
        z, variance = z + added, variance + of_skip + (2.0**-24 * (z + added)) ** 2
    if h.normalise:
        length2 = np.sum(z**2, axis=1, keepdims=True)
        variance = variance / length2 + np.sum(variance * z**2, axis=1, keepdims=True) * z**2 / length2**3
        variance = variance + (4 * 2.0**-24) ** 2
    return variance


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25)
@given(
    n=st.integers(1, 40),
    old=st.lists(st.integers(1, 70), min_size=2, max_size=3),
    side=st.lists(st.integers(1, 70), min_size=2, max_size=3),
    mixer=st.lists(st.integers(1, 97), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    threads=st.integers(1, 3),
    skip=st.booleans(),
)
def test_integers_are_exact_in_fp32_and_bf16(
    isa: str, n: int, old: list[int], side: list[int], mixer: list[int], seed: int, threads: int, skip: bool
) -> None:
    """Sums of small whole numbers have one right answer; two hidden layers stay within bf16's 8 bits."""
    rng = np.random.default_rng(seed)
    h = chains(
        rng, {"old": old[:2], "side": side[:2], "mixer": [old[1] + side[1], mixer[-1]]}, integers=True, skip=skip
    )
    a = (rng.integers(0, 8, (n, h.d_old)) == 0).astype(np.float32)
    b = (rng.integers(0, 8, (n, h.d_side)) == 0).astype(np.float32)
    want = ref.transform(a, b, h)
    for precision in ("fp32", "bf16"):
        np.testing.assert_array_equal(run(a, b, h, isa, precision, threads=threads), want)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=20)
@given(
    n=st.integers(1, 40),
    old=st.lists(st.integers(1, 97), min_size=2, max_size=4),
    side=st.lists(st.integers(1, 97), min_size=2, max_size=4),
    mixer=st.lists(st.integers(1, 131), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    normalise=st.booleans(),
    skip=st.booleans(),
)
def test_any_shape_is_as_exact_as_torch(
    isa: str, n: int, old: list[int], side: list[int], mixer: list[int], seed: int, normalise: bool, skip: bool
) -> None:
    rng = np.random.default_rng(seed)
    h = chains(rng, {"old": old, "side": side, "mixer": [old[-1] + side[-1], *mixer]}, normalise=normalise, skip=skip)
    a = rng.standard_normal((n, h.d_old), dtype=np.float32)
    b = rng.standard_normal((n, h.d_side), dtype=np.float32)
    want = ref.transform(a, b, h)
    for precision, unit in (("fp32", 2**-24), ("bf16", 2**-9)):
        got = run(a, b, h, isa, precision)
        assert np.sum((got - want) ** 2) <= 4**2 * np.sum(rounding_variance(a, b, h, unit))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dims", [(1, 1, 1, 1), (17, 5, 97, 129), (64, 31, 33, 200)])
def test_int8_computes_its_plan(isa: str, dims: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    h = fct.Transformation.random(*dims[:3], inner=dims[3])
    a = rng.standard_normal((33, dims[0]), dtype=np.float32)
    b = rng.standard_normal((33, dims[1]), dtype=np.float32)
    h = calibrate(h, a, b)
    want = emulate(a, b, h, "bf16" if isa == "avx512-bf16" else "fp32")
    got = run(a, b, h, isa, "int8")
    # A value at the middle between two steps may round either way in fp32: a few in a thousand, one step each.
    assert worst(got, want) < 5e-3
    assert worst(got, ref.transform(a, b, h)) < 0.06


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25)
@given(
    n=st.integers(1, 40),
    dims=st.tuples(*[st.integers(1, 150)] * 3),
    branch=st.integers(1, 70),
    inner=st.integers(1, 97),
    blocks=st.integers(0, 2),
    side_info=st.booleans(),
    length=st.sampled_from([0.0, 1.0, 0.87]),
    shift=st.sampled_from([0.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_small_shapes_with_a_skip_compute_their_plan(
    isa: str,
    n: int,
    dims: tuple[int, int, int],
    branch: int,
    inner: int,
    blocks: int,
    side_info: bool,
    length: float,
    shift: float,
    seed: int,
) -> None:
    """int8 with rows in int16, wherever they lie: within what rounding explains, and the plan to its last step."""
    rng = np.random.default_rng(seed)
    d_side = dims[1] if side_info else dims[0]
    h = fct.Transformation.random(
        dims[0], d_side, dims[2], branch=branch, inner=inner, blocks=blocks, skip=True, side_info=side_info
    )
    h = h.with_(normalise=length > 0, length=length or 1.0)
    a = rng.standard_normal((n + 60, dims[0]), dtype=np.float32) + np.float32(shift)
    b = rng.standard_normal((n + 60, d_side), dtype=np.float32) - np.float32(shift) if side_info else None
    h = calibrate(h, a, b)
    a, b = a[:n], None if b is None else b[:n]
    plans = layer_plans(h, "int8")
    assert {plans[name][0].precision for name in ("old", "side", "skip")} == {"int16"}
    got = run(a, b, h, isa, "int8")
    side = a if b is None else b
    want = emulate(a, side, h, "fp32")
    assert np.max(np.abs(got - want)) < 0.2 * (np.sqrt(np.mean(want**2)) + 1e-3)
    assert deviation(got, ref.transform(a, b, h), a, side, h, "int8", "cpu") <= SIGMAS


def test_weights_whose_int16_sums_could_overflow_are_refused() -> None:
    values = np.full((1, 17), 32767, np.int16)
    one, zero = np.ones(17, np.float32), np.zeros(17, np.float32)
    first = (values.ctypes.data, *(x.ctypes.data for x in (one, zero, one, zero)), 17, 1, True, 3)
    plain = np.ones((1, 2), np.float32)
    last = (plain.ctypes.data, 0, zero.ctypes.data, 0, 0, 2, 1, False, 0)
    with pytest.raises(ValueError, match="expected weights whose products fit int32, got an output whose 17 weights"):
        _C.PackedTransform([first], [first], [last], [], True, 0.0, 0)  # type: ignore[list-item]  # a layer as its fields


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("small", [False, True])
def test_bits_do_not_depend_on_threads_or_batch(
    isa: str, precision: str, small: bool, rng: np.random.Generator
) -> None:
    shape: dict[str, Any] = {"branch": 70, "blocks": 1, "skip": True, "normalise": True} if small else {}
    h = fct.Transformation.random(23, 40, 50, inner=600, **shape)
    a = rng.standard_normal((259, 23), dtype=np.float32)
    b = rng.standard_normal((259, 40), dtype=np.float32)
    h = calibrate(h, a, b)
    whole = run(a, b, h, isa, precision, threads=1)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(run(a, b, h, isa, precision, threads=threads), whole)
    parts = ((0, 1), (3, 2), (9, 3), (11, 5), (20, 8), (31, 13), (40, 14), (50, 15), (100, 113), (9, 64), (258, 1))
    for start, count in parts:
        part = slice(start, start + count)
        for threads in (1, 2, 5):
            np.testing.assert_array_equal(run(a[part], b[part], h, isa, precision, threads=threads), whole[part])


@pytest.mark.parametrize("isa", ISAS)
def test_dtypes_scales_and_strides(isa: str, rng: np.random.Generator) -> None:
    import torch

    h = fct.Transformation.random(19, 11, 21, inner=40)
    wide = rng.standard_normal((25, 64), dtype=np.float32)
    a, b = wide[:, 3:22], wide[:, 40:51]  # rows apart, starts off any vector's boundary
    plain = run(np.ascontiguousarray(a), np.ascontiguousarray(b), h, isa, "fp32")
    np.testing.assert_array_equal(run(a, b, h, isa, "fp32"), plain)
    f16 = a.astype(np.float16)
    np.testing.assert_array_equal(
        run(f16, b, h, isa, "fp32"), run(f16.astype(np.float32), np.ascontiguousarray(b), h, isa, "fp32")
    )
    bf16 = torch.from_numpy(a.copy()).bfloat16()
    np.testing.assert_array_equal(
        run(bf16, torch.from_numpy(b.copy()), h, isa, "fp32").numpy(), run(bf16.float().numpy(), b, h, isa, "fp32")
    )
    values = rng.integers(-127, 128, (25, 19)).astype(np.int8)
    for scale in (np.float32(0.02), rng.random(25, np.float32) + 0.01, rng.random((1, 19), np.float32) + 0.01):
        rows = scale[:, None] if np.ndim(scale) == 1 else scale
        want = run(values * np.asarray(rows, np.float32), b, h, isa, "fp32")
        np.testing.assert_array_equal(run(fct.ScaledInt8(values, scale), b, h, isa, "fp32"), want)
    out16 = np.zeros((25, 40), np.float16)
    run(a, b, h, isa, "fp32", out=out16[:, 5:26])
    np.testing.assert_array_equal(out16[:, 5:26], plain.astype(np.float16))
    assert not out16[:, :5].any()
    assert not out16[:, 26:].any()
    outb = torch.zeros(25, 21, dtype=torch.bfloat16)
    run(torch.from_numpy(a.copy()), torch.from_numpy(b.copy()), h, isa, "fp32", out=outb)
    assert torch.equal(outb, torch.from_numpy(plain).bfloat16())
    for scale in (0.05, rng.random(25, np.float32) + 0.01, rng.random((1, 21), np.float32) + 0.01):
        rows = scale[:, None] if isinstance(scale, np.ndarray) and scale.ndim == 1 else scale
        out8 = fct.ScaledInt8(np.zeros((25, 21), np.int8), scale)
        run(a, b, h, isa, "fp32", out=out8)
        want8 = np.clip(np.rint(plain / np.asarray(rows, np.float32)), -127, 127).astype(np.int8)
        np.testing.assert_array_equal(out8.values, want8)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=50)
@given(
    n=st.integers(1, 40),
    dims=st.tuples(*[st.integers(1, 70)] * 3),
    inner=st.integers(1, 97),
    skip=st.booleans(),
    precision=st.sampled_from(["fp32", "bf16", "int8"]),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    starts=st.tuples(*[st.integers(0, 67)] * 3),
    gaps=st.tuples(*[st.integers(0, 5)] * 3),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_dtypes_and_where_rows_lie_change_no_bit(
    isa: str,
    n: int,
    dims: tuple[int, int, int],
    inner: int,
    skip: bool,
    precision: str,
    dtypes: tuple[str, str, str],
    starts: tuple[int, int, int],
    gaps: tuple[int, int, int],
    threads: int,
    seed: int,
) -> None:
    """Every precision with every dtype and scale layout of both inputs and the output, drawn one by one, at any byte
    and row distance: the bits of the same rows as plain float32, rounded once; nothing written between rows.

    The plain float32 call is held against float64 in the tests above; the int8 plan here, against its emulation.
    """
    rng = np.random.default_rng(seed)
    h = fct.Transformation.random(*dims, inner=inner, skip=skip)
    if precision == "int8":
        h = calibrate(h, *(rng.standard_normal((64, d), dtype=np.float32) for d in dims[:2]))
    inputs, plain = [], []
    for d, dtype, start, gap in zip(dims[:2], dtypes[:2], starts[:2], gaps[:2], strict=True):
        x = rng.standard_normal((n, d), dtype=np.float32)
        scale = scales(x.shape, dtype, rng)
        values = narrow(x, dtype, scale)
        inputs.append(wrapped(placed(values, start, gap), dtype, scale))
        plain.append(np.ascontiguousarray(rows_of(wrapped(values, dtype, scale), "x").float32()))
    exact = run(plain[0], plain[1], h, isa, precision, threads=threads)
    if precision == "int8":
        want = emulate(plain[0], plain[1], h, "bf16" if isa == "avx512-bf16" else "fp32")
        assert np.max(np.abs(exact - want)) < 0.2 * (np.sqrt(np.mean(want**2)) + 1e-3)
    scale = scales(exact.shape, dtypes[2], rng)
    rounded = narrow(exact, dtypes[2], scale)
    # A buffer that is off its values' boundary is taken where its rows follow one another.
    out = placed(np.zeros_like(rounded), starts[2], gaps[2] if starts[2] % rounded.itemsize == 0 else 0)
    run(inputs[0], inputs[1], h, isa, precision, out=wrapped(out, dtypes[2], scale), threads=threads)
    np.testing.assert_array_equal(out, rounded)
    memory = np.frombuffer(out.base, np.uint8).copy()
    np.ndarray(out.shape, out.dtype, buffer=memory, offset=starts[2], strides=out.strides)[:] = 0
    assert not memory.any()  # nothing before the first row, between rows or behind the last


@pytest.mark.parametrize("isa", ISAS)
def test_every_half_converts(isa: str) -> None:
    """All 63,488 finite float16 in and out through the identity."""
    eye = Layer(np.eye(1, dtype=np.float32), np.zeros(1, np.float32), False)
    h = Transformation(
        old=(eye,), side=(eye,), mixer=(Layer(np.array([[1.0, 0.0]], np.float32), np.zeros(1, np.float32), False),),
        old_space=EmbeddingSpace("o", 1), new_space=EmbeddingSpace("n", 1), side_model="s",
    )  # fmt: skip
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)][:, None]
    zeros = np.zeros_like(every)
    np.testing.assert_array_equal(run(every, zeros, h, isa, "fp32"), every.astype(np.float32))
    out = np.ones_like(every)
    run(every, zeros, h, isa, "fp32", out=out)
    np.testing.assert_array_equal(out, every)
    between = (every[:-1].astype(np.float32) + every[1:].astype(np.float32)) / 2
    big = np.array([[65519.9], [65520.0], [1e30], [-1e30], [1e-8], [3e-8]], np.float32)
    x = np.concatenate([between, big]).astype(np.float32)
    out = np.ones(x.shape, np.float16)
    with using_isa(isa):  # which leaves values beyond the dtype infinite
        transform_finite(
            x, np.zeros_like(x), h, out=out, precision="fp32", device="cpu", backend="cpu", threads=None
        )  # fmt: skip
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out, x.astype(np.float16))


def test_no_read_past_the_last_row() -> None:
    """Rows that end where the mapped memory ends: a read of one byte more would be the end of the process."""
    code = """
import ctypes, mmap, sys
import numpy as np
import fct
from fct import _C
from fct.fit.precision_choice import calibrate
from fct.ops.isa import using_isa
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
page = mmap.PAGESIZE
def guarded(n, d, dtype):
    size = n * d * np.dtype(dtype).itemsize
    pages = -(-size // page)
    area = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert libc.mprotect(start + pages * page, page, 0) == 0
    return np.frombuffer(area, dtype, n * d, pages * page - size).reshape(n, d)
rng = np.random.default_rng(0)
for d_old, d_side, d_new, inner, skip in ((7, 3, 5, 9, False), (64, 33, 31, 40, True), (300, 33, 31, 40, False)):
    h = fct.Transformation.random(d_old, d_side, d_new, inner=inner, skip=skip)
    x = rng.standard_normal((50, d_old), dtype=np.float32), rng.standard_normal((50, d_side), dtype=np.float32)
    h = calibrate(h, *x)
    for isa in _C.isa_names[: _C.detected_isa() + 1]:
        for precision in ("fp32", "bf16", "int8"):
            for n in (1, 3, 15, 29):
                for dtype in (np.float32, np.float16):
                    old, side, out = guarded(n, d_old, dtype), guarded(n, d_side, dtype), guarded(n, d_new, dtype)
                    old[:] = x[0][:n]; side[:] = x[1][:n]
                    with using_isa(isa):
                        fct.transform_batch(old, side, h, out=out, precision=precision, backend="cpu")
print("survived")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "survived", (done.returncode, done.stderr[-2000:])


def test_ctrl_c_stops_a_long_call_within_a_second() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without it
    h = fct.Transformation.random(128, 128, 128)
    x = np.zeros((400_000, 128), np.float32)
    out = np.empty_like(x)
    fct.transform_batch(x[:100], x[:100], h, precision="fp32", backend="cpu")  # packed
    sent = []

    def press() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.5, press)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        fct.transform_batch(x, x, h, out=out, precision="fp32", backend="cpu", threads=2)
    assert time.monotonic() - sent[0] < 1.0
    timer.join()
    signal.signal(signal.SIGINT, before)
    got = fct.transform_batch(x[:3], x[:3], h, precision="fp32", backend="cpu")  # and all works on
    np.testing.assert_allclose(got, ref.transform(x[:3], x[:3], h), rtol=1e-3, atol=1e-4)


def test_a_forked_child_and_several_callers_at_once(rng: np.random.Generator) -> None:
    h = fct.Transformation.random(16, 16, 16, inner=200)
    x = rng.standard_normal((2000, 16), dtype=np.float32)
    want = fct.transform_batch(x, x, h, precision="fp32", backend="cpu", threads=3)
    child = os.fork()
    if child == 0:
        same = (fct.transform_batch(x, x, h, precision="fp32", backend="cpu", threads=3) == want).all()
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    results: list[Any] = []

    def call() -> None:
        for _ in range(5):
            results.append(fct.transform_batch(x, x, h, precision="fp32", backend="cpu", threads=2))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 20
    for got in results:
        np.testing.assert_array_equal(got, want)


def test_a_wrong_answer_would_be_seen(rng: np.random.Generator) -> None:
    """The measure itself: rows swapped, a column shifted, one value off must all exceed what the tests allow."""
    h = fct.Transformation.random(20, 20, 20, inner=30)
    x = rng.standard_normal((20, 20), dtype=np.float32)
    want = ref.transform(x, x, h)
    off = want.copy()
    off[3, 4] += 1
    for bad in (want[::-1], np.roll(want, 1, axis=1), off):
        assert worst(bad, want) > 1e-2


def test_int8_says_what_it_lacks() -> None:
    h = fct.Transformation.random(4, 4, 4, inner=4)
    with pytest.raises(fct.FctError, match=r"no activation ranges for old\.0"):
        fct.transform_batch(
            np.ones((1, 4), np.float32), np.ones((1, 4), np.float32), h, precision="int8", backend="cpu"
        )


def test_an_unknown_level_is_refused() -> None:
    h = fct.Transformation.random(4, 4, 4, inner=4)
    with pytest.raises(ValueError, match="FCT_ISA: expected one of portable"):
        run(np.ones((1, 4), np.float32), np.ones((1, 4), np.float32), h, "mmx", "fp32")


def test_the_environment_chooses_the_level_of_a_process() -> None:
    code = "from fct import _C; from fct.ops.isa import isa; print(_C.isa_names[isa()])"
    for wanted, seen in (("portable", "portable"), ("", ISAS[-1])):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "FCT_ISA": wanted}
        )
        assert done.stdout.strip() == seen, done.stderr


def test_threads_that_ask_at_once_pack_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = cpu_backend.Packed

    def slow(*args: Any) -> Any:
        made.append(args)
        time.sleep(0.05)
        return real(*args)

    monkeypatch.setattr(cpu_backend, "Packed", slow)
    h = fct.Transformation.random(8, 8, 8, inner=16, side_info=False)
    x = np.ones((3, 8), np.float32)
    callers = [threading.Thread(target=lambda: fct.transform_batch(x, None, h, backend="cpu")) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(made) == 1
