"""The conversation: turns below one another, the newest in view."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding
from textual.containers import Vertical, VerticalScroll
from textual.message import Message
from textual.widgets import Static

from kvembed_chat._widgets.turn import TurnView

if TYPE_CHECKING:
    from textual import events
    from textual.app import ComposeResult
    from textual.binding import BindingType

    from kvembed_chat._engine import Conversation, Exchange

__all__ = ["Transcript"]

_PAGE = 20


class Transcript(VerticalScroll):
    """Shows a conversation, and lets one pick a turn with the keys.

    Attributes:
        selected: Number of the turn that is picked, or None.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "pick(-1)", "Earlier turn", show=False),
        Binding("down,j", "pick(1)", "Later turn", show=False),
        Binding("e", "turn('edit')", "Edit", show=False),
        Binding("c", "turn('copy')", "Copy reply", show=False),
        Binding("b", "turn('copy_code')", "Copy code", show=False),
        Binding("f", "turn('fork')", "Fork", show=False),
        Binding("x,delete", "turn('delete')", "Delete turn", show=False),
        Binding("u", "turn('undo')", "Undo", show=False),
        Binding("space,enter", "fold", "Unfold thoughts", show=False),
        Binding("home,g", "all", "Earlier turns", show=False),
    ]

    class Chosen(Message):
        """Something is to be done with a turn."""

        def __init__(self, verb: str, turn: int | None) -> None:
            super().__init__()
            self.verb = verb
            self.turn = turn

    def __init__(self) -> None:
        super().__init__(id="transcript")
        self.selected: int | None = None
        self._exchanges: tuple[Exchange, ...] = ()
        self._first = 0

    def compose(self) -> ComposeResult:
        """The turns, in a box at least as high as the view: an anchor would set a short conversation at the bottom."""
        yield Vertical(id="turns")

    @property
    def _box(self) -> Vertical:
        return self.query_one("#turns", Vertical)

    @property
    def views(self) -> list[TurnView]:
        """The turns that are shown."""
        return list(self._box.query_children(TurnView))

    async def show(self, conversation: Conversation | None) -> None:
        """Show another conversation, or none."""
        self.selected = None
        self._exchanges = conversation.turns if conversation is not None else ()
        # A long conversation is shown from its end: every turn is a dozen widgets.
        self._first = max(0, len(self._exchanges) - _PAGE)
        async with self.batch():
            await self._box.remove_children()
            shown = [TurnView(turn, i) for i, turn in enumerate(self._exchanges) if i >= self._first]
            await self._box.mount_all([*self._more(), *shown])
        self.anchor()

    def _more(self) -> list[Static]:
        if not self._first:
            return []
        return [Static(f"{self._first} earlier turns: press home here to show them", id="more")]

    async def action_all(self) -> None:
        """Show the earlier turns too, then go to the top."""
        if self._first:
            async with self.batch():
                await self.query("#more").remove()
                earlier = [TurnView(turn, i) for i, turn in enumerate(self._exchanges[: self._first])]
                self._first = 0
                await self._box.mount_all(earlier, before=0)
        self.release_anchor()
        self.scroll_home(animate=False)

    async def begin(self, exchange: Exchange, keep: int) -> TurnView:
        """Add a turn whose reply is to come, after the first ``keep`` ones; return its view."""
        for view in self.views:
            if view.number >= keep:
                await view.remove()
        self._exchanges = (*self._exchanges[:keep], exchange)
        view = TurnView(exchange, keep)
        await self._box.mount(view)
        self.pick(None)
        self.anchor()
        return view

    def end(self, number: int, exchange: Exchange) -> None:
        """Note how a turn ended."""
        self._exchanges = (*self._exchanges[:number], exchange)

    # --- picking ---------------------------------------------------------------------------------------

    def pick(self, number: int | None) -> None:
        """Pick a turn, or none."""
        self.selected = number
        for view in self.views:
            view.set_class(view.number == number, "picked")
            if view.number == number:
                self.release_anchor()
                self.scroll_to_widget(view, animate=False)

    def action_pick(self, step: int) -> None:
        """Go to an earlier or later turn."""
        views = self.views
        if not views:
            return
        first, last = views[0].number, views[-1].number
        now = last + 1 if self.selected is None else self.selected
        self.pick(min(last, max(first, now + step)))

    def on_focus(self) -> None:
        """Pick the last turn."""
        if self.selected is None and self.views:
            self.pick(self.views[-1].number)

    def on_blur(self) -> None:
        """Nothing is picked while one writes."""
        self.pick(None)
        self.anchor()

    def action_turn(self, verb: str) -> None:
        """Do something with the picked turn."""
        views = self.views
        last = views[-1].number if views else None
        self.post_message(self.Chosen(verb, last if self.selected is None else self.selected))

    def action_fold(self) -> None:
        """Fold or unfold the thoughts of the picked turn."""
        for view in self.views:
            if view.number == self.selected:
                view.toggle_thinking()

    def on_click(self, event: events.Click) -> None:
        """Show what is earlier."""
        if event.widget is not None and event.widget.id == "more":
            self.run_worker(self.action_all())
