"""The chat's own commands in the palette."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from textual.command import DiscoveryHit, Hit, Hits, Provider

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["COMMANDS", "ChatCommands"]

COMMANDS: tuple[tuple[str, str, str], ...] = (
    ("Session: new", "Begin a conversation (ctrl+n)", "new_session"),
    ("Session: search", "Look for words in all conversations (ctrl+f)", "search"),
    ("Session: rename", "Call this conversation something else", "rename"),
    ("Session: fork", "Go on from here in a new conversation; both share their KV", "fork"),
    ("Session: delete", "Take this conversation out of the list", "delete_session"),
    ("Session: undo delete", "Bring the last deleted conversation back", "undelete"),
    ("Session: settings", "System message and sampling (F4)", "settings"),
    ("Session: export", "Write this conversation to a Markdown or JSON file", "export"),
    ("Turn: regenerate", "Answer the last message once more (ctrl+r)", "regenerate"),
    ("Turn: edit and resend", "Change what you said last (ctrl+e)", "edit_last"),
    ("Turn: undo", "Take back the last send, edit, regenerate, attach or delete", "undo_turn"),
    ("Copy: last reply", "To the clipboard, also over ssh where the terminal allows it", "copy_reply"),
    ("Copy: code block", "Of the last reply; again for the block before it", "copy_code"),
    ("Document: attach", "Compute a text file once, and ask about it", "attach"),
    ("Model: choose", "Load another model (ctrl+o)", "models"),
    ("Cache: look into it", "What is stored, in which tier; pin, evict, verify, forget (F2)", "cache"),
    ("View: sidebar", "Show or hide the sessions (ctrl+b)", "sidebar"),
)
"""Title, help, and the screen's action."""


class ChatCommands(Provider):
    """Finds the chat's commands."""

    def _commands(self) -> list[tuple[str, str, Callable[[], object]]]:
        from kvembed_chat._screens.chat import ChatScreen

        screen = self.screen
        if not isinstance(screen, ChatScreen):
            return []
        return [(title, help_, partial(screen.run_action, action)) for title, help_, action in COMMANDS]

    async def discover(self) -> Hits:
        """Show all of them before anything is typed."""
        for title, help_, callback in self._commands():
            yield DiscoveryHit(title, callback, help=help_)

    async def search(self, query: str) -> Hits:
        """Show those that match."""
        matcher = self.matcher(query)
        for title, help_, callback in self._commands():
            if (score := matcher.match(title)) > 0:
                yield Hit(score, matcher.highlight(title), callback, help=help_)
