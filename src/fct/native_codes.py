"""Names that the compiled kernels know by a number: dtypes, metrics, precisions, kinds of a shadow (csrc/codes.h)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fct import _C
from fct.spaces import METRICS

__all__ = ["BYTES_OF", "DTYPE_CODES", "METRIC_CODES", "PRECISION_CODES", "SHADOW_CODES", "codes_of"]


def codes_of(table: str, known: Sequence[str], wanted: Iterable[str]) -> dict[str, int]:
    """Name -> code of one of the extension's tables.

    Raises ImportError where ``wanted`` holds a name that the extension lacks: it was built from other sources.

    Examples:
        >>> from fct.native_codes import codes_of
        >>> codes_of("metrics", ("l2", "ip"), ["ip"])
        {'l2': 0, 'ip': 1}
    """
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ImportError(
            f"fct's extension: expected {table} {', '.join(missing)} among those it was built with, got "
            f"{', '.join(known) or 'none'}; it is of other sources: build it again"
        )
    return {name: code for code, name in enumerate(known)}


BYTES_OF: dict[str, int] = dict(_C.dtypes)
DTYPE_CODES = codes_of("dtypes", tuple(BYTES_OF), ("float32", "float16", "bfloat16", "int8"))
METRIC_CODES = codes_of("metrics", getattr(_C, "metrics", ()), METRICS)
PRECISION_CODES = codes_of("precisions", getattr(_C, "precisions", ()), ("fp32", "bf16", "int8", "int16"))
SHADOW_CODES = codes_of("shadow kinds", getattr(_C, "shadow_kinds", ()), ("bf16", "int8"))
