"""What users would do instead of a transformation with side-information; each returns an ``fct.Transformation``.

So every baseline runs through the same kernels, backfill and evaluation as our own h.
"""

from fct.baselines.linear import fit_procrustes, fit_ridge
from fct.baselines.residual import fit_residual

__all__ = ["fit_procrustes", "fit_residual", "fit_ridge"]
