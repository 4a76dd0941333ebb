"""What differs between the supported versions of transformers; everything else in kvembed is written for all of them.

Names are looked up rather than versions compared wherever that says the same, because a fork or a release made from the
main branch may have one without the other.
"""

from __future__ import annotations

from typing import Any

from transformers import cache_utils

__all__ = ["DummyLayer"]


class _NoSuchLayer:
    """Stands for a layer class this version does not have; no layer is one."""


DummyLayer: Any = getattr(cache_utils, "DummyLayer", _NoSuchLayer)
"""Layers that never hold anything. Before 5.22 they are empty linear ones, or left out of the cache."""
