"""Fitting h: the paper's recipe against a plain torch loop, epoch by epoch; and our default against the paper's.

Pairs made from one latent vector: old and side-information each see a part of it, new sees all.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fct
from fct.bench.measure import interleave, timing_fields
from fct.fit.auto_plan import plan_fit
from fct.fit.module import TransformationModule
from fct.fit.pair_training import PairTraining, scalings_of
from fct.fit.pairs import check_pairs
from fct.fit.precision_choice import calibrate
from fct.fit.recipes import FitConfig, paper_config
from fct.fit.transformation_fit import fit_transformation

N, HELD, DIM = 20_000, 2_000, 128


def make_pairs(n: int, deviation: float, seed: int = 0, dims: tuple[int, int] = (DIM, DIM)) -> list[Any]:
    """old of dims[0], side-information of DIM and new of dims[1], of one spread."""
    rng = np.random.default_rng(seed)

    def network(d_in: int, d_out: int) -> Callable[[Any], Any]:
        first = rng.standard_normal((d_in, 256)) / np.sqrt(d_in)
        second = rng.standard_normal((256, d_out)) / 16
        return lambda z: np.maximum(z @ first, 0) @ second

    z = rng.standard_normal((n, 64))
    noise = [0.02 * rng.standard_normal((n, d)) for d in (dims[0], DIM)]
    arrays = [
        network(40, dims[0])(z[:, :40]) + noise[0],
        network(40, DIM)(z[:, 24:]) + noise[1],
        network(64, dims[1])(z),
    ]
    unit = [a - a.mean(0) for a in arrays]
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in unit]
    return [(a / a.std() * deviation).astype(np.float32) for a in unit]


def plain_epoch(module: Any, optimiser: Any, data: tuple[torch.Tensor, ...], batch: int) -> None:
    """The loop anybody would write, on tensors that are already there."""
    old, side, new = data
    module.train()
    for index in torch.randperm(len(old)).split(batch):
        loss = torch.nn.functional.mse_loss(module(old[index], side[index]), new[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize("rows", [N])
def test_epoch(rows: int, record: Callable[..., None], threads: int) -> None:
    pairs = check_pairs(*make_pairs(rows, 1.0))
    held = pairs.sample(512, 0)
    data = pairs.loaded()
    cpu = torch.device("cpu")
    plan = plan_fit(rows, (DIM, DIM, DIM), two_inputs=True, own_validation=True, seconds=None)

    def training(config: FitConfig) -> PairTraining:
        return PairTraining(pairs, held, config, 0, cpu, scalings_of(pairs, config.standardise, 0))

    fits = {
        "fct, paper recipe (fp32)": training(replace(paper_config(), freeze_norm_at=1.0)),
        **{f"fct, auto's shape {c.branch}, {c.inner}": training(c) for c in plan.rungs},
    }
    # Peers: torch's own Adam at its best setting (fused), fp32 and bf16 autocast.
    tensors = tuple(torch.from_numpy(a) for a in data)
    plain = TransformationModule(DIM, DIM, DIM, paper_config())
    adam = torch.optim.Adam(plain.parameters(), lr=5e-4, weight_decay=3e-5, fused=True)
    calls: dict[str, Callable[[], Any]] = {name: fit.one_epoch for name, fit in fits.items()}
    calls["plain torch loop (fp32)"] = lambda: plain_epoch(plain, adam, tensors, 1024)
    before = [p.clone() for p in plain.parameters()]
    timings = interleave(calls, rounds=3, seconds=1)
    assert any(not torch.equal(a, b) for a, b in zip(before, plain.parameters(), strict=True))
    flop = 3 * 2 * sum(p.numel() for p in plain.parameters() if p.ndim == 2) * rows  # forward, and twice backward
    base = timings["plain torch loop (fp32)"].median
    for name, timing in timings.items():
        fields = timing_fields(timing, rows=rows, flop=flop)
        record("fit, one epoch", what=name, rows=rows, threads=threads, against_plain=base / timing.median, **fields)


@pytest.mark.parametrize("deviation", [1.0, 0.05])
def test_recipes(deviation: float, record: Callable[..., None], threads: int, full: bool) -> None:
    """The paper's 80 epochs with --full; otherwise 8 of them, enough to see where it stands after auto's whole time."""
    old, side, new = make_pairs(N + HELD, deviation)
    held = (old[N:], side[N:], new[N:])
    paper = paper_config() if full else replace(paper_config(), epochs=8)
    for name, config in (("auto", "auto"), (f"paper, {paper.epochs} epochs", paper)):
        begun = time.perf_counter()
        reached: list[float] = []
        h = fit_transformation(
            old[:N],
            side[:N],
            new[:N],
            validation=held,
            config=config,
            progress=False,
            on_epoch=lambda r, seen=reached, start=begun: seen.append(time.perf_counter() - start),  # type: ignore[misc]
        )
        share = h.info["validation"]["mse"] / deviation**2
        fields = {"validation_mse": share, "r2": h.info["validation"]["r2"], "s": reached[-1]}
        record("fit, recipes", what=name, deviation=deviation, rows=N, threads=threads, **fields)
        assert np.isfinite(share)


# In a process of its own. Memory is what comes on top of a fit of 4,500 such pairs: the pairs themselves and all that
# grows with them, not torch and its libraries.
FIT = """
import json, os, sys, time
import numpy as np, torch
import fct
from fct.baselines import fit_ridge
from fct.fit.neighbours import NeighbourTest
folder = sys.argv[1]
torch.set_num_threads(int(sys.argv[2]))
def load(part, most=None):
    files = [f"{folder}/{part}-{name}.npy" for name in ("old", "side", "new")]
    return [np.load(f, mmap_mode="r")[:most].copy() if os.path.exists(f) else None for f in files]
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
fct.fit_transformation(*load("train", 4_500), seconds=1, progress=False)
before = peak()
pairs = load("train")
begun = time.perf_counter()
h = fct.fit_transformation(*pairs, progress=False)
seconds, after = time.perf_counter() - begun, peak()
h.save(folder + "/h.safetensors")
old, side, new = load("test")
queries = NeighbourTest.of(new, "l2", normalise=False)
def found(h, side):
    return queries.recall(fct.transform_batch(old, side, h, precision="fp32", progress=False))
