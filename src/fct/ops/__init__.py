"""Backends behind one small interface; see :mod:`fct.ops.dispatch` for who is asked in which order."""
