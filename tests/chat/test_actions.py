"""Every other action, with the keys."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kvembed_chat._app import ChatApp
from kvembed_chat._cli import Options
from kvembed_chat._engine import Conversation, Exchange
from kvembed_chat._screens.dialogs import Ask, Choice
from kvembed_chat._screens.help import HelpScreen
from kvembed_chat._screens.models import ModelScreen
from kvembed_chat._screens.settings import SettingsScreen
from kvembed_chat._scripted import Reply, ScriptedEngine, usage
from kvembed_chat._widgets.empty import EmptyState
from kvembed_chat._widgets.prompt import Completions
from kvembed_chat._widgets.sidebar import Sidebar
from textual import events
from textual.widgets import Collapsible, Input, OptionList, TextArea

from ._pilot import until

if TYPE_CHECKING:
    from textual.pilot import Pilot

CODE = "Like this:\n\n```python\nx = 1\n```\n\nor\n\n```\ny = 2\n```"
TALK = Conversation(
    "Kernels",
    None,
    {"temperature": 0.7, "do_sample": True},
    (
        Exchange("What is a warp?", "32 threads.", usage(30)),
        Exchange("Show me.", f"<think>Code is best.</think>\n\n{CODE}", usage(60, {"live": 50})),
    ),
)
OTHER = Conversation("Trip plan", turns=(Exchange("Where to?", "To the lighthouse.", usage(20)),))


async def opened(pilot: Pilot[None], app: ChatApp) -> None:
    """Wait until the session of the command line is shown."""
    await until(pilot, lambda: app.chat.transcript.views and app.chat.query_one("#sessions", OptionList).option_count)


def chat(*, session: str | None = "Kernels") -> tuple[ScriptedEngine, ChatApp]:
    engine = ScriptedEngine(conversations=[TALK, OTHER])
    return engine, ChatApp(engine, Options(session=session))


async def test_search_finds_words_in_conversations_and_opens_one() -> None:
    _, app = chat()
    async with app.run_test() as pilot:
        await opened(pilot, app)
        await pilot.press("ctrl+f", *"lighthouse")
        await until(pilot, lambda: app.chat.query_one("#sessions", OptionList).option_count == 1)
        await pilot.press("enter")
        await until(pilot, lambda: app.chat.current == "Trip plan")
        assert app.chat.prompt.has_focus


async def test_the_sidebar_is_folded_on_narrow_screens() -> None:
    _, app = chat()
    async with app.run_test(size=(80, 24)) as pilot:
        await opened(pilot, app)
        sidebar = app.chat.query_one(Sidebar)
        assert not sidebar.display
        await pilot.press("ctrl+b")
        assert sidebar.display
        await pilot.press("f3")
        assert not sidebar.display
        await pilot.resize_terminal(120, 40)
        await until(pilot, lambda: not sidebar.display)  # hidden on purpose
        await pilot.press("ctrl+b")
        assert sidebar.display


async def test_rename_fork_delete_and_undo_in_the_list() -> None:
    engine, app = chat()
    async with app.run_test(size=(120, 40)) as pilot:
        await opened(pilot, app)
        app.chat.query_one("#sessions", OptionList).focus()
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, Ask))
        await pilot.press("end", "!", "enter")
        await until(pilot, lambda: app.chat.current == "Kernels!")
        app.chat.query_one("#sessions", OptionList).focus()
        await pilot.press("f")
        await until(pilot, lambda: isinstance(app.screen, Ask))
        await pilot.press("enter")
        await until(pilot, lambda: app.chat.current == "Kernels! (fork)")
        assert len(app.chat.transcript.views) == 2
        await until(pilot, lambda: app.chat.query_one("#sessions", OptionList).option_count == 3)
        app.chat.query_one("#sessions", OptionList).focus()
        await pilot.press("d")
        await until(pilot, lambda: app.chat.current is None)
        assert [item.name for item in engine.sessions()] == ["Kernels!", "Trip plan"]
        await until(pilot, lambda: app.chat.query_one("#sessions", OptionList).option_count == 2)
        app.chat.query_one("#sessions", OptionList).focus()
        await pilot.press("u")
        await until(pilot, lambda: app.chat.current == "Kernels! (fork)")


async def test_a_picked_turn_is_copied_forked_left_out_and_edited() -> None:
    engine, app = chat()
    async with app.run_test() as pilot:
        await opened(pilot, app)
        app.chat.transcript.focus()
        await until(pilot, lambda: app.chat.transcript.selected == 1)
        await pilot.press("b")
        assert app.clipboard == "y = 2"
        await pilot.press("b")
        assert app.clipboard == "x = 1"
        await pilot.press("c")
        assert app.clipboard == CODE
        thought = app.chat.transcript.views[1].query_one(Collapsible)
        assert thought.collapsed
        await pilot.press("space")
        assert not thought.collapsed
        await pilot.press("up", "c")
        assert app.clipboard == "32 threads."
        await pilot.press("f")
        await until(pilot, lambda: isinstance(app.screen, Ask))
        await pilot.press("enter")
        await until(pilot, lambda: app.chat.current == "Kernels (fork)")
        assert len(engine.open("Kernels (fork)").turns) == 1  # forked at that turn
        app.chat.transcript.focus()
        await pilot.press("x")
        await until(pilot, lambda: not engine.open("Kernels (fork)").turns and not app.chat.transcript.views)
        await app.chat.run_action("undo_turn")
        await until(pilot, lambda: len(app.chat.transcript.views) == 1)
        app.chat.transcript.focus()
        await pilot.press("e")
        await until(pilot, lambda: app.chat.prompt.text == "What is a warp?")


async def test_export_writes_a_new_private_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, app = chat()
    async with app.run_test() as pilot:
        await opened(pilot, app)
        for _ in range(2):  # the second time the file is there already
            await app.chat.run_action("export")
            await until(pilot, lambda: isinstance(app.screen, Ask))
            assert app.screen.query_one(Input).value == "kernels.md"
            await pilot.press("enter")
            await until(pilot, lambda: not isinstance(app.screen, Ask))
            await until(pilot, lambda: not app.chat.workers or len(app._notifications))
        await until(pilot, lambda: any("give another name" in toast.message for toast in app._notifications))
    file = tmp_path / "kernels.md"
    assert file.read_text(encoding="utf-8").startswith("# Kernels")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


async def test_settings_are_checked_and_kept() -> None:
    engine, app = chat()
    async with app.run_test() as pilot:
        await opened(pilot, app)
        await pilot.press("f4")
        await until(pilot, lambda: isinstance(app.screen, SettingsScreen))
        app.screen.query_one("#system", TextArea).text = "Be brief."
        assert app.screen.query_one("#temperature", Input).value == "0.7"
        app.screen.query_one("#top_p", Input).value = "7"
        await pilot.press("ctrl+s")
        assert "from 0 to 1" in str(app.screen.query_one("#wrong").render())
        app.screen.query_one("#top_p", Input).value = "0.9"
        await pilot.press("ctrl+s")
        await until(pilot, lambda: engine.open("Kernels").settings.get("top_p"))
        assert engine.open("Kernels").settings == {"temperature": 0.7, "do_sample": True, "top_p": 0.9}
        assert engine.open("Kernels").system == "Be brief."


async def test_a_model_is_chosen_and_loaded_and_what_was_sent_waits_for_it() -> None:
    engine = ScriptedEngine([Reply(["Here."])], model=None)
    app = ChatApp(engine)
    async with app.run_test() as pilot:
        await until(pilot, lambda: app.chat.query_one(EmptyState).display)
        await pilot.press(*"hi", "enter")  # nobody there to answer: the picker opens
        await until(pilot, lambda: isinstance(app.screen, ModelScreen))
        engine.gate.clear()
        await pilot.press("down", "enter")
        await until(pilot, lambda: app.chat.is_loading and engine.waiting.is_set())
        await until(pilot, lambda: "40 B of 100 B" in str(app.chat.query_one("#doing").render()))
        await pilot.press("enter")
        assert app.chat.prompt.text == ""
        engine.gate.set()
        await until(pilot, lambda: app.chat.transcript.views and not app.chat.is_busy)
        assert ("load", "gemma3-270m") in engine.calls
        assert engine.open("hi").turns[0].reply == "Here."


async def test_the_first_suggestion_loads_a_small_model() -> None:
    engine = ScriptedEngine(model=None)
    app = ChatApp(engine)
    async with app.run_test() as pilot:
        await until(pilot, lambda: app.chat.query_one("#suggestions", OptionList).option_count == 3)
        await pilot.press("down")
        await until(pilot, lambda: app.chat.query_one("#suggestions").has_focus)
        await pilot.press("enter")
        await until(pilot, lambda: engine.model is not None and not app.chat.is_loading)
        assert ("load", "smollm2") in engine.calls


async def test_a_model_that_cannot_be_loaded_is_a_toast() -> None:
    engine = ScriptedEngine(model=None)
    engine.load_error = OSError("no such model")
    app = ChatApp(engine, Options(model="nothing"))
    async with app.run_test() as pilot:
        await until(pilot, lambda: any("no such model" in toast.message for toast in app._notifications))
        assert not app.chat.is_loading


async def test_files_are_completed_and_attached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("report.txt").write_text("A report.", encoding="utf-8")
    Path("readme.md").write_text("Another.", encoding="utf-8")
    engine = ScriptedEngine([Reply(["Grew."])])
    app = ChatApp(engine)
    async with app.run_test() as pilot:
        await pilot.press(*"@re")
        box = app.chat.query_one(Completions)
        await until(pilot, lambda: box.display and box.option_count == 2)
        await pilot.press("down", "tab")
        await until(pilot, lambda: app.chat.prompt.text == "@report.txt ")
        engine.gate.clear()
        await pilot.press(*"why", "enter")
        await until(pilot, lambda: "256 of 1,024 tokens" in str(app.chat.query_one("#doing").render()))
        engine.gate.set()
        await until(pilot, lambda: app.chat.transcript.views and not app.chat.is_busy)
        turn = engine.open("why").turns[0]
        assert (turn.user, turn.documents) == ("why", ("report.txt",))


async def test_a_document_that_is_stopped_gives_the_words_back(tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("A report.", encoding="utf-8")
    engine = ScriptedEngine()
    engine.gate.clear()
    app = ChatApp(engine, Options(document=tmp_path / "report.txt"))
    async with app.run_test() as pilot:
        await until(pilot, engine.waiting.is_set)
        await pilot.press("escape")
        await until(pilot, lambda: not app.chat.is_busy)
        assert app.chat.prompt.text == f"@{tmp_path / 'report.txt'}"


@pytest.mark.parametrize("answer", ["drop", "cancel"])
async def test_a_full_context_is_a_question(answer: str) -> None:
    engine = ScriptedEngine([Reply(["Well."])], [TALK], context=60)
    app = ChatApp(engine, Options(session="Kernels"))
    async with app.run_test() as pilot:
        await opened(pilot, app)
        await pilot.press(*"more", "enter")
        await until(pilot, lambda: isinstance(app.screen, Choice))
        await pilot.press("enter" if answer == "drop" else "escape")
        await until(pilot, lambda: not app.chat.is_busy)
        assert len(engine.open("Kernels").turns) == (3 if answer == "drop" else 2)
        assert app.chat.prompt.text == ("" if answer == "drop" else "more")
        assert len(app.chat.transcript.views) == (3 if answer == "drop" else 2)


async def test_several_lines_a_paste_and_history() -> None:
    engine, app = chat()
    async with app.run_test() as pilot:
        await opened(pilot, app)
        await pilot.press("a", "ctrl+j")
        assert app.chat.prompt.text == "a\n"
        app.post_message(events.Paste("b\nc"))  # as the terminal brings it
        await until(pilot, lambda: app.chat.prompt.text == "a\nb\nc")
        await pilot.press("enter")
        await until(pilot, lambda: ("send", "Kernels", "a\nb\nc", None) in engine.calls and not app.chat.is_busy)
        await pilot.press("d", "up")
        assert app.chat.prompt.text == "a\nb\nc"
        app.chat.prompt.move_cursor((0, 0))
        await pilot.press("up")
        assert app.chat.prompt.text == "Show me."
        await pilot.press("down")
        app.chat.prompt.move_cursor(app.chat.prompt.document.end)
        await pilot.press("down")
        assert app.chat.prompt.text == "d"


async def test_a_new_conversation_help_and_the_theme(tmp_path: Path) -> None:
    _, app = chat()
    async with app.run_test() as pilot:
        await opened(pilot, app)
        await pilot.press("f1")
        await until(pilot, lambda: isinstance(app.screen, HelpScreen))
        await pilot.press("escape", "ctrl+n")
        await until(pilot, lambda: app.chat.current is None and app.chat.query_one(EmptyState).display)
        app.theme = "nord"
        await pilot.pause()
    from kvembed_chat._config import config_file, read_config

    assert read_config().theme == "nord"
    config_file().write_text('# mine\nmodel = "smollm2"\ntheme = "nord"\n', encoding="utf-8")
    async with ChatApp(ScriptedEngine(), Options(theme="nord")).run_test() as pilot:
        pilot.app.theme = "gruvbox"
        await pilot.pause()
    assert config_file().read_text(encoding="utf-8") == '# mine\nmodel = "smollm2"\ntheme = "gruvbox"\n'


async def test_a_warning_of_the_cache_is_a_toast() -> None:
    engine, app = chat()
    async with app.run_test() as pilot:
        await opened(pilot, app)
        assert engine.on_warning is not None
        engine.on_warning("a damaged block was set aside")
        await until(pilot, lambda: any("damaged block" in toast.message for toast in app._notifications))


async def test_a_document_of_the_command_line_waits_for_its_model(tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("A report.", encoding="utf-8")
    engine = ScriptedEngine(model=None)
    app = ChatApp(engine, Options(model="smollm2", session="Report", document=tmp_path / "report.txt"))
    async with app.run_test() as pilot:
        await until(pilot, lambda: "Report" in [item.name for item in engine.sessions()])
        await until(pilot, lambda: engine.open("Report").pending == ("report.txt",) and not app.chat.is_busy)
        assert engine.calls[-2:] == [("load", "smollm2"), ("attach", "Report", "report.txt")]