print(json.dumps({"s": seconds, "recall_at_10": found(h, side), "mflop": h.flop_per_row / 1e6,
    "ridge_recall_at_10": found(fit_ridge(pairs[0], pairs[2]), None),
    "file_mb": os.path.getsize(folder + "/h.safetensors") / 1e6,
    "memory_mb": (after - before) / 1e6, "peak_mb": after / 1e6,
    "pairs_mb": sum(x.nbytes for x in pairs if x is not None) / 1e6}))
"""


def speed_beside_paper(h: fct.Transformation, old: Any, side: Any, threads: int) -> dict[str, float]:
    """Rows a second in int8 of the fitted h, and how many times those of the paper's h of the same dimensions."""
    given = side if h.uses_side_info else None
    paper = fct.Transformation.random(h.d_old, h.d_side, h.d_new, side_info=h.uses_side_info)
    both = {"fct": h, "paper": calibrate(paper, old, given)}
    calls: dict[str, Callable[[], Any]] = {
        name: functools.partial(fct.transform_batch, old, given, one, precision="int8", threads=threads, progress=False)
        for name, one in both.items()
    }
    timings = interleave(calls)
    seconds = timings["fct"].median
    return {"rows_per_s": len(old) / seconds, "against_paper": timings["paper"].median / seconds}


@pytest.mark.parametrize(("rows", "dims"), [(100_000, (128, 128)), (5_000, (1536, 3072)), (20_000, (1536, 3072))])
def test_sizes(rows: int, dims: tuple[int, int], tmp_path: Path, record: Callable[..., None], threads: int) -> None:
    """``config="auto"`` as a user calls it: seconds, peak memory, the artifact's size, and ridge beside it."""
    old, side, new = make_pairs(rows + HELD, 1.0, dims=dims)
    parts = {"train": slice(rows), "test": slice(rows, None)}
    with_side = {"side": side} if dims[0] == DIM else {}
    for part, chosen in parts.items():
        for name, x in {"old": old, "new": new, **with_side}.items():
            np.save(tmp_path / f"{part}-{name}.npy", x[chosen])
    done = subprocess.run(
        [sys.executable, "-c", FIT, str(tmp_path), str(threads)], check=True, capture_output=True, text=True
    )
    fields = json.loads(done.stdout)
    assert fields["recall_at_10"] >= fields["ridge_recall_at_10"]
    fields |= speed_beside_paper(
        fct.Transformation.load(tmp_path / "h.safetensors"), old[:4_096], side[:4_096], threads
    )
    record("fit, sizes", what=f"{dims[0]} to {dims[1]}", rows=rows, threads=threads, **fields)
