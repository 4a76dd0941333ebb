"""Fixtures of the CUDA extension's tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cuda_ext._mock import Kit, MockDriver

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def kit(cuda_kit: Kit) -> Kit:
    """The library and the mock driver, compiled once."""
    return cuda_kit


@pytest.fixture
def driver(kit: Kit) -> Iterator[MockDriver]:
    """The extension over a driver of CUDA 13.0 with one GPU; nothing that a driver would not forgive may happen."""
    with kit.open() as made:
        yield made
        assert made.violations == []
        assert made.mock.mock_depth() == 0  # the thread's own context is current again
