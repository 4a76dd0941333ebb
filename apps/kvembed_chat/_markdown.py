"""Code blocks in a Markdown text."""

from __future__ import annotations

import re

__all__ = ["code_blocks"]

_FENCE = re.compile(r"^(`{3,}|~{3,})[^\n]*\n(.*?)(?:^\1`*~*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)


def code_blocks(text: str) -> list[str]:
    """Return what stands in the fenced code blocks of a text, in order; one that is not closed counts too."""
    return [match.group(2).rstrip("\n") for match in _FENCE.finditer(text)]
