"""What can be done with a whole session, and with one of its turns."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from kvembed_chat._export import default_export, kind_of, write_export
from kvembed_chat._markdown import code_blocks
from kvembed_chat._screens.dialogs import Ask as AskLine
from kvembed_chat._screens.talk import TalkScreen
from kvembed_chat._thinking import split_thinking
from kvembed_chat._threads import in_thread
from kvembed_chat._words import free_name

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from kvembed_chat._cli import Options
    from kvembed_chat._engine import Engine
    from kvembed_chat._widgets.sidebar import Sidebar
    from kvembed_chat._widgets.transcript import Transcript

__all__ = ["VerbsScreen"]

_WAIT = "Wait for the reply, or stop it with esc."


class VerbsScreen(TalkScreen):
    """The part of the chat screen that changes sessions and turns."""

    def __init__(self, engine: Engine, options: Options) -> None:
        super().__init__(engine, options)
        self._deleted: list[str] = []
        self._copied = 0

    async def open_session(self, name: str | None) -> None:
        """Show a session; None for a new one."""
        raise NotImplementedError

    def switch(self, name: str | None) -> None:
        """Show another session, unless this one is being answered."""
        if self.is_busy:
            self.notify(_WAIT, severity="warning")
            return
        self.prompt.focus()
        self.go(partial(self.open_session, name), "session")

    def _change(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        if self.is_busy:
            self.notify(_WAIT, severity="warning")
        else:
            self.go(work, "session")

    # --- sessions --------------------------------------------------------------------------------------

    def on_sidebar_chosen(self, message: Sidebar.Chosen) -> None:
        """Do something with a session of the list."""
        verb, name = message.verb, message.name
        if verb == "new":
            self.switch(None)
        elif verb == "undelete":
            self.action_undelete()
        elif name is None:
            return
        elif verb == "open":
            self.switch(name)
        elif verb == "rename":
            self._change(partial(self._rename, name))
        elif verb == "fork":
            self._change(partial(self._fork, name))
        elif verb == "delete":
            self._change(partial(self._delete, name))

    def on_sidebar_searched(self) -> None:
        """Show what is found."""
        self.session_changed()

    def action_rename(self) -> None:
        """Call this session something else."""
        if self.current is not None:
            self._change(partial(self._rename, self.current))

    async def _rename(self, name: str) -> None:
        new = await self.app.push_screen_wait(AskLine("Rename the conversation", name))
        if new is None or new == name:
            return
        await in_thread(partial(self.engine.rename, name, new))
        if self.current == name:
            self.current = new
            self.conversation = await in_thread(partial(self.engine.open, new))
        self.session_changed()

    def action_fork(self) -> None:
        """Go on from here in a new session."""
        if self.current is not None:
            self._change(partial(self._fork, self.current))

    async def _fork(self, name: str, turns: int | None = None) -> None:
        taken = {item.name for item in await in_thread(self.engine.sessions)}
        hint = "both share the KV of everything up to here"
        new = await self.app.push_screen_wait(AskLine("Fork into", free_name(f"{name} (fork)", taken), hint))
        if new is None:
            return
        await in_thread(partial(self.engine.fork, name, new))
        if turns is not None:
            for turn in range(len((await in_thread(partial(self.engine.open, new))).turns) - 1, turns - 1, -1):
                await in_thread(partial(self.engine.delete_turn, new, turn))
        await self.open_session(new)

    def action_delete_session(self) -> None:
        """Take this session out of the list."""
        if self.current is not None:
            self._change(partial(self._delete, self.current))

    async def _delete(self, name: str) -> None:
        await in_thread(partial(self.engine.delete, name))
        self._deleted.append(name)
        self.notify(f"{name} is deleted. Until you leave, u in the list brings it back.", markup=False)
        if self.current == name:
            await self.open_session(None)
        else:
            self.session_changed()

    def action_undelete(self) -> None:
        """Bring the last deleted session back."""
        if self._deleted:
            self._change(partial(self._undelete, self._deleted[-1]))
        else:
            self.notify("Nothing was deleted since the start.")

    async def _undelete(self, name: str) -> None:
        found = await in_thread(partial(self.engine.undelete, name))
        self._deleted.remove(name)
        await self.open_session(found)

    def action_export(self) -> None:
        """Write this session to a file."""
        if self.current is not None:
            self._change(partial(self._export, self.current))

    async def _export(self, name: str) -> None:
        path = await self.app.push_screen_wait(AskLine("Export to", default_export(name), "ends in .md or .json"))
        if path is None:
            return
        try:
            text = await in_thread(partial(self.engine.export, name, kind_of(path)))
            file = await in_thread(partial(write_export, path, text))
        except FileExistsError:
            self.notify(f"There is a file {path} already: give another name.", severity="error", markup=False)
        except (OSError, ValueError) as error:
            self.notify(str(error), severity="error", markup=False)
        else:
            self.notify(f"Written to {file}", markup=False)

    # --- turns -----------------------------------------------------------------------------------------

    def on_transcript_chosen(self, message: Transcript.Chosen) -> None:
        """Do something with a picked turn."""
        turn, known = message.turn, self.conversation
        if message.verb == "undo":
            self.action_undo_turn()
            return
        if known is None or turn is None or turn >= len(known.turns):
            return
        if message.verb == "edit":
            self.edit(turn)
        elif message.verb == "copy":
            self._copy(known.turns[turn].reply)
        elif message.verb == "copy_code":
            self._copy_code(known.turns[turn].reply)
        elif message.verb == "fork":
            self._change(partial(self._fork, known.name, turn + 1))
        elif message.verb == "delete":
            self._change(partial(self._delete_turn, known.name, turn))

    def edit(self, turn: int) -> None:
        """Put an earlier turn in the box, to be sent again."""
        raise NotImplementedError

    async def _delete_turn(self, name: str, turn: int) -> None:
        await in_thread(partial(self.engine.delete_turn, name, turn))
        self.notify("The turn is left out. u in the transcript brings it back.")
        await self.open_session(name)

    def action_undo_turn(self) -> None:
        """Take back the last change of this session."""
        if self.current is not None:
            self._change(partial(self._undo, self.current))

    async def _undo(self, name: str) -> None:
        if not await in_thread(partial(self.engine.undo, name)):
            self.notify("Nothing to take back.")
            return
        await self.open_session(name)

    def action_copy_reply(self) -> None:
        """Copy the last reply."""
        self._copy(self._last_reply())

    def action_copy_code(self) -> None:
        """Copy a code block of the last reply."""
        self._copy_code(self._last_reply())

    def _last_reply(self) -> str | None:
        turns = self.conversation.turns if self.conversation is not None else ()
        return next((turn.reply for turn in reversed(turns) if turn.reply), None)

    def _copy(self, reply: str | None) -> None:
        if reply is None:
            self.notify("There is no reply to copy.")
            return
        self.app.copy_to_clipboard(split_thinking(reply)[1])
        self.notify("The reply is in the clipboard.")

    def _copy_code(self, reply: str | None) -> None:
        blocks = code_blocks(split_thinking(reply or "")[1])
        if not blocks:
            self.notify("There is no code block in this reply.")
            return
        self._copied += 1  # the last block first, then the one before it
        number = (-self._copied) % len(blocks)
        self.app.copy_to_clipboard(blocks[number])
        self.notify(f"Code block {number + 1} of {len(blocks)} is in the clipboard.")
