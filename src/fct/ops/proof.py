"""A GPU kernel proves itself on the very device before it is trusted with a gallery.

No GPU was in the room where the kernels were written. So the first use on a device runs the transformation's own
layers over a few hundred random rows, against the float64 reference, and writes the verdict to a file, keyed by device,
driver, build and layer shapes. A kernel that disagrees is refused with a warning; the next backend (torch) takes over.
``FCT_CACHE`` moves the file; deleting it makes the proof run again. The same file, under keys of the same kind, holds
the times that ``fct doctor`` measured; dispatch asks the fastest first.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fct import ref
from fct.artifact.layers import Layer
from fct.artifact.transformation import Transformation
from fct.atomic_files import write_bytes
from fct.errors import FctWarning
from fct.ops.backend import TransformBackend
from fct.ops.numerics.quantise import exact_first_on_gpu
from fct.ops.numerics.rounding import SIGMAS, deviation
from fct.ops.weights import packed
from fct.rows import Rows
from fct.types import Array, Floats

if TYPE_CHECKING:
    from fct.ops.backend import SearchBackend


__all__ = [
    "ROWS",
    "SearchCase",
    "TransformCase",
    "cache_dir",
    "error_of",
    "far_off",
    "fastest_first",
    "odd_transformations",
    "prove",
    "prove_search",
    "read_verdicts",
    "remember_times",
    "search_cases",
    "search_error",
    "search_verdict",
    "transform_cases",
    "verdict_file",
    "write_verdict",
]

# The cases of the proof, odd on purpose; fct doctor examines by the same ones.
ROWS = (1, 3, 67, 259)
SEARCHES = ((1, 1, 1, 1), (3, 197, 65, 7), (17, 331, 127, 10), (2, 700, 33, 600))  # queries, rows, dims, k
_FAR = 256.0
_known: dict[str, str] = {}


def cache_dir() -> Path:
    """FCT_CACHE, or fct/ in the user's cache folder."""
    chosen = os.environ.get("FCT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fct"


def verdict_file() -> Path:
    """Where verdicts and times are kept."""
    return cache_dir() / "selfproof.json"


def read_verdicts() -> dict[str, str]:
    """Key -> "" (right) or what was wrong. An unreadable file counts as empty: the proof runs again."""
    try:
        found = json.loads(verdict_file().read_text())
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def write_verdict(key: str, verdict: str) -> None:
    """Adds one verdict; a folder that cannot be written costs the next process a proof, nothing more."""
    try:
        verdict_file().parent.mkdir(parents=True, exist_ok=True)
        write_bytes(verdict_file(), json.dumps(read_verdicts() | {key: verdict}, indent=1, sort_keys=True).encode())
    except OSError:
        pass


def error_of(got: Array, want: Array) -> float:
    """Largest difference over ``want``'s root mean square; infinite where anything is not finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - want).max() / max(float(np.sqrt((want**2).mean())), 1e-30))


def _build() -> str:
    """The version and the build: a kernel compiled anew has to prove itself anew."""
    import fct
    from fct import _C

    extension = os.stat(_C.__file__)
    return f"{fct.__version__} {extension.st_size} {extension.st_mtime_ns}"


def _key(name: str, device: str, what: str) -> str:
    from fct.ops.device.state import device_of

    place = device_of(device)
    whole = f"{place.model}|{place.driver}|{_build()}|{name}|{what}"
    return f"{name} {place.model} {hashlib.sha256(whole.encode()).hexdigest()[:16]}"


def far_off(h: Transformation, old: Floats, side: Floats) -> tuple[Transformation, Floats, Floats]:
    """(h, old, side) moved so that a first layer that rounds rows or weights to bfloat16 is seen.

    The later layers' roundings hide what rounding the rows costs. So the rows are moved some hundreds of units away,
    all alike, where bfloat16 has steps of 2, and one column of the weights is chosen such that the move cancels:
    whoever keeps 16 bits of rows and weights has ordinary values from there on, whoever keeps 8 has noise of that size.
    """
    ranges = dict(h.calibration)
    chains, moved, skip = [], [], None if h.skip is None else h.skip.weight.astype(np.float64)
    for name, layers, x, start in (("old.0", h.old, old, 0), ("side.0", h.side, side, h.d_old)):
        first = layers[0]
        if first.d_in > 1:
            far = _FAR * (1 + np.random.default_rng(first.d_in).random(first.d_in))
            x = x + far
            x[:, -1] = far[-1]
            if name in ranges:  # that the rows lie in
                low, high = np.asarray(ranges[name], np.float64)
                ranges[name] = np.stack([np.minimum(low, 0) + far, np.maximum(high, 0) + far]).astype(np.float32)
            first = Layer(_cancelling(first.weight.astype(np.float64), far), first.bias, first.relu)
            if skip is not None and start < h.d_in:
                skip[:, start : start + len(far)] = _cancelling(skip[:, start : start + len(far)], far)
        chains.append((first, *layers[1:]))
        moved.append(np.asarray(x, np.float32))
    if h.skip is not None and skip is not None:
        h = h.with_(skip=Layer(skip, h.skip.bias, False))
    return h.with_(old=chains[0], side=chains[1], calibration=ranges), moved[0], moved[1]


def _cancelling(weight: Floats, far: Floats) -> Floats:
    """The weights (d_out, d) with a last column for which rows that are all ``far`` away give what they gave before."""
    return np.column_stack([weight[:, :-1], -(weight[:, :-1] @ far[:-1]) / far[-1]])


def prove(backend: TransformBackend, h: Transformation, precision: str, device: str) -> str:
    """ "" where the backend agrees with the reference on this device, else what was wrong; the answer is remembered."""
    layers = [(name, layer.weight.shape, layer.relu) for name, layer in h.layers()]
    length = "" if h.length == 1.0 else f"|{h.length}"
    key = _key(f"{backend.name} {precision}", device, f"{h.normalise}{length}|{layers}")
    return _remembered(
        key,
        f"{backend.name} ({precision})",
        device,
        lambda: _verdict(device, lambda: _run(backend, h, precision, device)),
    )


def prove_search(search: SearchBackend, metric: str, kind: str, device: str) -> str:
    """The same for a search over a shadow of ``kind``."""
    return _remembered(
        _search_key(search.name, metric, kind, device),
        f"{search.name} search ({kind}, {metric})",
        device,
        lambda: _verdict(device, lambda: _run_search(search, metric, kind, device)),
    )


def _search_key(name: str, metric: str, kind: str, device: str) -> str:
    return _key(f"{name} search {kind} {metric}", device, "")


def search_verdict(name: str, metric: str, kind: str, device: str) -> str | None:
    """What the proof of a search found on this device: "" (right) or what was wrong; None where it has not run yet."""
    key = _search_key(name, metric, kind, device)
    return _known.get(key, read_verdicts().get(key))


def remember_times(op: str, device: str, times: dict[str, dict[int, float]]) -> None:
    """Keeps what ``fct doctor`` measured: "backend precision" -> rows (queries) of one call -> seconds.

    op: "transform" or "search".
    """
    key = _key(f"times of {op}", device, "")
    _known[key] = json.dumps(times, sort_keys=True)
    write_verdict(key, _known[key])


def fastest_first(op: str, device: str, names: list[str], rows: int | None) -> list[str]:
    """``names`` ("backend precision"), those first that were measured faster at the nearest number of rows.

    Those without a time come behind, in the order given; so does everything where ``fct doctor`` never ran on this
    device, driver and build. rows: None stands for many.
    """
    key = _key(f"times of {op}", device, "")
    if key not in _known:
        _known[key] = read_verdicts().get(key, "{}")
    try:
        times = {str(name): {int(n): float(s) for n, s in t.items()} for name, t in json.loads(_known[key]).items()}
    except (ValueError, AttributeError, TypeError):
        return names

    def seconds(name: str) -> float:
        sizes = times.get(name)
        if not sizes:
            return math.inf
        wanted = max(sizes) if rows is None else max(rows, 1)
        nearest = min(sizes, key=lambda n: abs(math.log(n / wanted)))
        return sizes[nearest]

    return sorted(names, key=seconds)


def _verdict(device: str, check: Callable[[], str]) -> str:
    """What ``check`` found; a kernel that does not run is wrong, a device without memory or one that is lost is not."""
    from fct.errors import DeviceLostError
    from fct.ops.device.state import device_of

    try:
        return check()
    except DeviceLostError:
        raise
    except Exception as error:
        place = device_of(device)
        if place.is_out_of_memory(error) or place.is_lost(error):
            raise
        return f"it does not run: {type(error).__name__}: {error}"


def _remembered(key: str, what: str, device: str, run: Callable[[], str]) -> str:
    if key not in _known:
        verdicts = read_verdicts()
        if key not in verdicts:
            verdicts[key] = run()
            write_verdict(key, verdicts[key])
        _known[key] = verdicts[key]
        if _known[key]:
            warnings.warn(
                f"{what} is refused on {device}: {_known[key]}; another backend takes over. "
                "Please report the output of `fct doctor --full --json`.",
                FctWarning,
                stacklevel=4,
            )
    return _known[key]


def _run_search(search: SearchBackend, metric: str, kind: str, device: str) -> str:
    from fct.ops.device.state import device_of

    place = device_of(device)

    def answer(q: Floats, g: Floats, k: int) -> tuple[Array, Array]:
        on_q, on_g = (Rows(place.upload(x), "float32", None, device, "torch") for x in (q, g))
        got, rows = search.search(on_q, search.prepare(on_g, metric, kind), k)
        return place.download(got), place.download(rows)

    for case in search_cases():
        wrong = case.error(answer(case.queries, case.gallery, case.k), metric)
        if wrong:
            return f"{case}: {wrong}"
    return ""


@dataclass(frozen=True)
class SearchCase:
    """One search whose answer is known: float32 queries and gallery. whole: small whole numbers, of which many scores
    tie, and every l2 or ip score is exact, so that the rows must be the reference's too."""

    queries: Floats
    gallery: Floats
    k: int
    whole: bool

    def error(self, found: tuple[Array, Array], metric: str) -> str:
        """What is wrong with (distances, rows) on the host; empty where nothing is."""
        same_rows = self.whole and metric != "cosine"
        return search_error(*found, self.queries, self.gallery, self.k, metric, same_rows=same_rows)

    def __str__(self) -> str:
        return f"{len(self.queries)} queries, {len(self.gallery)} rows of {self.gallery.shape[1]}, k {self.k}"


def search_cases() -> Iterator[SearchCase]:
    """The searches by which every backend is proved, here and by ``fct doctor``."""
    rng = np.random.default_rng(0)
    for n_queries, n, d, k in SEARCHES:
        for whole in (True, False):
            sides = [rng.integers(-3, 4, (m, d)) if whole else rng.standard_normal((m, d)) for m in (n_queries, n)]
            yield SearchCase(sides[0].astype(np.float32), sides[1].astype(np.float32), k, whole)


def search_error(got: Array, rows: Array, q: Floats, g: Floats, k: int, metric: str, *, same_rows: bool) -> str:
    """What is wrong with an answer; empty when it is the reference's. same_rows: scores are exact, so rows must be."""
    scores = ref.scores(q, g, metric).astype(np.float32)
    want, want_rows = ref.topk(q, g, k, metric)
    if ((rows < 0) | (rows >= len(g))).any() or (np.diff(np.sort(rows, axis=1), axis=1) == 0).any():
        return "expected distinct rows of the gallery"
    if same_rows and not (rows == want_rows).all():
        return "other rows than the reference's, or ties in another order"
    for values in (got, np.take_along_axis(scores, rows, axis=1)):
        if not np.allclose(values, want, rtol=1e-6, atol=1e-6):
            return f"scores off by up to {np.abs(values - want).max():.3g}"
    return ""


@dataclass(frozen=True)
class TransformCase:
    """One block of rows for h, whose answer is known. far: moved so that rounding in the first layers is seen."""

    h: Transformation
    old: Floats
    side: Floats
    far: bool

    def error(self, got: Floats, precision: str, backend: str) -> tuple[str, float]:
        """(what is wrong with the (n, d_new) output on the host, or nothing; the largest error over its size)."""
        want = ref.transform(self.old, self.side, self.h)
        error = error_of(got, want)
        off = deviation(got, want, self.old, self.side, self.h, precision, backend)
        if off <= SIGMAS:
            return "", error
        return (
            f"off by {error:.3g} of the output's size, {off:.3g} standard deviations of what rounding explains, "
            f"expected at most {SIGMAS:.0f}"
        ), error

    def __str__(self) -> str:
        return (
            f"{len(self.old)} rows{' far away' if self.far else ''}, {self.h.d_old} + {self.h.d_side} -> {self.h.d_new}"
        )


def odd_transformations() -> Iterator[Transformation]:
    """Untrained h of odd shapes, by which ``fct doctor`` and the tests examine every backend: the paper's plan; then
    with a skip, rows shorter than 1, branches of one layer, no side-information, one layer here and two there."""
    for i, (d_old, d_side, d_new, inner) in enumerate(((1, 1, 1, 1), (7, 33, 65, 17), (24, 17, 40, 72))):
        yield Transformation.random(d_old, d_side, d_new, inner=inner, normalise=i == 1, seed=i)
    yield Transformation.random(24, 17, 40, inner=72, normalise=True, skip=True, seed=3).with_(length=0.87)
    small = Transformation.random(24, 17, 40, inner=72, normalise=True, skip=True, branch=24, blocks=1, seed=4)
    yield small.with_(length=0.995)
    yield Transformation.random(70, 70, 33, inner=17, skip=True, branch=130, blocks=0, side_info=False, seed=5)
    one, two = (Transformation.random(9, 5, 12, inner=16, branch=b, skip=True, seed=6) for b in (24, None))
    yield one.with_(side=two.side)


def transform_cases(h: Transformation, precision: str = "bf16") -> Iterator[TransformCase]:
    """The blocks of rows by which every backend is proved to run h at this precision: here, of a user's h; by
    ``fct doctor``, of odd ones. Those far away are the last, where h's first layers are to be exact."""
    rng = np.random.default_rng(0)
    for far in (False, True) if exact_first_on_gpu(h, "bf16" if precision == "fp32" else precision) else (False,):
        for n in ROWS:
            old = _sample(rng, h, "old.0", n, h.d_old)
            side = _sample(rng, h, "side.0", n, h.d_side) if h.uses_side_info else old
            yield TransformCase(*(far_off(h, old, side) if far else (h, old, side)), far)


def _run(backend: TransformBackend, h: Transformation, precision: str, device: str) -> str:
    from fct.ops.device.state import device_of

    place = device_of(device)
    for case in transform_cases(h, precision):
        n = len(case.old)
        weights = packed(backend, case.h, precision, device)
        out = place.empty((n + 2, h.d_new), "float32")
        out.fill_(float("nan"))
        on_old, on_side, on_out = (
            Rows(x, "float32", None, device, "torch")
            for x in (place.upload(case.old), place.upload(case.side), out[1:-1])
        )
        backend.run(weights, on_old, on_side, on_out, threads=1)
        got = place.download(out)
        if np.isfinite(got[[0, -1]]).any():
            return f"it wrote outside its {n} rows"
        wrong = case.error(got[1:-1], precision, backend.name)[0]
        if wrong:
            return f"{case}: {wrong}"
    return ""


def _sample(rng: np.random.Generator, h: Transformation, layer: str, n: int, d: int) -> Floats:
    """Random rows, inside the calibrated ranges where there are any, and in their middle for the most part: rows at
    their ends in every dimension at once would leave the ranges of the layers behind."""
    x = rng.standard_normal((n, d), dtype=np.float32)
    if layer in h.calibration:
        low, high = np.asarray(h.calibration[layer], np.float32)
        x = np.clip((low + high) / 2 + x * (high - low) / 8, low, high)
    return x
