"""Fixtures of the tests with other libraries: a lab as on the model side, and one thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed import attach, detach
from tests.model._lab import BLOCK, Lab

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvembed import CachedModel


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """Stores and cached models that are closed and checked after the test."""
    lab = Lab(tmp_path)
    yield lab
    lab.finish()


@pytest.fixture
def cached(lab: Lab, tiny_llama: Any) -> Iterator[CachedModel]:
    """The cache of a model it is attached to; the model itself is ``hf_model``."""
    cached = attach(tiny_llama(), store=lab.store(), block_size=BLOCK, progress=False)
    yield cached
    detach(cached.hf_model)
