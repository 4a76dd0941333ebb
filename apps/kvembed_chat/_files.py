"""Files that are named with an ``@`` in what people write."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["attachments", "completions"]

_MOST = 50
_NAMED = re.compile(r"(?:^|(?<=\s))@(\S+)")


def completions(word: str, folder: Path) -> list[str]:
    """Return names that begin like ``word``, of folders (with a slash) and files; one folder is read, no more.

    Args:
        word: What was typed after the ``@``.
        folder: Where relative names start.
    """
    head, slash, tail = word.rpartition("/")
    place = folder / Path(head + slash).expanduser()
    found: list[str] = []
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                hidden = entry.name.startswith(".") and not tail.startswith(".")
                if hidden or not entry.name.lower().startswith(tail.lower()) or " " in entry.name:
                    continue
                found.append(head + slash + entry.name + ("/" if entry.is_dir() else ""))
    except OSError:
        return []
    return sorted(found, key=str.lower)[:_MOST] if found != [word] else []


def attachments(text: str, folder: Path) -> tuple[list[Path], str]:
    """Return the files named in a text, and the text without their names; other words with an ``@`` stay."""
    files: list[Path] = []

    def take(match: re.Match[str]) -> str:
        path = folder / Path(match.group(1)).expanduser()
        try:
            is_file = path.is_file()
        except (OSError, ValueError):
            is_file = False
        if not is_file:
            return match.group(0)
        if path not in files:
            files.append(path)
        return ""

    rest = _NAMED.sub(take, text)
    return files, re.sub(r"[ \t]{2,}", " ", rest).strip() if files else text.strip()
