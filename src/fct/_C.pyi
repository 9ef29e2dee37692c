"""Types of the compiled kernels. Addresses are ints; sizes and strides count elements."""

from collections.abc import Callable
from typing import Any

import numpy as np

version: str
cuda_why_not: str  # "" where the CUDA kernels were built
cuda_architectures: str

def array_address(array: np.ndarray[Any, Any]) -> int: ...
def first_nonfinite_row(data: int, dtype: int, n: int, d: int, row_stride: int) -> int: ...
def nonfinite_rows(data: int, dtype: int, n: int, d: int, row_stride: int, flags: int) -> int: ...
def scan_rows(data: int, dtype: int, n: int, d: int, flags: int, checksum: Xxh64) -> int: ...

# ---- machine: isa is an index of isa_names, precision one of precisions ----
isa_names: tuple[str, ...]
dtypes: tuple[tuple[str, int], ...]  # name, bytes; the order is the code, here and below
metrics: tuple[str, ...]
precisions: tuple[str, ...]
shadow_kinds: tuple[str, ...]

def detected_isa() -> int: ...
def has_amx_bf16() -> bool: ...
def peak_ops(precision: int, isa: int, threads: int, seconds: float) -> float: ...
def read_bandwidth(bytes: int, threads: int, seconds: float) -> float: ...

# ---- transform ----
# (weight, scale, bias, in_mul, in_add, d_in, d_out, relu, precision)
_Layer = tuple[int, int, int, int, int, int, int, bool, int]
# (data, dtype, d, row_stride, scale, scale_row, scale_column)
_Rows = tuple[int, int, int, int, int, int, int]
# the same, and (offset, offset_row, offset_column)
_Codes = tuple[int, int, int, int, int, int, int, int, int, int]

class PackedTransform:
    def __init__(
        self,
        old: list[_Layer],
        side: list[_Layer],
        mixer: list[_Layer],
        skip: list[_Layer],  # none or one
        side_is_old: bool,
        length: float,  # what outputs are brought to; 0 where they are left as they are
        isa: int,
    ) -> None: ...
    def run(
        self,
        old: _Codes,
        side: _Codes,
        out: _Codes,
        n: int,
        threads: int,
        report: Callable[[float], None] | None = None,
    ) -> None: ...
    def read_weights(self, threads: int) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def rows_per_block(self) -> int: ...

class RepeatedCall:
    def __init__(
        self,
        packed: PackedTransform,
        old: int,  # columns
        side: int,  # 0 for none
        out: int,
        most_rows: int,
        threads: int,
    ) -> None: ...
    def holds(self) -> bool: ...  # whether environment and processors are as they were
    def run(self, old: object, side: object, out: object) -> Any: ...  # what was filled; None: not here

# ---- topk: metric is an index of metrics, self -1 or the gallery row of the first query ----
shadow_tile: int
shadow_meta: int
shadow_head_meta: int
shadow_tail_facts: int
shadow_max_dim: int
# (head, down, up, loss, tails)
_Levels = tuple[int, int, int, float, int]

def shadow_pack(
    gallery: _Rows,
    n: int,
    metric: int,
    first: int,
    count: int,
    shift: int,
    levels: _Levels,
    tiles: int,
    meta: int,
    tails: int,
    low: int,
    high_error: int,
    threads: int,
    isa: int,
) -> None: ...
def topk(
    queries: _Rows,
    n_queries: int,
    gallery: _Rows,
    n_gallery: int,
    tiles: int,
    meta: int,
    shift: int,
    levels: _Levels,
    low: int,
    high_error: int,
    metric: int,
    k: int,
    self: int,
    distances: int,
    indices: int,
    threads: int,
    isa: int,
    report: Callable[[float], None] | None = None,  # told the share done, every 100 ms
) -> tuple[int, int, int]: ...  # rescored, tails, exhausted
def ranks(
    queries: _Rows,
    n_queries: int,
    gallery: _Rows,
    n_gallery: int,
    codes: int,
    starts: int,
    members: int,
    metric: int,
    self: int,
    first: int,
    precision: int,
    threads: int,
    isa: int,
    report: Callable[[float], None] | None = None,
) -> None: ...

# ---- checksum ----
class Xxh64:
    def __init__(self, seed: int = 0) -> None: ...
    def update(self, data: int, bytes: int) -> None: ...
    def digest(self) -> int: ...
