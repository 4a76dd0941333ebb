"""System message and sampling of one session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, Static, TextArea

from kvembed_chat._settings import FIELDS, form_of, settings_of

if TYPE_CHECKING:
    from textual.app import ComposeResult
    from textual.binding import BindingType

__all__ = ["SettingsScreen"]


class SettingsScreen(ModalScreen[tuple[str | None, dict[str, Any]] | None]):
    """Returns (system message, arguments of ``generate()``), or None when it was cancelled.

    Args:
        title: Of the session.
        system: Its system message.
        settings: Its arguments of ``generate()``.
        has_turns: Another system message would cost computing the conversation anew.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "cancel", "Cancel"),
        Binding("ctrl+s", "save", "Save", priority=True),
    ]

    def __init__(self, title: str, system: str | None, settings: dict[str, Any], *, has_turns: bool) -> None:
        super().__init__(classes="dialog wide")
        self._title = title
        self._system = system
        self._settings = settings
        self._has_turns = has_turns

    def compose(self) -> ComposeResult:
        """The system message above a small form."""
        form = form_of(self._settings)
        with Vertical(classes="box"):
            yield Static(Content(f"Settings of {self._title}"), classes="title")
            with VerticalScroll(can_focus=False):
                yield Label("System message")
                yield TextArea(self._system or "", id="system", compact=True, tab_behavior="focus")
                note = "another one: all turns are computed anew, once" if self._has_turns else ""
                yield Static(note, classes="hint")
                for field in FIELDS:
                    with Horizontal(classes="field"):
                        yield Label(field.label)
                        yield Input(form.get(field.name, ""), placeholder=field.hint, id=field.name, compact=True)
            yield Static("", id="wrong")
            with Horizontal(classes="buttons"):
                yield Button("Save (ctrl+s)", id="save", variant="primary", compact=True)
                yield Button("Cancel (esc)", id="cancel", compact=True)

    def action_save(self) -> None:
        """Return what is written, if it can be used."""
        form = {field.name: self.query_one(f"#{field.name}", Input).value for field in FIELDS}
        try:
            settings = settings_of(form, self._settings)
        except ValueError as error:
            self.query_one("#wrong", Static).update(Content(str(error)))
            return
        self.dismiss((self.query_one("#system", TextArea).text.strip() or None, settings))

    def action_cancel(self) -> None:
        """Return nothing."""
        self.dismiss(None)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Save or cancel."""
        if event.button.id == "save":
            self.action_save()
        else:
            self.action_cancel()

    def on_input_submitted(self) -> None:
        """Enter in a field saves."""
        self.action_save()
