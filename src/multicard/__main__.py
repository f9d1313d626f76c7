"""``python -m multicard``: the same as ``multicard``."""

from multicard.cli import main

if __name__ == "__main__":
    main()
