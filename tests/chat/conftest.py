"""Tests of the app are coroutines, and see neither the machine's colours nor a blinking cursor."""

from __future__ import annotations

import asyncio
import inspect

import pytest
from pytest_textual_snapshot import SVGImageExtension
from textual.widgets import TextArea

# Under the name that syrupy has it by now; without it pictures would be called .raw.
SVGImageExtension.file_extension = "svg"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine in a loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    given = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    asyncio.run(pyfuncitem.obj(**given))
    return True


@pytest.fixture(autouse=True)
def _still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(TextArea, "cursor_blink", False)
