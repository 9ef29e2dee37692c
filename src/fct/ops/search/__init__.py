"""The backends that search."""
