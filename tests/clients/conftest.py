"""Fixtures of the tests with other libraries: a lab as on the model side, and one thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.model._lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
