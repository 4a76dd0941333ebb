"""A tiny model over a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvembed import CachedModel, KVStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BLOCK = 16


@pytest.fixture
def model(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Iterator[CachedModel]:
    """A tiny model over a store."""
    with KVStore(tmp_path / "store") as store:
        cached = CachedModel(tiny_llama(), tiny_tokenizer, store=store, block_size=BLOCK, progress=False)
        yield cached
        cached.close()
