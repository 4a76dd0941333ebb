"""Collects what the tests of this folder find, and writes or checks the support matrix with it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from ._record import PAGE, Record, render

if TYPE_CHECKING:
    from collections.abc import Iterator

_RECORD = pytest.StashKey[Record]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORD] = Record()


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Record:
    """Results of this run."""
    return request.config.stash[_RECORD]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # transformers says of many families that a kernel is missing
    yield
    logging.disable(logging.NOTSET)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--support-matrix") == "write" and exitstatus == 0:
        import transformers

        PAGE.write_text(render(session.config.stash[_RECORD], transformers.__version__), encoding="utf-8")
