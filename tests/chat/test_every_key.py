"""Every key and every command of the palette has a test; a new one without fails here."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvembed_chat
import pytest
from kvembed_chat._app import ChatApp
from kvembed_chat._cli import Options
from kvembed_chat._commands import COMMANDS
from kvembed_chat._screens.dialogs import Ask, Choice
from kvembed_chat._screens.inspector import InspectorScreen
from kvembed_chat._screens.models import ModelScreen
from kvembed_chat._screens.settings import SettingsScreen
from kvembed_chat._scripted import Reply, ScriptedEngine
from textual.binding import Binding
from textual.widgets import OptionList

from ._pilot import until
from .test_actions import OTHER, TALK, chat, opened

if TYPE_CHECKING:
    from collections.abc import Callable

TESTED: dict[str, dict[str, str]] = {
    "ChatApp": {"quit": "test_talking", "help": "test_actions"},
    "ChatScreen": {
        "back": "test_talking",
        "new_session": "test_actions",
        "regenerate": "test_talking",
        "edit_last": "test_talking",
        "search": "test_actions",
        "models": "test_every_key",
        "sidebar": "test_actions",
        "cache": "test_inspector",
        "settings": "test_actions",
    },
    "_Sessions": {
        "search": "test_every_key",
        "verb('rename')": "test_actions",
        "verb('fork')": "test_actions",
        "verb('delete')": "test_actions",
        "verb('undelete')": "test_actions",
        "verb('new')": "test_every_key",
        "cursor_down": "test_every_key",
        "cursor_up": "test_every_key",
    },
    "Prompt": {"submit": "test_talking", "newline": "test_actions"},
    "Transcript": {
        "pick(-1)": "test_actions",
        "pick(1)": "test_every_key",
        "turn('edit')": "test_actions",
        "turn('copy')": "test_actions",
        "turn('copy_code')": "test_actions",
        "turn('fork')": "test_actions",
        "turn('delete')": "test_actions",
        "turn('undo')": "test_every_key",
        "fold": "test_actions",
        "all": "test_every_key",
    },
    "SettingsScreen": {"cancel": "test_every_key", "save": "test_actions"},
    "ModelScreen": {"cancel": "test_every_key", "move(-1)": "test_every_key", "move(1)": "test_actions"},
    "Choice": {
        "cancel": "test_actions",
        "app.focus_previous": "test_every_key",
        "app.focus_next": "test_inspector",
    },
    "Ask": {"cancel": "test_every_key"},
    "HelpScreen": {"app.pop_screen": "test_actions"},
    "InspectorScreen": {
        "back": "test_inspector",
        "leave": "test_inspector",
        "pin": "test_inspector",
        "evict": "test_inspector",
        "verify": "test_inspector",
        "forget": "test_inspector",
        "words": "test_inspector",
        "filter": "test_inspector",
        "sort": "test_inspector",
        "reload": "test_inspector",
    },
    "_Table": {
        "cursor_down": "test_every_key",
        "cursor_up": "test_every_key",
        "scroll_top": "test_every_key",
        "scroll_bottom": "test_inspector",
    },
}
"""The file that presses a key of each action, class by class."""


def declared() -> dict[str, dict[str, list[str]]]:
    """Return the keys of each action of each class of the app."""
    found: dict[str, dict[str, list[str]]] = {}
    for info in pkgutil.walk_packages(kvembed_chat.__path__, "kvembed_chat."):
        if info.name.endswith("__main__"):
            continue
        for _, cls in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
            if cls.__module__ == info.name and "BINDINGS" in vars(cls):
                for binding in vars(cls)["BINDINGS"]:
                    assert isinstance(binding, Binding)
                    found.setdefault(cls.__name__, {}).setdefault(binding.action, []).extend(binding.key.split(","))
    return found


def test_every_key_has_a_test() -> None:
    keys = declared()
    assert {name: sorted(actions) for name, actions in keys.items()} == {
        name: sorted(actions) for name, actions in TESTED.items()
    }
    for name, actions in TESTED.items():
        for action, file in actions.items():
            source = (Path(__file__).parent / f"{file}.py").read_text(encoding="utf-8")
            assert any(f'"{key}"' in source for key in keys[name][action]), (name, action)


async def test_keys_of_the_list_of_sessions() -> None:
    _, app = chat()
    async with app.run_test(size=(120, 40)) as pilot:
        await opened(pilot, app)
        sessions = app.chat.query_one("#sessions", OptionList)
        sessions.focus()
        first = sessions.highlighted
        await pilot.press("j")
        assert sessions.highlighted != first
        await pilot.press("k")
        assert sessions.highlighted == first
        await pilot.press("slash")
        assert app.chat.query_one("#search").has_focus
        sessions.focus()
        await pilot.press("n")
        await until(pilot, lambda: app.chat.current is None)


async def test_keys_of_the_transcript() -> None:
    engine, app = chat()
    async with app.run_test() as pilot:
        await opened(pilot, app)
        transcript = app.chat.transcript
        transcript.focus()
        await until(pilot, lambda: transcript.selected == 1)
        await pilot.press("up", "up")
        assert transcript.selected == 0
        await pilot.press("down")
        assert transcript.selected == 1
        await pilot.press("x")
        await until(pilot, lambda: len(engine.open("Kernels").turns) == 1 and len(transcript.views) == 1)
        transcript.focus()
        await pilot.press("u")
        await until(pilot, lambda: len(engine.open("Kernels").turns) == 2 and len(transcript.views) == 2)
        transcript.focus()
        await pilot.press("home")
        await until(pilot, lambda: transcript.scroll_offset.y == 0)


async def test_dialogs_are_left_without_a_change() -> None:
    engine, app = chat()
    async with app.run_test() as pilot:
        await opened(pilot, app)
        await pilot.press("f4")
        await until(pilot, lambda: isinstance(app.screen, SettingsScreen))
        await pilot.press("escape")
        await pilot.press("ctrl+o")
        await until(pilot, lambda: isinstance(app.screen, ModelScreen))
        models = app.screen.query_one("#models", OptionList)
        await until(pilot, lambda: models.option_count > 1)
        before = models.highlighted
        await pilot.press("down", "up")
        assert models.highlighted == before
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is app.chat)
        app.chat.action_rename()
        await until(pilot, lambda: isinstance(app.screen, Ask))
        await pilot.press("x", "escape")
        await until(pilot, lambda: app.screen is app.chat)
        assert [item.name for item in engine.sessions()] == ["Kernels", "Trip plan"]
        assert not any(call[0] in ("load", "rename", "settings") for call in engine.calls)


async def test_keys_of_the_inspector_and_its_question() -> None:
    _, app = chat()
    async with app.run_test() as pilot:
        await opened(pilot, app)
        await pilot.press("f2")
        await until(pilot, lambda: isinstance(app.screen, InspectorScreen) and app.screen._shown)
        assert isinstance(app.screen, InspectorScreen)
        table = app.screen.table
        await pilot.press("j", "j")
        assert table.cursor_row == 2
        await pilot.press("k")
        assert table.cursor_row == 1
        await pilot.press("end", "home")
        assert table.cursor_row == 0
        await pilot.press("x")
        await until(pilot, lambda: isinstance(app.screen, Choice) and app.screen.focused)
        first = app.screen.focused
        await pilot.press("right")
        assert app.screen.focused is not first
        await pilot.press("left")
        assert app.screen.focused is first
        await pilot.press("escape")


# What shows that a command of the palette did something.
DONE: dict[str, Callable[[ChatApp, ScriptedEngine], Any]] = {
    "new_session": lambda app, _: app.chat.current is None,
    "search": lambda app, _: app.chat.query_one("#search").has_focus,
    "rename": lambda app, _: isinstance(app.screen, Ask),
    "fork": lambda app, _: isinstance(app.screen, Ask),
    "delete_session": lambda app, engine: [item.name for item in engine.sessions()] == ["Trip plan"],
    "undelete": lambda app, _: any("Nothing was deleted" in toast.message for toast in app._notifications),
    "settings": lambda app, _: isinstance(app.screen, SettingsScreen),
    "export": lambda app, _: isinstance(app.screen, Ask),
    "regenerate": lambda app, engine: ("regenerate", "Kernels", "", None) in engine.calls and not app.chat.is_busy,
    "edit_last": lambda app, _: app.chat.editing == 1,
    "undo_turn": lambda app, _: any("Nothing to take back" in toast.message for toast in app._notifications),
    "copy_reply": lambda app, _: app.clipboard.startswith("Like this:"),
    "copy_code": lambda app, _: app.clipboard == "y = 2",
    "attach": lambda app, _: app.chat.prompt.text == "@",
    "models": lambda app, _: isinstance(app.screen, ModelScreen),
    "cache": lambda app, _: isinstance(app.screen, InspectorScreen),
    "sidebar": lambda app, _: app.chat.query_one("#sidebar").display,
}


@pytest.mark.parametrize(("title", "action"), [(title, action) for title, _, action in COMMANDS])
async def test_commands_of_the_palette(title: str, action: str) -> None:
    engine = ScriptedEngine([Reply(["Other."])], [TALK, OTHER])
    app = ChatApp(engine, Options(session="Kernels"))
    async with app.run_test(size=(80, 24)) as pilot:
        await opened(pilot, app)
        assert not DONE[action](app, engine)
        await pilot.press("ctrl+p")
        await until(pilot, lambda: app.screen.query("CommandList"))
        await pilot.press(*title[-6:])
        options = app.screen.query_one("CommandList", OptionList)

        def place() -> int | None:
            return next((i for i, option in enumerate(options.options) if title in str(option.prompt)), None)

        await until(pilot, lambda: place() is not None)
        options.highlighted = place()
        await pilot.press("enter")
        await until(pilot, lambda: DONE[action](app, engine))
