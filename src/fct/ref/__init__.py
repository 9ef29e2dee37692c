"""The plain oracle of every op: a few readable lines each, in float64. Imports nothing of ours.

Tests and benchmarks hold every backend against this one copy.
"""

from fct.ref.metrics import evaluate
from fct.ref.topk import scores, topk
from fct.ref.transform import transform

__all__ = ["evaluate", "scores", "topk", "transform"]
