"""The model picker."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from textual.app import ComposeResult
    from textual.binding import BindingType

    from kvembed_chat._engine import ModelItem

__all__ = ["ModelScreen"]


class ModelScreen(ModalScreen[str | None]):
    """Choose a model, or write the name of any other.

    Args:
        items: What is known.
        current: The model that is loaded.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "cancel", "Cancel"),
        Binding("up", "move(-1)", show=False, priority=True),
        Binding("down", "move(1)", show=False, priority=True),
    ]

    def __init__(self, items: Sequence[ModelItem], current: str | None) -> None:
        super().__init__(classes="dialog wide")
        self._items = list(items)
        self._current = current

    def compose(self) -> ComposeResult:
        """A line to write in above the list."""
        with Vertical(classes="box"):
            yield Static("Model", classes="title")
            yield Input(placeholder="filter, or a hub id, folder or GGUF file", id="model-name")
            yield OptionList(id="models", compact=True)
            yield Static("enter loads, esc cancels", classes="hint")

    def on_mount(self) -> None:
        """Show all."""
        self.query_one(OptionList).can_focus = False
        self._fill("")

    def _fill(self, words: str) -> None:
        found = [item for item in self._items if words.lower() in f"{item.name} {item.title}".lower()]
        options = self.query_one(OptionList)
        options.clear_options()
        for item in found:
            mark = "● " if item.name == self._current else "  "
            line = Content.assemble(mark, (item.name, "bold"), f"  {item.title}" if item.title != item.name else "")
            options.add_option(Option(Content.assemble(line, (f"  {item.note}", "dim")), id=item.name))
        options.display = bool(found)
        if found:
            options.highlighted = 0

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter."""
        self._fill(event.value.strip())

    def action_move(self, step: int) -> None:
        """Go up or down in the list."""
        options = self.query_one(OptionList)
        if options.highlighted is not None:
            options.highlighted = max(0, min(options.option_count - 1, options.highlighted + step))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Take what is highlighted, or what was written."""
        options = self.query_one(OptionList)
        if options.display and options.highlighted is not None:
            self.dismiss(options.get_option_at_index(options.highlighted).id)
        else:
            self.dismiss(event.value.strip() or None)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take what was clicked."""
        self.dismiss(event.option.id)

    def action_cancel(self) -> None:
        """Take nothing."""
        self.dismiss(None)
