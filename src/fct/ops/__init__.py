"""Backends behind one small interface; see :mod:`fct.ops.registry` for who is asked in which order."""
