"""How readers fail: with what is wrong and what to do, to be put after the file's name."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["BadFileError", "MissingReaderError", "needed"]


class BadFileError(Exception):
    """A file that cannot be read; the message goes on from the file's name."""


class MissingReaderError(Exception):
    """A package is not installed; the message is its name."""


def needed(module: str, package: str) -> Any:
    """Import a reader's library.

    Raises:
        MissingReaderError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingReaderError(package) from None
