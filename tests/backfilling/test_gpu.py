"""A backfill through a GPU that dies in the middle: no success, what was proven stays, a resumed run ends the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_device import FakeDevice

import fct
from fct import ref
from fct.errors import DeviceLostError
from fct.ops import proof as selfproof
from fct.ops.device import state as device_module
from fct.ops.device import streaming
from fct.ops.transform import triton_backend as backend
from tests.backfilling.conftest import QUICK, contents

GPU: dict[str, Any] = {**QUICK, "device": "cuda:0", "backend": "triton", "precision": "fp32"}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDevice:
    device = FakeDevice(seed=5)
    for module in (backend, streaming, device_module):
        monkeypatch.setattr(module, "device_of", lambda name: device)
    monkeypatch.setattr(backend, "why_no_gpu", lambda name: ["cuda:0 failed earlier"] if device_module._lost else [])
    monkeypatch.setattr(device_module, "_lost", set())
    monkeypatch.setattr(selfproof, "_known", {})
    monkeypatch.setattr(selfproof, "ROWS", (3,))
    monkeypatch.setenv("FCT_CACHE", str(tmp_path / "cache"))
    return device


def test_device_lost_in_the_middle_then_resumed(
    fake: FakeDevice, gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path
) -> None:
    source = gallery(900)
    whole = fct.backfill(source, tmp_path / "undisturbed", h, **GPU)
    assert whole.rows_out == 900
    table = pq.read_table(source / "part-2.parquet")
    files = sorted((tmp_path / "undisturbed").glob("part-*.parquet"))
    got = np.concatenate([np.stack(pq.read_table(f)["old"].to_pylist()) for f in files]).astype(np.float32)
    assert got.shape == (900, h.d_new)
    first = ref.transform(np.stack(table["old"].to_pylist()), np.stack(table["side"].to_pylist()), h)
    np.testing.assert_allclose(got[: len(table)], first, rtol=1e-4, atol=1e-4)

    fake.fail_at = len(fake.launches) + 24  # four launches a batch, three batches a shard
    with pytest.raises(DeviceLostError, match=r"cuda:0 .* failed during rows .* illegal memory access"):
        fct.backfill(source, tmp_path / "new", h, **GPU)
    proven = sorted((tmp_path / "new").rglob("done/*"))
    assert 0 < len(proven) < len(sorted((tmp_path / "undisturbed").rglob("done/*")))
    kept = {f: f.read_bytes() for f in proven}
    with pytest.raises(fct.errors.BackendError, match="failed earlier"):  # the process does not touch the device again
        fct.backfill(source, tmp_path / "new", h, **GPU)

    device_module._lost.clear()  # a new process
    fake.fail_at = None
    for stream in fake.streams:
        stream.queue.clear()
    report = fct.backfill(source, tmp_path / "new", h, **GPU)
    assert report.rows_out == 900
    assert all(f.read_bytes() == was for f, was in kept.items())
    assert contents(tmp_path / "new") == contents(tmp_path / "undisturbed")
