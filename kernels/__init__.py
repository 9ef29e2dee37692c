"""Triton kernels, installed as ``fct.kernels``. Importing a module here imports triton; ``import fct`` does not.

``transform``: h in three to four launches. ``topk``: exact search without a distance matrix. ``configs``: tile
shapes per target. ``machine_code``: compiles them for targets that are not in the room, and reads what came out.
"""
