"""``python -m kvembed_chat``."""

from __future__ import annotations

from kvembed_chat._cli import main

main()
