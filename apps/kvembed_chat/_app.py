"""`ChatApp`: the application around the chat screen."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from textual.app import App
from textual.binding import Binding

from kvembed_chat._cli import Options
from kvembed_chat._commands import ChatCommands
from kvembed_chat._config import remember
from kvembed_chat._screens.chat import ChatScreen

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.binding import BindingType
    from textual.command import Provider

    from kvembed_chat._engine import Engine

__all__ = ["ChatApp"]


class ChatApp(App[None]):
    """The terminal app.

    Args:
        engine: Who answers.
        options: What to start with.

    Attributes:
        last_session: The session that was open when the app was left.
        unsent: What was written then and is in no session: in the prompt, waiting for a model, or not answered yet.
    """

    TITLE = "kvembed-chat"
    CSS_PATH = "app.tcss"
    ENABLE_COMMAND_PALETTE = True
    COMMANDS: ClassVar[set[type[Provider] | Callable[[], type[Provider]]]] = {*App.COMMANDS, ChatCommands}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q", "quit", "Quit", show=False, priority=True),
        Binding("f1", "help", "Help"),
    ]

    def __init__(self, engine: Engine, options: Options = Options()) -> None:  # noqa: B008 - frozen
        super().__init__()
        self.engine = engine
        self.options = options
        self.last_session: str | None = None
        self.unsent = ""
        self.chat = ChatScreen(engine, options)
        self._is_leaving = False
        engine.on_warning = self._warn

    def _warn(self, text: str) -> None:
        """Show a warning of the cache; called from the engine's threads."""
        with contextlib.suppress(RuntimeError):  # the app was left meanwhile
            self.call_later(partial(self.notify, text, title="Cache", severity="warning", markup=False))

    def on_mount(self) -> None:
        """Put on the theme, and show the chat."""
        if self.options.theme is not None:
            if self.options.theme in self.available_themes:
                self.theme = self.options.theme
            else:
                names = ", ".join(sorted(self.available_themes))
                self.notify(f"no theme {self.options.theme!r}; there are: {names}", severity="warning")
        self.theme_changed_signal.subscribe(self, lambda theme: remember("theme", theme.name))
        self.push_screen(self.chat)

    def action_help(self) -> None:
        """Show all keys."""
        from kvembed_chat._screens.help import HelpScreen

        if not isinstance(self.screen, HelpScreen):
            self.push_screen(HelpScreen())

    async def action_quit(self) -> None:
        """Stop what runs, keep what it said, and leave; a second time leaves at once."""
        if self._is_leaving or not self.chat.is_busy:
            self.leave()
            return
        self._is_leaving = True
        self.notify("Saving the reply…")
        # Leaving at once cancels it, which is no error.
        self.run_worker(self._leave_when_saved(), name="leave", exit_on_error=False)

    async def _leave_when_saved(self) -> None:
        await self.chat.stop_and_wait()
        self.leave()

    def leave(self) -> None:
        """Leave now."""
        self.last_session = self.chat.current
        self.unsent = self.chat.unsent
        self.exit()
