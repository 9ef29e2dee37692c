"""The backends that run h."""
