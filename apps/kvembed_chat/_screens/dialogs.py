"""Small questions: choose one, or write a line."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Static

if TYPE_CHECKING:
    from textual.app import ComposeResult
    from textual.binding import BindingType

__all__ = ["Ask", "Choice"]


class Choice(ModalScreen[str]):
    """A question with a few answers; escape is the last one.

    Args:
        title: Above it.
        text: The question.
        choices: (what is returned, label) of each answer.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "cancel", "Cancel"),
        Binding("left,up", "app.focus_previous", show=False),
        Binding("right,down", "app.focus_next", show=False),
    ]

    def __init__(self, title: str, text: str, choices: tuple[tuple[str, str], ...]) -> None:
        super().__init__(classes="dialog")
        self._title = title
        self._text = text
        self._choices = choices

    def compose(self) -> ComposeResult:
        """The question above its answers."""
        with Vertical(classes="box"):
            yield Static(Content(self._title), classes="title")
            yield Static(Content(self._text), classes="text")
            with Horizontal(classes="buttons"):
                for i, (value, label) in enumerate(self._choices):
                    yield Button(label, id=f"choice-{value}", variant="primary" if i == 0 else "default", compact=True)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Return the answer."""
        self.dismiss((event.button.id or "").removeprefix("choice-"))

    def action_cancel(self) -> None:
        """Return the last answer."""
        self.dismiss(self._choices[-1][0])


class Ask(ModalScreen[str | None]):
    """A line to write; None when it was cancelled.

    Args:
        title: Above it.
        value: What it says at first.
        hint: Under it.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "cancel", "Cancel")]

    def __init__(self, title: str, value: str = "", hint: str = "") -> None:
        super().__init__(classes="dialog")
        self._title = title
        self._value = value
        self._hint = hint

    def compose(self) -> ComposeResult:
        """One line under its title."""
        with Vertical(classes="box"):
            yield Static(Content(self._title), classes="title")
            yield Input(self._value, id="line")
            yield Static(Content(self._hint or "enter takes it, esc cancels"), classes="hint")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Return what was written."""
        self.dismiss(event.value.strip() or None)

    def action_cancel(self) -> None:
        """Return nothing."""
        self.dismiss(None)
