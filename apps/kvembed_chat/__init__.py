"""`kvembed-chat`: a terminal chat that shows what its KV cache does.

Importing this package loads neither Textual nor torch: ``kvembed-chat --help`` answers at once.
"""

from __future__ import annotations

from kvembed_chat._cli import main

__all__ = ["main"]
