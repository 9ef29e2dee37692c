"""Measuring: the machine's own peaks, and calls timed turn by turn. Benchmarks and ``fct bench`` share it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fct import _C
from fct.native_codes import PRECISION_CODES
from fct.ops.backend import PRECISIONS
from fct.types import JsonDict

__all__ = ["SMALL_BATCH", "STATES", "Peaks", "Timing", "interleave", "measure_batch", "measure_peaks", "timing_fields"]

# How a batch was measured. Warm: called again and again, as a busy server calls. After a pause: each call after a rest,
# and after everybody else's calls: other weights are in the caches, threads asleep.
STATES = ("warm", "after a pause")
SMALL_BATCH = 64  # rows up to which the two differ by more than a few per cent
_PAUSE = 0.02  # seconds; longer than a peer's threads spin after a call


@dataclass(frozen=True)
class Peaks:
    """This machine's own limits, measured in this run by compiled loops.

    ops: operations a second on registers alone, by precision, at the best instruction set. by_isa: the same by
    (level, precision). memory: bytes a second read from memory; l3: from a 12 MB block.
    """

    ops: dict[str, float]
    by_isa: dict[tuple[str, str], float]
    memory: float
    l3: float
    threads: int


def measure_peaks(threads: int, seconds: float = 0.3, *, every_isa: bool = True) -> Peaks:
    """About ``seconds`` for each precision of the best instruction set, or of every one, and 1.3 for memory."""
    levels = range(0 if every_isa else _C.detected_isa(), _C.detected_isa() + 1)
    by_isa = {
        (_C.isa_names[isa], precision): _C.peak_ops(PRECISION_CODES[precision], isa, threads, seconds)
        for isa in levels
        for precision in PRECISIONS
    }
    best = _C.isa_names[_C.detected_isa()]
    return Peaks(
        ops={precision: by_isa[best, precision] for precision in PRECISIONS},
        by_isa=by_isa,
        memory=_C.read_bandwidth(1 << 30, threads, 1.0),
        l3=_C.read_bandwidth(12 << 20, threads, 0.3),
        threads=threads,
    )


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median and the quantiles around it."""

    median: float
    p20: float
    p80: float
    calls: int


def interleave(
    fns: dict[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    rounds: int = 5,
    most: int = 200,
    pause: float = 0.0,
    warm: bool = False,
) -> dict[str, Timing]:
    """Times every function turn by turn, so that all see the same machine; two warm-up calls each.

    Args:
        fns: name -> a call without arguments. Results must have been compared before.
        seconds: about how long each function is given.
        rounds, most: at least and at most so many turns.
        pause: seconds of rest before each call, for calls so short that another library's workers, which spin for
            some milliseconds after theirs, would be measured.
        warm: every function has been called already, and just ``rounds`` turns are wanted.
    """
    slowest = seconds if warm else 0.0
    for fn in () if warm else fns.values():
        fn()
        start = time.perf_counter()
        fn()
        slowest = max(slowest, time.perf_counter() - start)
    turns = int(min(most, max(rounds, seconds / max(slowest, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in fns}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(turns):
            for name, fn in fns.items():
                if pause:
                    time.sleep(pause)
                times[name].append(_spent(fn))
    finally:
        if enabled:
            gc.enable()
    return {name: _timing(spent) for name, spent in times.items()}


def measure_batch(
    fns: dict[str, Callable[[], object]], rows: int, *, seconds: float = 1.0, rounds: int = 3
) -> dict[str, dict[str, Timing]]:
    """State -> name -> what a batch of ``rows`` rows takes: the one measurement that every table reads.

    Args:
        fns: name -> a call without arguments. Results must have been compared before.
        rows: of the batch; above SMALL_BATCH, which caches do not hold, there is "warm" alone.
        seconds: about how long each function is given in each state.
        rounds: turns in which the functions alternate, so that all see the same machine. In a warm turn a function is
            called again and again, and the first calls, which find the others' weights in the caches, do not count.

    Examples:
        >>> from fct.bench.measure import measure_batch
        >>> sorted(measure_batch({"sum": lambda: sum(range(99))}, 1, seconds=0.01))
        ['after a pause', 'warm']
    """
    found = {"warm": _warm(fns, seconds, rounds)}
    if rows <= SMALL_BATCH:
        found["after a pause"] = interleave(fns, seconds=seconds, rounds=rounds, most=15, pause=_PAUSE)
    return found


def _warm(fns: dict[str, Callable[[], object]], seconds: float, rounds: int) -> dict[str, Timing]:
    times: dict[str, list[float]] = {name: [] for name in fns}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, fn in fns.items():
                time.sleep(_PAUSE)  # the threads of the one before stop spinning
                times[name] += _in_a_row(fn, seconds / rounds)
    finally:
        if enabled:
            gc.enable()
    return {name: _timing(spent) for name, spent in times.items()}


def _in_a_row(fn: Callable[[], object], seconds: float, most: int = 2000) -> list[float]:
    """Seconds of calls in a row, at least one, without those of the first quarter of the time and the first call."""
    begun = time.perf_counter()
    fn()
    while time.perf_counter() - begun < seconds / 4:
        fn()
    spent: list[float] = []
    while not spent or (len(spent) < most and time.perf_counter() - begun < seconds):
        spent.append(_spent(fn))
    return spent


def _spent(fn: Callable[[], object]) -> float:
    """Seconds of a call; a peer in a process of its own says what it took in there."""
    start = time.perf_counter()
    fn()
    elapsed = time.perf_counter() - start
    return float(getattr(fn, "seconds", elapsed))


def _timing(spent: list[float]) -> Timing:
    median, p20, p80 = (float(q) for q in np.quantile(spent, (0.5, 0.2, 0.8)))
    return Timing(median, p20, p80, len(spent))


def timing_fields(timing: Timing, *, rows: int | None = None, flop: float | None = None) -> JsonDict:
    """Fields of a row: milliseconds, and rows and operations a second where they are known."""
    fields: JsonDict = {
        "ms": timing.median * 1e3,
        "ms_p20": timing.p20 * 1e3,
        "ms_p80": timing.p80 * 1e3,
        "calls": timing.calls,
    }
    if rows is not None:
        fields["rows_per_s"] = rows / timing.median
    if flop is not None:
        fields["gflops"] = flop / timing.median / 1e9
    return fields
