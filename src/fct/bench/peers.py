"""What users would run instead of our kernels, each at its best setting: benchmarks and ``fct bench`` share it."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fct.artifact.transformation import Transformation
from fct.types import Array, JsonDict

__all__ = [
    "OPENBLAS_SETTINGS",
    "Worker",
    "best_setting",
    "faiss_worker",
    "onnx_peer",
    "openblas_times",
    "openvino_peer",
    "torch_module",
    "torch_peer",
    "transform_peers",
]


# ---- the transformation ----
def torch_module(h: Transformation, dtype: Any, *, convolutions: bool = False) -> Any:
    """h in plain torch: folded linear layers, or the reference code's 1x1 convolutions with batch norm beside them."""
    import torch
    from torch import nn

    def chain(layers: Any) -> Any:
        parts: list[Any] = []
        for layer in layers:
            if convolutions:
                part: Any = nn.Conv2d(layer.d_in, layer.d_out, 1)
                part.weight.data = torch.from_numpy(layer.weight.copy())[:, :, None, None]
            else:
                part = nn.Linear(layer.d_in, layer.d_out)
                part.weight.data = torch.from_numpy(layer.weight.copy())
            part.bias.data = torch.from_numpy(layer.bias.copy())
            parts.append(part)
            if convolutions and layer.relu:
                parts.append(nn.BatchNorm2d(layer.d_out, eps=0.0))
            if layer.relu:
                parts.append(nn.ReLU())
        return nn.Sequential(*parts)

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.old, self.side, self.mixer = chain(h.old), chain(h.side), chain(h.mixer)
            self.skip = None if h.skip is None else chain((h.skip,))

        def forward(self, a: Any, b: Any) -> Any:
            if convolutions:
                a, b = a[:, :, None, None], b[:, :, None, None]
            y = self.mixer(torch.cat([self.old(a), self.side(b)], 1))
            if self.skip is not None:
                y = y + self.skip(torch.cat([a, b], 1) if h.uses_side_info else a)
            y = y.flatten(1) if convolutions else y
            return h.length * nn.functional.normalize(y) if h.normalise else y

    return Module().eval().to(dtype)


def torch_peer(
    h: Transformation, old: Array, side: Array, precision: str, *, compiled: str = "", convolutions: bool = False
) -> Callable[[], object]:
    """compiled: by torch's own "inductor" or AMD's "zentorch"; not at all by default."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    module = torch_module(h, dtype, convolutions=convolutions)
    if compiled == "zentorch":
        importlib.import_module(compiled)  # it registers itself
        module = torch.compile(module, backend=compiled, dynamic=False)
    elif compiled:
        module = torch.compile(module, mode="max-autotune-no-cudagraphs")
    a, b = torch.from_numpy(old), torch.from_numpy(side)

    def call() -> Any:
        with torch.inference_mode():
            return module(a.to(dtype), b.to(dtype)).float().numpy()

    return call


def _onnx_file(h: Transformation, folder: Path) -> Path:
    path = folder / "h.onnx"
    if not path.is_file():
        h.to_onnx(path)
    return path


def onnx_peer(
    h: Transformation, old: Array, side: Array, threads: int, folder: Path, *, int8: bool
) -> Callable[[], object]:
    import onnxruntime

    path = _onnx_file(h, folder)
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantised = folder / "h.int8.onnx"
        logging.disable(logging.WARNING)  # advice about preprocessing, on the root logger
        try:
            quantize_dynamic(path, quantised, weight_type=QuantType.QInt8, per_channel=True)
        finally:
            logging.disable(logging.NOTSET)
        path = quantised
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = dict(zip([i.name for i in session.get_inputs()], (old, side), strict=False))  # one input without side-info
    return lambda: session.run(None, feed)[0]


def _static_int8_file(h: Transformation, old: Array, side: Array, folder: Path) -> Path:
    """ONNX Runtime's own static quantisation, calibrated on such rows: QDQ pairs, weights per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    path = folder / "h.qdq.onnx"
    if path.is_file():
        return path
    source = _onnx_file(h, folder)
    names = ("old", "side_info") if h.uses_side_info else ("old",)
    feeds = iter([dict(zip(names, (_like(old), _like(side)), strict=False))])

    class Rows(CalibrationDataReader):  # type: ignore[misc,unused-ignore]
        def get_next(self) -> JsonDict | None:
            return next(feeds, None)

    logging.disable(logging.WARNING)  # advice about preprocessing, on the root logger
    try:
        quantize_static(
            source,
            path,
            Rows(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        logging.disable(logging.NOTSET)
    return path


def _like(rows: Array, least: int = 1024, most: int = 4096) -> Any:
    """Rows to calibrate on: those given, or where they are too few, random ones of the same mean and spread."""
    if len(rows) >= least:
        return rows[:most]
    drawn = np.random.default_rng(0).standard_normal((least, rows.shape[1]), dtype=np.float32)
    return np.concatenate([rows, drawn * rows.std() + rows.mean()])


def openvino_peer(
    h: Transformation, old: Array, side: Array, threads: int, folder: Path, precision: str, *, hint: str = "LATENCY"
) -> Callable[[], object]:
    """OpenVINO on the batch's own shape; "int8": on a static QDQ model. hint: "LATENCY" or "THROUGHPUT"."""
    import openvino

    core = openvino.Core()
    path = _static_int8_file(h, old, side, folder) if precision == "int8" else _onnx_file(h, folder)
    model = core.read_model(str(path))
    feed = dict(zip([i.any_name for i in model.inputs], (old, side), strict=False))
    model.reshape({name: list(x.shape) for name, x in feed.items()})
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "PERFORMANCE_HINT": hint,
        },
    )
    request = compiled.create_infer_request()

    def call() -> Any:
        request.infer(feed, share_inputs=True, share_outputs=True)
        return request.get_output_tensor(0).data

    return call


