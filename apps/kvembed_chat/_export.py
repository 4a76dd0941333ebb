"""Writing a conversation to a file."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["default_export", "kind_of", "write_export"]


def default_export(name: str) -> str:
    """Return a file name for a session."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.").lower()[:60] + ".md"


def kind_of(path: str) -> str:
    """Return the kind of export a file name asks for.

    Raises:
        ValueError: It ends in something else.
    """
    suffix = Path(path).suffix.lower()
    if suffix in ("", ".md"):
        return "md"
    if suffix == ".json":
        return "json"
    raise ValueError(f"export to a file that ends in .md or .json, not {suffix}")


def write_export(path: str, text: str) -> Path:
    """Write a new file; it may be private, so only its owner may read it.

    Raises:
        FileExistsError: There is one of this name.
    """
    file = Path(path).expanduser().absolute()
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
        out.write(text)
    return file
