"""Codecs of blocks below the live tier: their names and order, their arithmetic, and blocks stored in them."""

from __future__ import annotations

__all__: list[str] = []
