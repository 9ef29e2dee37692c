"""Plan, run, check: a gallery on disk or in an object store, an h, and a new gallery at the other end."""