def transform_peers(
    h: Transformation, old: Array, side: Array, threads: int, folder: Path, *, compiled: bool = False
) -> dict[tuple[str, str], Callable[[], Callable[[], object]]]:
    """(name, precision) -> how to make the call; making it raises ImportError where the package is missing.

    Args:
        old, side: (n, d_old) and (n, d_side) float32 rows that every call transforms.
        threads: of ONNX Runtime and OpenVINO; torch's are set by ``torch.set_num_threads``.
        folder: where h.onnx goes.
        compiled: torch.compile too, which takes tens of seconds to compile, and AMD's zentorch where it is installed.
    """
    found = {
        # as published: eager 1x1 convolutions, batch norm beside them
        ("reference code", "fp32"): lambda: torch_peer(h, old, side, "fp32", convolutions=True),
        ("torch folded", "fp32"): lambda: torch_peer(h, old, side, "fp32"),
        ("torch folded", "bf16"): lambda: torch_peer(h, old, side, "bf16"),
        ("ONNX Runtime", "fp32"): lambda: onnx_peer(h, old, side, threads, folder, int8=False),
        ("ONNX Runtime dynamic", "int8"): lambda: onnx_peer(h, old, side, threads, folder, int8=True),
        ("OpenVINO", "fp32"): lambda: openvino_peer(h, old, side, threads, folder, "fp32"),
        ("OpenVINO", "bf16"): lambda: openvino_peer(h, old, side, threads, folder, "bf16"),
        ("OpenVINO static, latency", "int8"): lambda: openvino_peer(h, old, side, threads, folder, "int8"),
        ("OpenVINO static, throughput", "int8"): lambda: openvino_peer(
            h, old, side, threads, folder, "int8", hint="THROUGHPUT"
        ),
    }
    if compiled:
        for name, by in (("torch.compile", "inductor"), ("zentorch", "zentorch")):
            found[(name, "fp32")] = partial(torch_peer, h, old, side, "fp32", compiled=by)
            found[(name, "bf16")] = partial(torch_peer, h, old, side, "bf16", compiled=by)
    return found


# ---- calls in a process of their own, for libraries that read their settings once ----
_LOOP = """
import sys, time
import numpy as np
for line in sys.stdin:
    word, _, rest = line.strip().partition(" ")
    begun = time.perf_counter()
    if word == "call":
        result = call()
    else:
        np.save(rest, result)
    print("done", time.perf_counter() - begun, flush=True)
"""


_VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # what chooses OpenBLAS's kernels and blocks


