"""What is shown before anything was said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from textual.app import ComposeResult

__all__ = ["EmptyState"]


class EmptyState(Vertical):
    """A word of welcome and three suggestions."""

    class Picked(Message):
        """A suggestion was picked."""

        def __init__(self, action: str) -> None:
            super().__init__()
            self.action = action

    def __init__(self) -> None:
        super().__init__(id="empty")

    def compose(self) -> ComposeResult:
        """Words above a list."""
        yield Static("kvembed-chat", id="welcome")
        yield Static("", id="about")
        yield OptionList(id="suggestions", compact=True)
        yield Static("down and enter choose one, or click", id="how")

    def show(self, about: str, suggestions: Sequence[tuple[str, str]]) -> None:
        """Show these suggestions: (action, label)."""
        self.query_one("#about", Static).update(Content(about))
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options(
            [Option(Content(f"{i + 1}  {label}"), id=action) for i, (action, label) in enumerate(suggestions)]
        )

    def choose(self) -> None:
        """Let the keys choose one."""
        options = self.query_one(OptionList)
        options.focus()
        options.highlighted = 0

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Pick a suggestion."""
        event.stop()
        self.post_message(self.Picked(event.option.id or ""))
