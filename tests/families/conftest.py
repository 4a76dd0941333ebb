"""Collects what the tests of this folder find, and writes or checks the support matrix with it."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import TYPE_CHECKING

import pytest

from ._record import PAGE, Record, missing_rows, render

if TYPE_CHECKING:
    from collections.abc import Iterator

_RECORD = pytest.StashKey[Record]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORD] = Record()
    if config.getoption("--support-matrix") == "write" and config.getoption("numprocesses", None):
        raise pytest.UsageError("--support-matrix=write needs all results in one process: leave out -n")


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[Record]:
    """Results of this run; after each file the committed page must have the rows that the run has whole."""
    found = request.config.stash[_RECORD]
    yield found
    page = PAGE.read_text(encoding="utf-8")
    # A page of another version of transformers has other reasons in it.
    if request.config.getoption("--support-matrix") == "check" and f"transformers {version('transformers')}." in page:
        assert missing_rows(found, page) == []


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # transformers says of many families that a kernel is missing
    yield
    logging.disable(logging.NOTSET)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--support-matrix") == "write" and exitstatus == 0:
        PAGE.write_text(render(session.config.stash[_RECORD], version("transformers")), encoding="utf-8")
