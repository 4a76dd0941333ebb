"""``python -m kvembed`` is the ``kvembed`` command."""

from __future__ import annotations

from kvembed._cli import main

if __name__ == "__main__":
    main()
