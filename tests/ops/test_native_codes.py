"""One table of names and codes: the extension's. Python's names are in it, and an extension without them is refused."""

from __future__ import annotations

import numpy as np
import pytest

import fct
from fct import _C, native_codes, ref
from fct.ops.backend import PRECISIONS
from fct.rows import DTYPES
from fct.spaces import METRICS


def test_python_s_names_are_the_extension_s() -> None:
    assert tuple(native_codes.METRIC_CODES) == _C.metrics
    assert set(METRICS) == set(_C.metrics)
    assert tuple(native_codes.PRECISION_CODES) == _C.precisions
    assert set(PRECISIONS) < set(_C.precisions)
    assert tuple(native_codes.SHADOW_CODES) == _C.shadow_kinds
    assert tuple((name, native_codes.BYTES_OF[name]) for name in DTYPES) == _C.dtypes
    for codes in (native_codes.METRIC_CODES, native_codes.PRECISION_CODES, native_codes.SHADOW_CODES):
        assert list(codes.values()) == list(range(len(codes)))


def test_triton_s_constants_are_the_same() -> None:
    kernels = pytest.importorskip("fct.kernels.search_kernels")
    found = {name: getattr(kernels, name.upper()).value for name in ("l2", "ip")} | {"cosine": kernels.COSINE.value}
    assert found == native_codes.METRIC_CODES


def test_a_code_means_its_name(rng: np.random.Generator) -> None:
    """Each metric's answer is that metric's, by the plain reference."""
    q, g = rng.standard_normal((4, 12), dtype=np.float32), 3 * rng.standard_normal((70, 12), dtype=np.float32)
    for metric in METRICS:
        np.testing.assert_array_equal(fct.topk(q, g, 5, metric=metric).indices, ref.topk(q, g, 5, metric)[1])


def test_an_extension_of_other_sources_is_refused() -> None:
    with pytest.raises(
        ImportError, match=r"expected metrics cosine among those it was built with, got l2, ip; .*again"
    ):
        native_codes.codes_of("metrics", ("l2", "ip"), METRICS)
    with pytest.raises(ImportError, match=r"expected precisions fp32, bf16 among .*, got none"):
        native_codes.codes_of("precisions", (), ("fp32", "bf16"))
