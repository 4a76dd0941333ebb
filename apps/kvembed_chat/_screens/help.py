"""F1: all keys, and where things are."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from kvembed_chat._config import config_file

if TYPE_CHECKING:
    from textual.app import ComposeResult
    from textual.binding import BindingType

__all__ = ["HelpScreen", "help_text"]

_SECTIONS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Writing",
        (
            ("enter", "send"),
            ("ctrl+j, shift+enter", "new line"),
            ("up, down", "earlier messages, on the first and the last line"),
            ("@name", "attach a text file: computed once, kept, shared"),
            ("esc", "stop the reply (what was said is kept), or editing"),
        ),
    ),
    (
        "Conversation",
        (
            ("ctrl+r", "answer once more"),
            ("ctrl+e", "edit what you said last, and send it again"),
            ("shift+tab", "pick a turn with up and down; then:"),
            ("  e  f  x  u", "edit, fork here, leave out, undo"),
            ("  c  b", "copy the reply, copy a code block"),
            ("  space", "unfold what the model thought"),
        ),
    ),
    (
        "Sessions",
        (
            ("ctrl+n", "new"),
            ("ctrl+f, / in the list", "search all conversations"),
            ("ctrl+b, F3", "show or hide the list (in tmux: ctrl+b twice)"),
            ("  enter  r  f", "open, rename, fork"),
            ("  d  u", "delete, undo delete"),
        ),
    ),
    (
        "The cache",
        (
            ("F2", "look into it; then:"),
            ("  p  e  v  x", "pin, evict, verify, forget a prefix"),
            ("  t  /  s  r", "show its first words, filter, sort, read again"),
        ),
    ),
    (
        "The rest",
        (
            ("ctrl+o", "models"),
            ("F4", "system message and sampling of this session"),
            ("ctrl+p", "all commands: export, themes, copy …"),
            ("ctrl+q", "leave; a reply that is being written is kept"),
        ),
    ),
)
_KEYS = 23


def help_text() -> Content:
    """Return all keys, in columns."""
    parts: list[Content | str | tuple[str, str]] = []
    for title, keys in _SECTIONS:
        parts.append((f"{title}\n", "bold $text-primary"))
        for key, what in keys:
            parts += [(f"  {key:<{_KEYS}}", "bold"), f"{what}\n"]
        parts.append("\n")
    parts.append("Defaults (model, theme, store, system) can be set in\n")
    parts.append((str(config_file()), "bold"))
    return Content.assemble(*parts)


class HelpScreen(ModalScreen[None]):
    """All keys."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f1,q", "app.pop_screen", "Close")]

    def __init__(self) -> None:
        super().__init__(classes="dialog wide")

    def compose(self) -> ComposeResult:
        """One page that scrolls."""
        with VerticalScroll(classes="box"):
            yield Static(help_text())
