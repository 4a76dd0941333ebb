"""The box one writes in: several lines, history, `@file` completion."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding
from textual.message import Message
from textual.widgets import OptionList, TextArea

from kvembed_chat._files import attachments, completions

if TYPE_CHECKING:
    from textual import events
    from textual.binding import BindingType

__all__ = ["Completions", "Prompt"]

_WORD = re.compile(r"(?:^|(?<=\s))@(\S*)$")


class Completions(OptionList):
    """The files that could be meant; the prompt keeps the focus."""

    can_focus = False


class Prompt(TextArea):
    """Enter sends, ctrl+j breaks the line, up on the first line goes back in history.

    Attributes:
        said: What was sent, oldest first.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "Send", show=False),
        Binding("ctrl+j,shift+enter,alt+enter", "newline", "New line", show=False),
    ]

    @dataclass
    class Sent(Message):
        """The user sends this.

        Args:
            text: Without the names of files.
            files: Those that were named with ``@`` and exist.
        """

        text: str
        files: list[Path]
        raw: str

    class Left(Message):
        """Down was pressed in an empty box."""

    class Completing(Message):
        """The word at the cursor may be the name of one of these files; none: it is not."""

        def __init__(self, names: list[str]) -> None:
            super().__init__()
            self.names = names

    class Moved(Message):
        """A key for the list of completions was pressed."""

        def __init__(self, step: int) -> None:
            super().__init__()
            self.step = step

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(
            soft_wrap=True,
            show_line_numbers=False,
            tab_behavior="focus",
            compact=True,
            highlight_cursor_line=False,
            placeholder="Message…  enter sends, ctrl+j new line, @file attaches",
            id="prompt",
        )
        self.said: list[str] = []
        self._at: int | None = None
        self._draft = ""
        self._folder = folder if folder is not None else Path()
        self.is_completing = False

    # --- sending ---------------------------------------------------------------------------------------

    def action_submit(self) -> None:
        """Send what is written, if anything."""
        raw = self.text
        if not raw.strip():
            return
        files, text = attachments(raw, self._folder)
        self.post_message(self.Sent(text, files, raw))

    def take(self) -> None:
        """What is written was taken: note it in history, and clear the box."""
        if self.text.strip() and (not self.said or self.said[-1] != self.text):
            self.said.append(self.text)
        self._at, self._draft = None, ""
        self.clear()

    def give_back(self, raw: str) -> None:
        """Put text back in the box, unless something else was written meanwhile."""
        if not self.text.strip():
            self.write(raw)

    def write(self, text: str) -> None:
        """Replace what is written, and put the cursor at its end."""
        self.text = text
        self.move_cursor(self.document.end)

    def action_newline(self) -> None:
        """Break the line at the cursor."""
        self.insert("\n")

    # --- keys ------------------------------------------------------------------------------------------

    async def _on_key(self, event: events.Key) -> None:
        if self.is_completing and event.key in ("up", "down", "tab", "enter", "escape"):
            event.stop()
            event.prevent_default()
            steps = {"up": -1, "down": 1, "tab": 0, "enter": 0}
            if event.key in steps:
                self.post_message(self.Moved(steps[event.key]))
            else:
                self.close_completions()
            return
        if event.key == "enter":  # TextArea itself would insert a line break
            event.stop()
            event.prevent_default()
            self.action_submit()
            return
        if event.key == "up" and self.cursor_at_first_line and self._earlier():
            event.stop()
            event.prevent_default()
            return
        if event.key == "down" and self.cursor_at_last_line:
            if self._later():
                event.stop()
                event.prevent_default()
                return
            if not self.text:
                self.post_message(self.Left())
        await super()._on_key(event)

    def _earlier(self) -> bool:
        if not self.said or self._at == 0:
            return False
        if self._at is None:
            self._draft = self.text
        self._at = (len(self.said) if self._at is None else self._at) - 1
        self.write(self.said[self._at])
        return True

    def _later(self) -> bool:
        if self._at is None:
            return False
        self._at += 1
        if self._at >= len(self.said):
            self._at = None
            self.write(self._draft)
        else:
            self.write(self.said[self._at])
        return True

    # --- completing ------------------------------------------------------------------------------------

    def _word(self) -> str | None:
        """Return what stands between an ``@`` and the cursor."""
        row, column = self.cursor_location
        found = _WORD.search(self.document.get_line(row)[:column])
        return found.group(1) if found else None

    def on_text_area_changed(self) -> None:
        """Look for files when a word begins with ``@``."""
        word = self._word()
        self._complete([] if word is None else completions(word, self._folder))

    def _complete(self, names: list[str]) -> None:
        if names or self.is_completing:
            self.is_completing = bool(names)
            self.post_message(self.Completing(names))

    def close_completions(self) -> None:
        """Leave the word as it is."""
        self._complete([])

    def accept(self, name: str) -> None:
        """Put the name of a file in the place of the word at the cursor."""
        word = self._word()
        if word is None:
            return
        row, column = self.cursor_location
        end = "" if name.endswith("/") else " "
        self.replace(f"@{name}{end}", (row, column - len(word) - 1), (row, column))
