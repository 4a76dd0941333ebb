"""The ``kvembed-chat`` command; it always exists, and says what is missing when it cannot start."""

from __future__ import annotations

import importlib.util
import sys

__all__ = ["main"]


def main() -> None:
    """Start the chat app, or print what to do and exit with status 1."""
    # find_spec and not try/except ImportError: an import that fails inside an installed app is a bug to
    # be seen, not a missing extra.
    if importlib.util.find_spec("textual") is None:
        _fail("kvembed-chat needs packages that are not installed. Run:\n\n    pip install 'kvembed[chat]'\n")
    if importlib.util.find_spec("kvembed_chat") is None:
        from kvembed import __version__

        _fail(f"The chat app is not part of kvembed {__version__}. Use `kvembed demo` or the Python API.\n")
    importlib.import_module("kvembed_chat").main()


def _fail(message: str) -> None:
    sys.stderr.write(message)
    raise SystemExit(1)
