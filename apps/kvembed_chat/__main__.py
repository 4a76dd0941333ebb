"""``python -m kvembed_chat``."""

from __future__ import annotations

from kvembed._chat_entry import main

main()
