"""A call of transform_batch as it was made before, with plain arrays, goes straight to the kernels.

With few rows and a small h the checks of :mod:`fct.transform` take longer than the rows. What they find out about
everything but the arrays is the same in the next call; what they ask of the arrays, csrc/repeated_call.h asks too.
Where a single answer is another one it does nothing, and the checks see the call as they see a first one: they alone
refuse, and they alone choose.
"""

from __future__ import annotations

import weakref
from typing import Any

from fct import _C
from fct.artifact.transformation import Transformation
from fct.ops.isa import isa
from fct.ops.transform.cpu_backend import CpuTransform
from fct.ops.weights import packed

__all__ = ["remember_call", "repeat_call"]

_Key = tuple[str, int | None, int]  # precision and threads as the caller gave them, level

_MOST_FLOP = 4e9  # of a call: seconds on the slowest level, where a bar is to be shown
_calls: weakref.WeakKeyDictionary[Transformation, dict[_Key, _C.RepeatedCall]] = weakref.WeakKeyDictionary()


def repeat_call(
    old: object, side_info: object, h: object, *, out: object, precision: object, threads: object
) -> Any | None:
    """What transform_batch returns; None where this is no call as before. No argument has been checked."""
    if type(h) is not Transformation or type(precision) is not str or not (threads is None or type(threads) is int):
        return None
    calls = _calls.get(h)
    call = None if calls is None else calls.get((precision, threads, isa()))
    return None if call is None else call.run(old, side_info, out)


def remember_call(h: Transformation, *, precision: str, threads: int | None, chosen: str, count: int) -> None:
    """Keeps what was found out in a call that the CPU kernels ran by nobody's demand.

    precision, threads: as the caller gave them. chosen: the precision that was picked. count: of threads.
    """
    if type(h) is not Transformation:
        return
    level = isa()
    calls, key = _calls.setdefault(h, {}), (precision, threads, level)
    if key in calls and calls[key].holds():
        return
    weights = packed(CpuTransform(), h, chosen, "cpu").at(level).handle
    side = h.d_side if h.uses_side_info else 0
    calls[key] = _C.RepeatedCall(weights, h.d_old, side, h.d_new, int(_MOST_FLOP / h.flop_per_row), count)
