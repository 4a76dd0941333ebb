"""Sending, streaming, stopping and leaving, with the keys."""

from __future__ import annotations

import pytest
from kvembed_chat._app import ChatApp
from kvembed_chat._cli import Options
from kvembed_chat._engine import Conversation, Exchange
from kvembed_chat._scripted import Reply, ScriptedEngine, usage
from kvembed_chat._widgets.turn import TurnView
from kvembed_chat._widgets.turn_bar import TurnBar
from textual.widgets import Markdown, Static

from ._pilot import until

TWO_TURNS = Conversation(
    "Kernels",
    None,
    {},
    (
        Exchange("What is a warp?", "32 threads.", usage(30)),
        Exchange("And a block?", "Many warps.", usage(60, {"live": 50})),
    ),
)


def answer(view: TurnView) -> str:
    return view.query_one(Markdown).source


async def test_a_message_is_answered_piece_by_piece() -> None:
    engine = ScriptedEngine([Reply(["It ", "is ", "**fine**."], usage(40, {"disk": 30}))])
    app = ChatApp(engine)
    async with app.run_test() as pilot:
        await pilot.press(*"hello", "enter")
        await until(pilot, lambda: app.chat.conversation and not app.chat.is_busy)
        (view,) = app.chat.transcript.views
        assert answer(view) == "It is **fine**."
        assert "75.0 % cached" in str(view.query_one(TurnBar).render())
        assert app.chat.current == "hello"  # named after what was said first
        assert app.chat.prompt.text == ""
    assert ("send", "hello", "hello", None) in engine.calls


async def test_typing_while_the_engine_blocks() -> None:
    engine = ScriptedEngine([Reply(prefill=[(256, 1024), (512, 1024)])])
    engine.gate.clear()
    app = ChatApp(engine)
    async with app.run_test() as pilot:
        await pilot.press(*"hi", "enter")
        await until(pilot, engine.waiting.is_set)
        await pilot.press(*"next")
        assert app.chat.prompt.text == "next"
        assert engine.waiting.is_set()  # and it is blocked still
        assert app.chat.is_busy
        await until(pilot, lambda: "256 of 1,024 tokens" in str(app.chat.query_one("#doing", Static).render()))
        engine.gate.set()
        await until(pilot, lambda: not app.chat.is_busy)


async def test_escape_stops_and_keeps_what_was_said() -> None:
    engine = ScriptedEngine([Reply(["One ", "two ", "three"])])
    app = ChatApp(engine)
    async with app.run_test() as pilot:
        engine.gate.clear()
        await pilot.press(*"count", "enter")
        await until(pilot, engine.waiting.is_set)
        engine.gate.set()
        engine.gate.clear()
        await until(pilot, lambda: answer(app.chat.transcript.views[0]))
        await pilot.press("escape")
        await until(pilot, lambda: not app.chat.is_busy)
        (view,) = app.chat.transcript.views
        kept = engine.open("count").turns[0]
        assert not kept.finished
        assert answer(view) == (kept.reply or "")


async def test_a_failure_brings_the_words_back() -> None:
    engine = ScriptedEngine([Reply(["Half"], error=RuntimeError("the model fell over"))])
    app = ChatApp(engine)
    async with app.run_test() as pilot:
        await pilot.press(*"hello", "enter")
        await until(pilot, lambda: app.chat.prompt.text == "hello")
        await until(pilot, lambda: not app.chat.is_busy)
        assert any("the model fell over" in toast.message for toast in app._notifications)
        assert not app.chat.transcript.views


async def test_leaving_while_it_answers_keeps_the_reply() -> None:
    engine = ScriptedEngine([Reply(["One ", "two"])])
    engine.gate.clear()
    app = ChatApp(engine)
    async with app.run_test() as pilot:
        await pilot.press(*"count", "enter")
        await until(pilot, engine.waiting.is_set)
        engine.gate.set()
        engine.gate.clear()
        await until(pilot, lambda: answer(app.chat.transcript.views[0]))
        await pilot.press("ctrl+q")
        await until(pilot, lambda: not app.is_running)
    (turn,) = engine.open("count").turns
    assert (turn.user, (turn.reply or "")[:4]) == ("count", "One ")
    assert app.last_session == "count"


