"""How good h is on real upgrades that differ in kind: by hand, ``python -m benchmarks.quality --help``."""
