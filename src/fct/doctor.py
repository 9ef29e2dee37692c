"""Every backend that can run here, held against the float64 reference and timed: the transformation's and the search's.

On a machine with a GPU this is the first time its kernels meet silicon; the JSON report is made to be mailed in. What
was timed on a GPU is kept beside the self-proof's verdicts, and dispatch asks the fastest first from then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fct import ref
from fct.artifact.transformation import Transformation
from fct.ops.backend import GPU_PRECISIONS, PRECISIONS, TransformBackend
from fct.ops.processors import default_threads
from fct.ops.proof import TransformCase, error_of, odd_transformations, search_cases, transform_cases
from fct.ops.registry import transform_backends
from fct.ops.transform.reference_backend import store
from fct.ops.weights import packed
from fct.ref import chain
from fct.rows import Rows
from fct.types import Array, Floats, JsonDict

if TYPE_CHECKING:
    import torch

    from fct.ops.backend import SearchBackend


__all__ = ["Finding", "Report", "Timing", "examine"]

# (d_old, d_side, d_new, inner)
PAPER_SHAPE = (128, 128, 128, 2048)
SIZES = (1, 32, 256, 4096)
FULL_SIZES = (1, 8, 32, 256, 4096, 65536, 1 << 20)
SEARCH_GALLERY, FULL_SEARCH_GALLERY = (100_000, 128), (1_000_000, 128)
SEARCH_SIZES, FULL_SEARCH_SIZES, SEARCH_K = (1, 16, 256, 1024), (1, 16, 256, 1024, 4096), 10


@dataclass(frozen=True)
class Finding:
    """A backend at a precision: right (and which h it refuses), wrong (and how), or not able to run here (and why)."""

    backend: str
    precision: str
    device: str
    verdict: str  # "right", "wrong", "not here"
    detail: str
    worst_error: float | None  # largest error over the output's root mean square
    op: str = "transform"  # or "search"; its precision is the scan's


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call, inputs and output in place: ``rows`` rows of the paper's shape, or that many queries
    among ``gallery`` rows, prepared before."""

    backend: str
    precision: str
    device: str
    rows: int
    seconds: float
    p20: float
    p80: float
    op: str = "transform"
    gallery: int = 0


@dataclass(frozen=True)
class Report:
    """What ``fct doctor`` found. remembered: the file by which dispatch goes from now on, "" where no GPU was timed."""

    build: JsonDict
    devices: dict[str, str]
    findings: list[Finding]
    timings: list[Timing]
    remembered: str = ""

    @property
    def healthy(self) -> bool:
        return not any(f.verdict == "wrong" for f in self.findings)

    def fastest(self) -> list[Timing]:
        """The quickest right backend for each device, precision and number of rows; of the searches, for each device
        and number of queries, since all answer alike."""
        best: dict[tuple[str, str, str, int], Timing] = {}
        for t in self.timings:
            key = (t.op, t.device, t.precision if t.op == "transform" else "", t.rows)
            if key not in best or t.seconds < best[key].seconds:
                best[key] = t
        return list(best.values())

    def to_dict(self) -> JsonDict:
        return {
            "format": "fct-doctor 2",
            "build": self.build,
            "devices": self.devices,
            "healthy": self.healthy,
            "findings": [asdict(f) for f in self.findings],
            "shape": dict(zip(("d_old", "d_side", "d_new", "inner"), PAPER_SHAPE, strict=True)),
            "timings": [self._timing(t) for t in self.timings],
            "fastest": [self._timing(t) for t in self.fastest()],
            "remembered": self.remembered,
        }

    def _timing(self, t: Timing) -> JsonDict:
        """With what docs/gpu.md bounds: rows a second, GFLOP/s, and the share of the data sheet's peak."""
        from fct.bench.data_sheets import published_peak

        old, side, new, inner = PAPER_SHAPE
        widths = [(d, 2 * d) for d in (old, side)] + [(2 * d, 2 * new) for d in (old, side)]
        flop = 2.0 * sum(a * b for a, b in [*widths, (4 * new, inner), (inner, inner), (inner, new)])
        if t.op == "search":
            flop = 2.0 * t.gallery * SEARCH_GALLERY[1]
        gflops = t.rows * flop / t.seconds / 1e9
        peak = published_peak(self.devices.get(t.device, ""), t.precision)
        return asdict(t) | {
            "rows_per_s": t.rows / t.seconds,
            "gflops": gflops,
            "share_of_published_peak": None if peak is None else gflops / (1e3 * peak),
        }


