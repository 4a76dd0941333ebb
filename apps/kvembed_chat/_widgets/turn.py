"""One turn of a conversation: what was said, what was thought, the answer, and what it cost."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Collapsible, Markdown, Static

from kvembed_chat._thinking import ThinkingSplitter, split_thinking
from kvembed_chat._widgets.turn_bar import TurnBar

if TYPE_CHECKING:
    from textual.app import ComposeResult
    from textual.widgets.markdown import MarkdownStream

    from kvembed_chat._engine import Exchange

__all__ = ["TurnView"]


class TurnView(Vertical):
    """Shows one `Exchange`; while a reply arrives, it is fed the pieces.

    Args:
        exchange: The turn.
        number: Its number, from 0.
    """

    def __init__(self, exchange: Exchange, number: int) -> None:
        super().__init__(classes="turn")
        self.exchange = exchange
        self.number = number
        self._splitter = ThinkingSplitter()
        self._stream: MarkdownStream | None = None
        self._thought = ""

    def compose(self) -> ComposeResult:
        """Lay out the parts; those with nothing in them are hidden."""
        thought, words = split_thinking(self.exchange.reply or "")
        self._thought = thought
        yield Static("You", classes="who")
        attached = Static(_attached(self.exchange.documents), classes="attached")
        attached.display = bool(self.exchange.documents)
        yield attached
        yield Static(Content(self.exchange.user), classes="said")
        yield Static("Model", classes="who model")
        thinking = Collapsible(Static(Content(thought), classes="thought"), title=_thinking_title(thought))
        thinking.display = bool(thought)
        yield thinking
        yield Markdown(words, classes="answer", open_links=False)
        yield Static("", classes="note")
        yield TurnBar(self.exchange.usage)

    def on_mount(self) -> None:
        """Say what it cost, if that is known."""
        self._show_end()

    async def feed(self, piece: str) -> None:
        """Add a piece of the reply."""
        await self._add(*self._splitter.feed(piece))

    async def _add(self, thought: str, words: str) -> None:
        if thought:
            self._thought += thought
            box = self.query_one(Collapsible)
            box.display = True
            box.title = _thinking_title(self._thought, open_=self._splitter.is_thinking)
            box.query_one(".thought", Static).update(Content(self._thought))
        if words:
            if self._stream is None:
                self._stream = Markdown.get_stream(self.query_one(Markdown))
            await self._stream.write(words)

    async def finish(self, exchange: Exchange) -> None:
        """Show the whole turn as it was kept."""
        await self.stop()
        self.exchange = exchange
        thought, words = split_thinking(exchange.reply or "")
        box, answer = self.query_one(Collapsible), self.query_one(Markdown)
        self._thought = thought
        box.display, box.title = bool(thought), _thinking_title(thought)
        box.query_one(".thought", Static).update(Content(thought))
        if answer.source != words:  # the last token's text, or a thought that only its end gave away
            await answer.update(words)
        attached = self.query_one(".attached", Static)
        attached.update(_attached(exchange.documents))
        attached.display = bool(exchange.documents)
        self._show_end()

    async def stop(self) -> None:
        """No more pieces come."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            try:
                await stream.stop()
            except asyncio.CancelledError:
                # Also raised when the stream's task is cancelled before its first step, as after a very short reply:
                # this is then about the stream, and not about who waits for it. `finish` shows the words.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise

    def toggle_thinking(self) -> None:
        """Fold or unfold the thoughts."""
        box = self.query_one(Collapsible)
        box.collapsed = not box.collapsed

    def _show_end(self) -> None:
        exchange, notes = self.exchange, []
        if exchange.dropped_turns:
            turns = "turn" if exchange.dropped_turns == 1 else "turns"
            notes.append(f"the {exchange.dropped_turns} oldest {turns} left out")
        if exchange.reply is None and exchange.usage is None and not exchange.finished:
            notes.append("stopped before the first word")
        elif not exchange.finished:
            notes.append("cut short")
        note = self.query_one(".note", Static)
        note.update(Content(f"— {' · '.join(notes)}") if notes else "")
        note.display = bool(notes)
        self.query_one(TurnBar).show(exchange.usage)


def _attached(documents: tuple[str, ...]) -> Content:
    return Content("  ".join(f"@{name}" for name in documents))


def _thinking_title(thought: str, *, open_: bool = False) -> str:
    words = len(thought.split())
    return f"Thinking… {words} words" if open_ else f"Thought for {words} words"
