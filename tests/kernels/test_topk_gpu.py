"""The way of a GPU search through proof and dispatch, on the emulated kernels."""

from __future__ import annotations

from typing import Any

import cuda_support as support
import numpy as np
import pytest
import torch

from fct import ref
from fct.arrays import Rows
from fct.errors import BackendError, FctWarning
from fct.ops import device, selfproof, topk_gpu
from fct.ops.cuda import CudaSearch


class Place:
    model, driver = "emulated", "none"

    def upload(self, x: Any) -> Any:
        return torch.from_numpy(x)

    def download(self, x: Any) -> Any:
        return x.numpy()

    def is_out_of_memory(self, error: BaseException) -> bool:
        return False

    is_lost = is_out_of_memory


@pytest.fixture
def search(monkeypatch: Any, tmp_path: Any) -> CudaSearch:
    made = CudaSearch(support.EmulatedRuntime())
    monkeypatch.setenv("FCT_CACHE", str(tmp_path))
    monkeypatch.delenv("FCT_BACKEND", raising=False)
    monkeypatch.setattr(selfproof, "_known", {})
    monkeypatch.setattr(device, "device_of", lambda name: Place())
    monkeypatch.setattr(topk_gpu, "cuda_search", lambda: made)
    return made


def sides() -> tuple[Rows, Rows]:
    rng = np.random.default_rng(3)

    def side(n: int) -> Rows:
        values = rng.integers(-3, 4, (n, 33)).astype(np.float32)
        return Rows(torch.from_numpy(values), "float32", None, "cuda:0", "torch")

    return side(5), side(301)


def same(found: Any, q: Rows, g: Rows) -> None:
    want = ref.topk(q.values.numpy(), g.values.numpy(), 9)
    assert (found[1].numpy() == want[1]).all()
    assert (found[0].numpy() == want[0]).all()


def test_the_kernels_answer_and_the_verdict_is_kept(search: CudaSearch, monkeypatch: Any) -> None:
    q, g = sides()
    monkeypatch.setattr(topk_gpu, "topk_blocked", None)  # torch is not asked
    same(topk_gpu.topk_gpu(q, g, 9, "l2", "auto", False), q, g)
    assert list(selfproof.read_verdicts().values()) == [""]


def test_a_search_that_disagrees_is_refused(search: CudaSearch, monkeypatch: Any) -> None:
    q, g = sides()
    right = search.search
    monkeypatch.setattr(search, "search", lambda *a, **k: (right(*a, **k)[0], right(*a, **k)[1].flip(1)))
    with pytest.warns(FctWarning, match="cuda search .bf16, l2. is refused"):
        same(topk_gpu.topk_gpu(q, g, 9, "l2", "auto", False), q, g)
    monkeypatch.setenv("FCT_BACKEND", "cuda")
    with pytest.raises(BackendError, match="refused by the self-proof"):
        topk_gpu.topk_gpu(q, g, 9, "l2", "auto", False)


def test_a_kernel_compiled_anew_is_proved_anew(search: CudaSearch, monkeypatch: Any) -> None:
    proofs: list[str] = []
    monkeypatch.setattr(selfproof, "_run_search", lambda *_: proofs.append("run") or "")
    for build, runs in (("one", 1), ("one", 1), ("two", 2)):
        monkeypatch.setattr(selfproof, "_build", lambda build=build: build)
        monkeypatch.setattr(selfproof, "_known", {})  # another process
        assert selfproof.prove_search(search, "l2", "bf16", "cuda:0") == ""
        assert len(proofs) == runs
