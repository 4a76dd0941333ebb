"""Pictures of the screens: the conversation, the empty states, and everything that opens above them.

Made anew with ``pytest tests/chat --snapshot-update``, and looked at before they are committed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from kvembed_chat._app import ChatApp
from kvembed_chat._cli import Options
from kvembed_chat._engine import Conversation, Exchange
from kvembed_chat._screens import help as help_screen
from kvembed_chat._screens.dialogs import Ask, Choice
from kvembed_chat._screens.help import HelpScreen
from kvembed_chat._screens.models import ModelScreen
from kvembed_chat._screens.settings import SettingsScreen
from kvembed_chat._scripted import Reply, ScriptedEngine, usage
from kvembed_chat._widgets.empty import EmptyState
from kvembed_chat._widgets.gauges import TierGauges
from textual.widgets import OptionList

from ._pilot import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from textual.pilot import Pilot

CODE = (
    "Use a `with` block:\n\n```python\nwith open(path) as file:\n    print(file.read())\n```\n\n"
    "- it closes the file\n- also after an error"
)
SHORT = Conversation(
    "Files",
    "Be brief.",
    {"temperature": 0.7, "do_sample": True},
    (Exchange("How do I read a file?", CODE, usage(412, {"disk": 380}, 64, decode_s=3.2, ttft_s=0.2)),),
)
THOUGHT = Conversation(
    "Thinking",
    turns=(
        Exchange(
            "Is 91 a prime?",
            "<think>91 = 7 · 13.</think>\n\nNo: **7 · 13**.",
            usage(60, {"live": 40}, 30, decode_s=1.0, ttft_s=0.1),
        ),
    ),
)
LARGE_DARK = ((120, 40), "textual-dark", False)
SMALL_LIGHT = ((80, 24), "textual-light", False)
LOOKS = [
    pytest.param(*SMALL_LIGHT, id="80-light"),
    pytest.param(*LARGE_DARK, id="120-dark"),
    pytest.param((80, 24), "textual-dark", True, id="80-no-colour"),
]
Look = tuple[tuple[int, int], str, bool]


class Screens:
    """Takes one picture; see `take`."""

    def __init__(self, compare: Callable[..., bool], monkeypatch: pytest.MonkeyPatch) -> None:
        self._compare = compare
        self._patch = monkeypatch

    def take(
        self,
        look: Look,
        prepare: Callable[[Pilot[Any], ChatApp], Awaitable[None]],
        *,
        session: str | None = "Files",
        **engine: Any,
    ) -> None:
        """Compare the screen after ``prepare`` with its picture."""
        size, theme, no_color = look
        self._patch.setattr(help_screen, "config_file", lambda: "~/.config/kvembed/chat.toml")
        if no_color:
            self._patch.setenv("NO_COLOR", "1")
        app = ChatApp(ScriptedEngine(conversations=[SHORT, THOUGHT], **engine), Options(session=session, theme=theme))

        async def ready(pilot: Pilot[Any]) -> None:
            await until(pilot, lambda: app.screen is app.chat and app.chat.query_one(TierGauges)._tiers)
            await until(pilot, lambda: app.chat.query_one("#sessions", OptionList).option_count)
            await prepare(pilot, app)
            await pilot.pause()

        assert self._compare(app, terminal_size=size, run_before=ready)


@pytest.fixture
def screens(snap_compare: Callable[..., bool], monkeypatch: pytest.MonkeyPatch) -> Screens:
    return Screens(snap_compare, monkeypatch)


async def has_turns(pilot: Pilot[Any], app: ChatApp) -> None:
    await until(pilot, lambda: app.chat.transcript.views)
    await until(pilot, lambda: "reusable" in str(app.chat.query_one("#next").render()))


@pytest.mark.parametrize(("size", "theme", "no_color"), LOOKS)
def test_a_short_conversation_begins_at_the_top(
    screens: Screens, size: tuple[int, int], theme: str, no_color: bool
) -> None:
    screens.take((size, theme, no_color), has_turns)


@pytest.mark.parametrize(("size", "theme", "no_color"), LOOKS)
def test_nothing_said_yet(screens: Screens, size: tuple[int, int], theme: str, no_color: bool) -> None:
    async def prepare(pilot: Pilot[Any], app: ChatApp) -> None:
        await until(pilot, lambda: app.chat.query_one("#suggestions", OptionList).option_count == 3)

    screens.take((size, theme, no_color), prepare, session=None)


def test_no_model_yet(screens: Screens) -> None:
    async def prepare(pilot: Pilot[Any], app: ChatApp) -> None:
        await until(pilot, lambda: app.chat.query_one(EmptyState).display)

    screens.take(SMALL_LIGHT, prepare, session=None, model=None)


def test_thoughts_unfolded(screens: Screens) -> None:
    async def prepare(pilot: Pilot[Any], app: ChatApp) -> None:
        await has_turns(pilot, app)
        app.chat.transcript.focus()
        await until(pilot, lambda: app.chat.transcript.selected == 0)
        await pilot.press("space")

    screens.take(LARGE_DARK, prepare, session="Thinking")


def test_editing(screens: Screens) -> None:
    async def prepare(pilot: Pilot[Any], app: ChatApp) -> None:
        await has_turns(pilot, app)
        await pilot.press("ctrl+e")
        await until(pilot, lambda: "prefix kept" in str(app.chat.query_one("#next").render()))

    screens.take(SMALL_LIGHT, prepare)


@pytest.mark.parametrize(
    ("action", "screen", "look"),
    [
        pytest.param("rename", Ask, SMALL_LIGHT, id="rename"),
        pytest.param("export", Ask, LARGE_DARK, id="export"),
        pytest.param("settings", SettingsScreen, SMALL_LIGHT, id="settings-80-light"),
        pytest.param("settings", SettingsScreen, LARGE_DARK, id="settings-120-dark"),
        pytest.param("models", ModelScreen, SMALL_LIGHT, id="models-80-light"),
        pytest.param("models", ModelScreen, LARGE_DARK, id="models-120-dark"),
        pytest.param("app.help", HelpScreen, SMALL_LIGHT, id="help-80-light"),
        pytest.param("app.help", HelpScreen, LARGE_DARK, id="help-120-dark"),
    ],
)
def test_what_opens(screens: Screens, action: str, screen: type[Any], look: Look) -> None:
    async def prepare(pilot: Pilot[Any], app: ChatApp) -> None:
        await has_turns(pilot, app)
        await app.chat.run_action(action)
        await until(pilot, lambda: isinstance(app.screen, screen))

    screens.take(look, prepare)


def test_a_full_context(screens: Screens) -> None:
    async def prepare(pilot: Pilot[Any], app: ChatApp) -> None:
        await has_turns(pilot, app)
        await pilot.press(*"more", "enter")
        await until(pilot, lambda: isinstance(app.screen, Choice))

    screens.take(SMALL_LIGHT, prepare, replies=[Reply()], context=60)


def test_a_deleted_session_is_told(screens: Screens) -> None:
    async def prepare(pilot: Pilot[Any], app: ChatApp) -> None:
        await has_turns(pilot, app)
        app.chat.action_delete_session()
        await until(pilot, lambda: app.chat.current is None and app.screen.query("Toast"))
        await until(pilot, lambda: app.chat.query_one("#sessions", OptionList).option_count == 1)

    screens.take(LARGE_DARK, prepare)