class Worker:
    """A call in a process of its own, since OpenBLAS reads its settings when it is loaded.

    seconds: what the last call took in there, without the way to the process and back.

    Args:
        setup: Python source that defines ``call()``, whose result is an array.
        arguments: what ``setup`` finds in ``sys.argv[1:]``.
        settings: environment variables; this shell's OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE are left out.

    Raises RuntimeError, with the process's last line of stderr, where it dies.

    Examples:
        >>> from fct.bench.peers import Worker
        >>> with Worker("import numpy as np\\ndef call(): return np.arange(3)", [], {}) as worker:
        ...     worker()
        ...     worker.result().tolist()
        [0, 1, 2]
    """

    def __init__(self, setup: str, arguments: list[str], settings: Mapping[str, str]) -> None:
        self.seconds = 0.0
        environment = {k: v for k, v in os.environ.items() if k not in _VARIABLES}
        self._process = subprocess.Popen(
            [sys.executable, "-c", setup + "\n" + _LOOP, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, **settings},
        )

    def _ask(self, line: str) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        answer = ""
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            pass
        word, _, seconds = answer.strip().partition(" ")
        if word != "done":
            said = process.stderr.read().strip().splitlines()
            raise RuntimeError(f"the process of a peer ended: {said[-1] if said else 'it said nothing'}")
        self.seconds = float(seconds)

    def __call__(self) -> None:
        self._ask("call")

    def result(self) -> Any:
        """What the last call returned."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.npy"
            self._ask(f"save {path}")
            return np.load(path, allow_pickle=False)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# OpenBLAS's kernels by processor; which is fastest is not what it detects everywhere.
OPENBLAS_SETTINGS: dict[str, dict[str, str]] = {
    "OpenBLAS's own choice": {},
    **{f"OPENBLAS_CORETYPE={core}": {"OPENBLAS_CORETYPE": core} for core in ("Haswell", "SkylakeX", "Cooperlake")},
}

_FAISS = """
import sys, time
import faiss, numpy as np

queries, gallery, k, threads = sys.argv[1:]
faiss.omp_set_num_threads(int(threads))
q, g = (np.load(path, mmap_mode="r") for path in (queries, gallery))
index = faiss.IndexFlatIP(g.shape[1])
index.add(g)
q = np.ascontiguousarray(q)
def call():
    return index.search(q, int(k))[1]
def take(way):
    faiss.cvar.distance_compute_blas_threshold, faiss.cvar.distance_compute_min_k_reservoir = way
def seconds(way):
    take(way)
    call()
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
# By products or row by row: its own threshold (128,000 for queries x dimensions in 1.15) is up to nine times too slow.
# The best of a row in a heap or in a reservoir.
ways = [(0, 100), (0, 1)] + [(1 << 30, 100)] * (len(q) < 100)
take(min(ways, key=seconds))
"""


def faiss_worker(queries: Path, gallery: Path, k: int, threads: int, settings: Mapping[str, str]) -> Worker:
    """FAISS's exact inner-product search of .npy files, in a process of its own; its result: (n, k) row numbers.

    Matrix products or row by row, with a heap or a reservoir, whichever is fastest for so many queries.
    """
    return Worker(_FAISS, [str(queries), str(gallery), str(k), str(threads)], settings)


def openblas_times(make: Callable[[Mapping[str, str]], Worker], *, calls: int = 3) -> dict[str, float]:
    """Seconds of the best of ``calls`` calls under this shell's own and under each of OPENBLAS_SETTINGS."""
    import time

    own = {k: os.environ[k] for k in _VARIABLES if k in os.environ}
    settings = {**({_name(own): own} if own else {}), **OPENBLAS_SETTINGS}  # one name, one setting
    found = {}
    for name, variables in settings.items():
        with make(variables) as worker:
            worker()
            times = []
            for _ in range(calls):
                begun = time.perf_counter()
                worker()
                times.append(time.perf_counter() - begun)
        found[name] = min(times)
    return found


def _name(variables: Mapping[str, str]) -> str:
    return " ".join(f"{k}={v}" for k, v in sorted(variables.items()))


def best_setting(times: Mapping[str, float]) -> tuple[str, dict[str, str]]:
    """(name, variables) of the fastest of :func:`openblas_times`."""
    name = min(times, key=lambda key: times[key])
    return name, dict(part.split("=", 1) for part in name.split() if part.startswith("OPENBLAS_"))
