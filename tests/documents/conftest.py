"""The model of these tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kvembed import CachedModel

BLOCK = 16  # of `tiny_cached`


@pytest.fixture
def model(tiny_cached: CachedModel) -> CachedModel:
    """A tiny model over a store."""
    return tiny_cached
