"""How long a generated test looks, and from which seed: seconds in CI, an hour on demand.

``FCT_GENERATED_SECONDS=3600`` is the time of each of them. Without it they draw the same cases in every run; with it,
others each time, and ``FCT_GENERATED_SEED`` brings a run back.
"""

from __future__ import annotations

import os
import secrets

__all__ = ["seconds", "seed"]


def seconds(usual: float) -> float:
    """The time that a test has; ``usual`` in CI."""
    return float(os.environ.get("FCT_GENERATED_SECONDS", usual))


def seed() -> int:
    given = os.environ.get("FCT_GENERATED_SEED")
    if given is not None:
        return int(given)
    return secrets.randbelow(1 << 30) if "FCT_GENERATED_SECONDS" in os.environ else 0
