"""How rows are rounded and quantised, and what that may cost."""