def devices() -> dict[str, str]:
    """The devices to examine and what they are."""
    import platform

    from fct.ops.device.state import device_of, why_no_gpu

    found = {"cpu": platform.processor() or platform.machine()}
    if not why_no_gpu("cuda:0"):
        import torch

        for i in range(torch.cuda.device_count()):
            place = device_of(f"cuda:{i}")
            found[place.name] = f"{place.model}, {place.target}, {place.memory >> 30} GiB, {place.driver}"
    else:
        found["cuda"] = "; ".join(why_no_gpu("cuda:0"))
    return found


def examine(
    *,
    full: bool = False,
    backends: list[TransformBackend] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Runs every backend that can run here against the reference, and times those that are right.

    Args:
        full: the paper's shape among the proofs too, and up to a million rows timed.
        backends: of the transformation, whom to examine; by default all, and every search.
        progress: told what is being done.

    Examples:
        >>> from fct.doctor import examine
        >>> from fct.ops.transform.reference_backend import RefTransform
        >>> examine(backends=[RefTransform()]).healthy
        True
    """
    from fct.info import build_info

    places = devices()
    findings: list[Finding] = []
    timings: list[Timing] = []
    h = _calibrated(Transformation.random(*PAPER_SHAPE[:3], inner=PAPER_SHAPE[3]))
    for place in places:
        for backend in backends or transform_backends():
            for precision in (*PRECISIONS, *GPU_PRECISIONS):
                why = backend.why_not(h, precision, place)
                if why:
                    findings.append(Finding(backend.name, precision, place, "not here", "; ".join(why), None))
                    continue
                progress(f"{backend.name} ({precision}) on {place}")
                finding = _prove(backend, precision, place, full)
                findings.append(finding)
                if finding.verdict == "right" and backend.name != "ref":
                    timings += _time(backend, h, precision, place, FULL_SIZES if full else SIZES)
        for name, precision, search in _searches(place) if backends is None else ():
            why = search.why_not()
            if why:
                findings.append(Finding(name, precision, place, "not here", "; ".join(why), None, "search"))
                continue
            progress(f"{name} search ({precision}) on {place}")
            finding = _prove_search(name, precision, place, search)
            findings.append(finding)
            if finding.verdict == "right":
                timings += _time_search(name, precision, place, search, full)
    return Report(build_info(), places, findings, timings, _remember(timings))


def _remember(timings: list[Timing]) -> str:
    """Keeps the GPUs' times for dispatch; where they lie, or "" where there are none."""
    from fct.ops.proof import remember_times, verdict_file

    kept = False
    for op, place in sorted({(t.op, t.device) for t in timings if t.device != "cpu"}):
        times: dict[str, dict[int, float]] = {}
        for t in timings:
            if (t.op, t.device) == (op, place):
                times.setdefault(f"{t.backend} {t.precision}", {})[t.rows] = t.seconds
        remember_times(op, place, times)
        kept = True
    return str(verdict_file()) if kept else ""


_Found: TypeAlias = "tuple[Array | torch.Tensor, Array | torch.Tensor]"  # distances, rows
_Ask: TypeAlias = Callable[[Rows, int], _Found]  # (queries, k)


@dataclass(frozen=True)
class _Search:
    """A search on a device. prepare: (gallery rows, metric) -> what answers queries in it."""

    why_not: Callable[[], list[str]]
    prepare: Callable[[Rows, str], _Ask]


def _searches(device: str) -> Iterator[tuple[str, str, _Search]]:
    """(backend, precision of the scan, search) of every search of the device's kind."""
    from fct.ops.registry import search_backends
    from fct.ops.search.cpu_search import build_shadow, topk_cpu
    from fct.ops.search.float64 import topk_blocked

    threads = default_threads()

    def compiled(shadowed: bool) -> _Search:
        def prepare(g: Rows, metric: str) -> _Ask:
            shadow = build_shadow(g, metric, threads=threads) if shadowed else None
            return lambda q, k: topk_cpu(q, g, shadow, k, metric, False, threads=threads)[:2]

        return _Search(list, prepare)

    def on_gpu(search: SearchBackend, kind: str) -> _Search:
        def prepare(g: Rows, metric: str) -> _Ask:
            shadow = search.prepare(g, metric, kind)
            return lambda q, k: search.search(q, shadow, k)

        return _Search(lambda: search.why_not(SEARCH_K, "l2", device), prepare)

    if device == "cpu":
        yield "cpu", "int8", compiled(True)
        yield "cpu", "fp32", compiled(False)
    else:
        for search in search_backends():
            for kind in ("bf16", "int8"):
                yield search.name, kind, on_gpu(search, kind)
    from fct.ops.device.state import why_no_cuda

    yield (
        "numpy" if device == "cpu" else "torch",
        "fp32",
        _Search(
            lambda: [] if device == "cpu" else why_no_cuda(device),
            lambda g, metric: lambda q, k: topk_blocked(q, g, k, metric, False),
        ),
    )


def _prove_search(name: str, precision: str, device: str, search: _Search) -> Finding:
    from fct.spaces import METRICS

    worst = 0.0
    for metric in METRICS:
        for case in search_cases():
            try:
                ask = search.prepare(_rows(case.gallery, "float32", device), metric)
                found = ask(_rows(case.queries, "float32", device), case.k)
                distances, rows = (_array(x, device) for x in found)
                wrong = case.error((distances, rows), metric)
                if not wrong:
                    want = ref.topk(case.queries, case.gallery, case.k, metric)[0]
                    worst = max(worst, error_of(distances, want) if want.any() else 0.0)
            except Exception as failure:
                wrong = f"{type(failure).__name__}: {failure}"
            if wrong:
                return Finding(name, precision, device, "wrong", f"{metric}, {case}: {wrong}", None, "search")
    return Finding(name, precision, device, "right", "", worst, "search")


def _array(x: Array | torch.Tensor, device: str) -> Array:
    if isinstance(x, np.ndarray):
        return x
    from fct.ops.device.state import device_of

    return device_of(device).download(x)


def _time_search(name: str, precision: str, device: str, search: _Search, full: bool) -> list[Timing]:
    rng = np.random.default_rng(5)
    n, d = FULL_SEARCH_GALLERY if full else SEARCH_GALLERY
    ask = search.prepare(_rows(rng.standard_normal((n, d), dtype=np.float32), "float32", device), "l2")
    found = []
    for n_q in FULL_SEARCH_SIZES if full else SEARCH_SIZES:
        if device == "cpu" and precision == "fp32" and n_q > 16:
            continue  # every row for every query: seconds on a CPU, and no faster a query than before
        q = _rows(rng.standard_normal((n_q, d), dtype=np.float32), "float32", device)

        def call(q: Rows = q) -> None:
            ask(q, min(SEARCH_K, n))

        seconds = _seconds(call, device)
        found.append(Timing(name, precision, device, n_q, *seconds, "search", n))
    return found


def _seconds(call: Callable[[], object], device: str) -> tuple[float, float, float]:
    """(median, p20, p80) seconds of a call and of what it queued; the first is not counted."""
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < 3 or (len(seconds) < 50 and time.perf_counter() - begin < 0.3):
        start = time.perf_counter()
        call()
        if device != "cpu":
            _settle(device)
        seconds.append(time.perf_counter() - start)
    seconds = sorted(seconds[1:])
    return median(seconds), seconds[len(seconds) // 5], seconds[min(len(seconds) - 1, len(seconds) * 4 // 5)]


def _calibrated(h: Transformation) -> Transformation:
    """h with activation ranges from random rows, so that the 8-bit precisions can run."""
    rng = np.random.default_rng(1)
    ranges: JsonDict = {}

    def walk(name: str, values: Floats) -> Floats:
        for i, layer in enumerate(getattr(h, name)):
            ranges[f"{name}.{i}"] = np.stack([values.min(0), values.max(0)]).astype(np.float32)
            values = chain(values, [layer], np.float32)
        return values

    branches = [
        walk(name, rng.standard_normal((256, d)).astype(np.float32))
        for name, d in (("old", h.d_old), ("side", h.d_side))
    ]
    walk("mixer", np.concatenate(branches, axis=1))
    if h.skip is not None:
        rows = [ranges[f"{name}.0"] for name in (("old", "side") if h.uses_side_info else ("old",))]
        ranges["skip"] = np.concatenate(rows, axis=1)
    return h.with_(calibration=ranges)


def _cases(precision: str, full: bool) -> Iterator[tuple[TransformCase, str]]:
    """(case, the dtype of its rows): the proof's own, of h of odd shapes."""
    paper = [Transformation.random(*PAPER_SHAPE[:3], inner=PAPER_SHAPE[3])] if full else []
    for h in (*odd_transformations(), *paper):
        for case in transform_cases(_calibrated(h), precision):
            for dtype in ("float32",) if case.far else ("float32", "float16", "bfloat16"):
                yield case, dtype


def _prove(backend: TransformBackend, precision: str, device: str, full: bool) -> Finding:
    worst = 0.0
    refused: dict[str, None] = {}
    for case, dtype in _cases(precision, full):
        why = backend.why_not(case.h, precision, device)
        if why:
            refused |= dict.fromkeys(why)
            continue
        old, side = (_rows(x, dtype, device) for x in (case.old, case.side))
        stored = replace(case, old=_host(old), side=_host(side))  # rounded to the dtype
        out = _rows(np.full((old.n, case.h.d_new), np.nan, np.float32), "float32", device)
        error: float | None = None
        try:
            weights = packed(backend, case.h, precision, device)
            backend.run(weights, old, side, out, threads=default_threads())
            wrong, error = stored.error(_host(out), precision, backend.name)
            worst = max(worst, error)
        except Exception as failure:
            wrong = f"{type(failure).__name__}: {failure}"
        if wrong:
            return Finding(backend.name, precision, device, "wrong", f"{case} of {dtype}: {wrong}", error)
    return Finding(backend.name, precision, device, "right", "; ".join(refused), worst)


def _rows(x: Floats, dtype: str, device: str) -> Rows:
    """Host float32 values as a block of the dtype on a device."""
    bits = Rows(np.empty(x.shape, "uint16" if dtype == "bfloat16" else dtype), dtype, None, "cpu", "numpy")
    store(x, bits)
    if device == "cpu":
        return bits
    import torch

    from fct.ops.device.state import device_of

    host = torch.from_numpy(bits.values)
    host = host.view(torch.bfloat16) if dtype == "bfloat16" else host
    return Rows(device_of(device).upload(host), dtype, None, device, "torch")


def _host(rows: Rows) -> Floats:
    if rows.kind_is_numpy:
        values: Floats = rows.float32()
        return values
    from fct.ops.device.state import device_of

    return device_of(rows.device).download(rows.values.float())


def _time(
    backend: TransformBackend, h: Transformation, precision: str, device: str, sizes: tuple[int, ...]
) -> list[Timing]:
    rng = np.random.default_rng(3)
    found = []
    for n in sizes:
        if device == "cpu" and n > 4096 * max(1, default_threads()):
            continue  # minutes on a CPU, and no faster a row than the block before
        x = rng.standard_normal((n, h.d_old), dtype=np.float32)
        old, out = _rows(x, "float32", device), _rows(np.zeros((n, h.d_new), np.float32), "float32", device)
        weights = packed(backend, h, precision, device)

        def call(old: Rows = old, out: Rows = out, weights: object = weights) -> None:
            backend.run(weights, old, old, out, threads=default_threads())

        found.append(Timing(backend.name, precision, device, n, *_seconds(call, device)))
    return found


def _settle(device: str) -> None:
    from fct.ops.device.state import device_of

    state = device_of(device)
    state.finish(state.record())
