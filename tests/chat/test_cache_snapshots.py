"""Pictures of the cache made visible: the bar under replies, the gauges, and the inspector.

Made anew with ``pytest tests/chat --snapshot-update``, and looked at before they are committed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from kvembed_chat._app import ChatApp
from kvembed_chat._cli import Options
from kvembed_chat._engine import Conversation, Exchange
from kvembed_chat._screens.inspector import InspectorScreen
from kvembed_chat._scripted import ScriptedEngine, usage
from kvembed_chat._widgets.gauges import TierGauges

from ._pilot import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.pilot import Pilot

REPORT = Conversation(
    "Q3 report",
    turns=(
        Exchange(
            "What drove the margin change?",
            "Gross margin rose 2.1 points, mainly because of **lower freight costs**.",
            usage(14_336, {"live": 2102, "cpu": 2816, "disk": 9216}, 312, decode_s=7.5, ttft_s=0.61),
            documents=("q3-report.txt",),
        ),
        Exchange(
            "And versus last year?",
            "It was flat last year.",
            usage(4096, None, 80, ttft_s=4.2, miss_reason="evicted from token 2,048 on"),
        ),
    ),
)
LOOKS = [
    pytest.param((80, 24), "textual-dark", False, id="80-dark"),
    pytest.param((120, 40), "textual-light", False, id="120-light"),
    pytest.param((120, 40), "textual-dark", True, id="120-no-colour"),
    pytest.param((80, 24), "textual-light", True, id="80-no-colour"),
]


def app(theme: str, no_color: bool, monkeypatch: pytest.MonkeyPatch) -> ChatApp:
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    engine = ScriptedEngine(conversations=[REPORT, Conversation("Trip plan")])
    return ChatApp(engine, Options(session="Q3 report", theme=theme))


async def is_ready(pilot: Pilot[Any]) -> None:
    """Wait for the transcript, the gauges and the preview."""
    chat = pilot.app.chat  # pyright: ignore[reportAttributeAccessIssue]
    await until(pilot, lambda: len(chat.transcript.views) == 2 and chat.query_one(TierGauges)._tiers)
    await until(pilot, lambda: "reusable" in str(chat.query_one("#next").render()))


@pytest.mark.parametrize(("size", "theme", "no_color"), LOOKS)
def test_the_bar_and_the_gauges(
    snap_compare: Callable[..., bool],
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    theme: str,
    no_color: bool,
) -> None:
    assert snap_compare(app(theme, no_color, monkeypatch), terminal_size=size, run_before=is_ready)


@pytest.mark.parametrize(("size", "theme", "no_color"), LOOKS)
def test_the_inspector(
    snap_compare: Callable[..., bool],
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    theme: str,
    no_color: bool,
) -> None:
    async def look(pilot: Pilot[Any]) -> None:
        await is_ready(pilot)
        await pilot.press("f2")
        await until(pilot, lambda: isinstance(pilot.app.screen, InspectorScreen) and pilot.app.screen._shown)
        await pilot.press("down")
        await pilot.pause()

    assert snap_compare(app(theme, no_color, monkeypatch), terminal_size=size, run_before=look)
