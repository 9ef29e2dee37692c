"""Triton kernels, installed as ``fct.kernels``. Importing a module here imports triton; ``import fct`` does not.

``transform_kernels``: h in three to four launches. ``search_kernels``: exact search without a distance matrix.
``tile_choices``: tile shapes per target.
"""
