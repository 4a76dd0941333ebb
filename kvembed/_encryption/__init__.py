"""Encryption at rest: keys and where they come from, encrypted files, and the marker of an encrypted store."""

from __future__ import annotations

__all__: list[str] = []
