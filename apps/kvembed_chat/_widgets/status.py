"""The line under the prompt: what goes on, or what the next turn would reuse."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import Static

from kvembed_chat._words import preview_line, progress_line, time_left

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.app import ComposeResult

    from kvembed_chat._engine import Preview, Progress

__all__ = ["Status"]

_BAR = 12


class Status(Horizontal):
    """One line: on the left what goes on, on the right what the next turn would reuse.

    Args:
        clock: Seconds, for the estimate of what is left.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(id="status")
        self._clock = clock
        self._stage = ""
        self._began = 0.0
        self._first = 0
        self._note = ""

    def compose(self) -> ComposeResult:
        """Two texts."""
        yield Static("", id="doing")
        yield Static("", id="next")

    def _show(self, left: str, right: str = "") -> None:
        self.query_one("#doing", Static).update(Content(left))
        self.query_one("#next", Static).update(Content(right))

    def say(self, text: str) -> None:
        """Say what goes on."""
        self._stage = ""
        self._show(text)

    def note(self, text: str) -> None:
        """Say something that stays beside the progress, until it is taken back with an empty text."""
        self._note = text
        self.query_one("#next", Static).update(Content(text))

    def progress(self, progress: Progress) -> None:
        """Show how far something is."""
        stage = f"{progress.stage} {progress.what}"
        if stage != self._stage:
            # What was found in the cache is done at once: the speed is that of what comes after the first step.
            self._stage, self._began, self._first = stage, self._clock(), progress.done
        left = time_left(progress.done, progress.total, self._first, self._clock() - self._began)
        bar = ""
        if progress.total:
            full = min(_BAR, _BAR * progress.done // progress.total)
            bar = f"{'━' * full}{'─' * (_BAR - full)} "
        self._show(bar + progress_line(progress, left), self._note)

    def preview(self, preview: Preview | None, *, editing: bool) -> None:
        """Show what the next turn would reuse."""
        self._show("", preview_line(preview, editing=editing))

    def rest(self) -> None:
        """Nothing goes on."""
        self._stage = ""
        self._show("", self._note)