async def test_the_last_reply_again() -> None:
    engine = ScriptedEngine([Reply(["Other."])], [TWO_TURNS])
    app = ChatApp(engine)
    async with app.run_test() as pilot:
        app.chat.switch("Kernels")
        await until(pilot, lambda: app.chat.transcript.views)
        await pilot.press("ctrl+r")
        await until(pilot, lambda: ("regenerate", "Kernels", "", None) in engine.calls and not app.chat.is_busy)
        assert [answer(view) for view in app.chat.transcript.views] == ["32 threads.", "Other."]


async def test_editing_shows_what_is_kept_before_sending() -> None:
    engine = ScriptedEngine([Reply(["Other."])], [TWO_TURNS])
    app = ChatApp(engine)
    async with app.run_test() as pilot:
        app.chat.switch("Kernels")
        await until(pilot, lambda: app.chat.transcript.views)
        await pilot.press("ctrl+e")
        assert app.chat.prompt.text == "And a block?"
        await until(pilot, lambda: "prefix kept: 26 tokens" in str(app.chat.query_one("#next", Static).render()))
        await pilot.press("escape")
        assert (app.chat.prompt.text, app.chat.editing) == ("", None)
        await pilot.press("ctrl+e", "!", "enter")
        await until(pilot, lambda: ("edit", "Kernels", "And a block?!", 1) in engine.calls and not app.chat.is_busy)
        assert [view.exchange.user for view in app.chat.transcript.views] == ["What is a warp?", "And a block?!"]


async def test_the_next_turn_is_previewed() -> None:
    app = ChatApp(ScriptedEngine(conversations=[TWO_TURNS]))
    async with app.run_test() as pilot:
        app.chat.switch("Kernels")
        await until(pilot, lambda: "next turn: 49 tokens" in str(app.chat.query_one("#next", Static).render()))


@pytest.mark.parametrize("times", [1, 2])
async def test_words_that_were_never_answered_are_told_when_one_leaves(times: int) -> None:
    engine = ScriptedEngine([Reply(["Here."], prefill=[(256, 1024), (512, 1024)])])
    engine.gate.clear()
    app = ChatApp(engine)
    async with app.run_test() as pilot:
        await pilot.press(*"why so long", "enter")
        await until(pilot, engine.waiting.is_set)  # the prompt is being read: nothing was said yet
        await pilot.press(*"and", *(["ctrl+q"] * times))
        await until(pilot, lambda: not app.is_running)
    assert app.unsent == "why so long\nand"
    assert app.return_code in (None, 0)


async def test_what_waits_for_a_model_is_told_when_one_leaves() -> None:
    engine = ScriptedEngine(model=None)
    engine.gate.clear()
    app = ChatApp(engine, Options(model="smollm2"))
    async with app.run_test() as pilot:
        await until(pilot, lambda: app.chat.is_loading and engine.waiting.is_set())
        await pilot.press(*"hello", "enter")
        await until(pilot, lambda: app.chat.prompt.text == "")
        await pilot.press("ctrl+q")
        await until(pilot, lambda: not app.is_running)
        engine.gate.set()
    assert app.unsent == "hello"


async def test_nothing_is_unsent_after_an_answer() -> None:
    app = ChatApp(ScriptedEngine([Reply(["Here."])]))
    async with app.run_test() as pilot:
        await pilot.press(*"hello", "enter")
        await until(pilot, lambda: app.chat.conversation and not app.chat.is_busy)
        await pilot.press("ctrl+q")
        await until(pilot, lambda: not app.is_running)
    assert app.unsent == ""


async def test_a_turn_that_ends_before_its_stream_begins() -> None:
    engine = ScriptedEngine(conversations=[TWO_TURNS])
    app = ChatApp(engine)
    async with app.run_test() as pilot:
        app.chat.switch("Kernels")
        await until(pilot, lambda: app.chat.transcript.views)
        view = app.chat.transcript.views[-1]
        view._stream = stream = Markdown.get_stream(view.query_one(Markdown))
        await view.finish(Exchange("And a block?", "Many.", usage(60)))  # before the stream's first step
        assert (answer(view), view._stream) == ("Many.", None)
        assert stream._task is not None
        assert stream._task.cancelled()
