"""The list of sessions, with its search."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from kvembed_chat._widgets.gauges import TierGauges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from textual.app import ComposeResult
    from textual.binding import BindingType

    from kvembed_chat._engine import SessionItem

__all__ = ["Sidebar"]


class _Sessions(OptionList):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "search", "Search", show=False),
        Binding("r", "verb('rename')", "Rename", show=False),
        Binding("f", "verb('fork')", "Fork", show=False),
        Binding("d,delete", "verb('delete')", "Delete", show=False),
        Binding("u", "verb('undelete')", "Undo delete", show=False),
        Binding("n", "verb('new')", "New", show=False),
        Binding("j", "cursor_down", show=False),
        Binding("k", "cursor_up", show=False),
    ]

    def action_search(self) -> None:
        self.screen.query_one("#search", Input).focus()

    def action_verb(self, verb: str) -> None:
        option = self.get_option_at_index(self.highlighted) if self.highlighted is not None else None
        self.post_message(Sidebar.Chosen(verb, option.id if option is not None else None))


class Sidebar(Vertical):
    """Sessions, and a box to search them."""

    class Chosen(Message):
        """Something is to be done with a session."""

        def __init__(self, verb: str, name: str | None) -> None:
            super().__init__()
            self.verb = verb
            self.name = name

    class Searched(Message):
        """The words of the search changed."""

        def __init__(self, words: str) -> None:
            super().__init__()
            self.words = words

    def __init__(self) -> None:
        super().__init__(id="sidebar")
        self._items: list[SessionItem] = []
        self._current: str | None = None

    def compose(self) -> ComposeResult:
        """A search box above the list, and how full the cache is below it."""
        yield Input(placeholder="/ search", id="search", compact=True)
        yield _Sessions(id="sessions", compact=True)
        yield Static("no session yet", id="no-sessions")
        yield TierGauges()

    @property
    def words(self) -> str:
        """What is searched for."""
        return self.query_one("#search", Input).value

    def show(self, items: Sequence[SessionItem], current: str | None) -> None:
        """Show these sessions, with the current one marked."""
        self._items = list(items)
        sessions = self.query_one(_Sessions)
        kept = sessions.highlighted
        before = sessions.get_option_at_index(kept).id if kept is not None else None
        sessions.clear_options()
        sessions.add_options([_option(item, item.name == current) for item in items])
        names = [item.name for item in items]
        is_same = current == self._current and sessions.has_focus and before in names
        wanted, self._current = (before if is_same else current), current
        sessions.highlighted = names.index(wanted) if wanted in names else (0 if names else None)
        empty = self.query_one("#no-sessions", Static)
        empty.update("nothing found" if self.words else "no session yet")
        empty.display = not names
        sessions.display = bool(names)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Open a session."""
        event.stop()
        self.post_message(self.Chosen("open", event.option.id))

    def on_input_changed(self, event: Input.Changed) -> None:
        """Search as one types."""
        event.stop()
        self.post_message(self.Searched(event.value))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Open what is found first."""
        event.stop()
        sessions = self.query_one(_Sessions)
        if self._items and sessions.highlighted is not None:
            self.post_message(self.Chosen("open", sessions.get_option_at_index(sessions.highlighted).id))


def _option(item: SessionItem, is_current: bool) -> Option:
    mark = "▸ " if is_current else "  "
    lines = Content(mark + item.name)
    if item.excerpt:
        lines = Content.assemble(lines, "\n", (f"    {' '.join(item.excerpt.split())}", "dim"))
    return Option(lines, id=item.name)
