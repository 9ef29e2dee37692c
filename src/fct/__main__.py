"""``python -m fct``: the same as ``fct``."""

from fct.cli import main

if __name__ == "__main__":
    main()
