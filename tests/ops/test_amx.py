"""The choice between our kernels and torch's on a processor with AMX, which this one need not have."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

import fct
from fct import _C
from fct.ops.device import amx
from fct.ops.registry import pick_transform
from fct.ops.transform.torch_backend import TorchTransform


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "_measured", {})
    monkeypatch.delenv("FCT_BACKEND", raising=False)


def slow_down(monkeypatch: pytest.MonkeyPatch, backend: Any) -> list[int]:
    calls: list[int] = []
    run = backend.run

    def slowly(self: Any, packed: Any, old: Any, side: Any, out: Any, *, threads: int) -> None:
        calls.append(out.n)
        time.sleep(0.4)  # longer than the other takes on a busy machine
        run(self, packed, old, side, out, threads=threads)

    monkeypatch.setattr(backend, "run", slowly)
    return calls


def test_who_is_faster_is_measured_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    from fct.ops.transform.cpu_backend import CpuTransform

    monkeypatch.setattr(_C, "has_amx_bf16", lambda: True)
    h = fct.Transformation.random(8, 8, 8, inner=16)
    calls = slow_down(monkeypatch, CpuTransform)
    assert [b.name for b, p in [pick_transform(h, "bf16", "cpu")]] == ["torch"]
    measured = len(calls)
    assert measured > 0
    again = fct.Transformation.random(8, 8, 8, inner=16, seed=1)
    backend, precision = pick_transform(again, "bf16", "cpu")
    assert (backend.name, precision, len(calls)) == ("torch", "bf16", measured)
    rows = np.ones((3, 8), np.float32)
    np.testing.assert_allclose(
        fct.transform_batch(rows, rows, h, precision="bf16"),
        fct.transform_batch(rows, rows, h, precision="bf16", backend="torch"),
        atol=0,
    )


def test_ours_where_it_is_faster_forced_or_asked_for_another_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    from fct.ops.transform.cpu_backend import CpuTransform

    monkeypatch.setattr(_C, "has_amx_bf16", lambda: True)
    h = fct.Transformation.random(8, 8, 8, inner=16)
    slow_down(monkeypatch, TorchTransform)
    assert pick_transform(h, "bf16", "cpu")[0].name == "cpu"
    slow_down(monkeypatch, CpuTransform)
    assert pick_transform(h, "fp32", "cpu")[0].name == "cpu"
    assert pick_transform(h, "bf16", "cpu", "cpu")[0].name == "cpu"
    assert pick_transform(h, "auto", "cpu")[1] == "fp32"  # nothing measured, so bf16 is not allowed


def test_nothing_is_measured_without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "has_amx_bf16", lambda: False)
    monkeypatch.setattr(amx, "_seconds", lambda *_: pytest.fail("measured without AMX"))
    h = fct.Transformation.random(8, 8, 8, inner=16)
    assert pick_transform(h, "bf16", "cpu")[0].name == "cpu"
