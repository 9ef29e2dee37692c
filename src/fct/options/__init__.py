"""Options, each declared once: its name, type, default, check and help text.

A new option is one field of a group in :mod:`fct.options.groups`, made by :func:`fct.options.declare.option`. Then
``python -m tools.option_keywords`` writes :mod:`fct.options.keywords` anew (a test says when that was forgotten). The
public functions that take the group, their ``help()``, and the commands' flags have it from there.
"""
