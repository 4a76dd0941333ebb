"""Fixtures of the CUDA extension's tests."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._mock import Kit, MockDriver

# An sdist of kvembed has these tests, but not the extension, which is a package of its own.
collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("native_build") is None else []


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
