"""What the chat screen does with the engine: sending, attaching, stopping, loading; always in a thread."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from textual.message import Message
from textual.screen import Screen

from kvembed import KVEmbedError
from kvembed_chat._engine import Ask, ContextFull, Exchange, Piece, Progress, Stopped
from kvembed_chat._screens.dialogs import Choice
from kvembed_chat._threads import in_thread
from kvembed_chat._widgets.prompt import Prompt
from kvembed_chat._widgets.status import Status
from kvembed_chat._widgets.transcript import Transcript
from kvembed_chat._words import context_question, free_name, name_from

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from kvembed_chat._cli import Options
    from kvembed_chat._engine import Conversation, Engine, Event
    from kvembed_chat._widgets.turn import TurnView

__all__ = ["Run", "TalkScreen"]

_PREVIEW_AFTER_S = 0.25


class Run:
    """One piece of work of the engine that can be stopped.

    Args:
        screen: Told of its events.
        kind: ``"reply"``, ``"attach"`` or ``"load"``.

    Attributes:
        stop: Set to stop it.
        ended: Nothing of it is shown any more.
        view: The turn that is being answered.
    """

    class Happened(Message):
        """An event of a run, brought from its thread into the interface's loop."""

        def __init__(self, run: Run, event: Event) -> None:
            super().__init__()
            self.run = run
            self.event = event

    def __init__(self, screen: Screen[Any], kind: str) -> None:
        self._screen = screen
        self.kind = kind
        self.stop = threading.Event()
        self.ended = False
        self.view: TurnView | None = None

    def emit(self, event: Event) -> None:
        """Pass an event on; called from the engine's threads."""
        self._screen.post_message(Run.Happened(self, event))


class TalkScreen(Screen[None]):
    """The half of the chat screen that talks to the engine.

    Attributes:
        current: Name of the open session; None for a new one that is not made before something is said.
        conversation: The open session as it was last read.
        editing: Number of the turn that is being edited.
    """

    def __init__(self, engine: Engine, options: Options) -> None:
        super().__init__()
        self.engine = engine
        self.options = options
        self.current: str | None = options.session
        self.conversation: Conversation | None = None
        self.editing: int | None = None
        self.draft_system = options.system
        self.draft_settings: dict[str, Any] = (
            {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
        )
        self._run_now: Run | None = None
        self._queued: tuple[Ask, list[Path], str] | None = None
        self._asked = ""

    # --- small things ----------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """A reply or a document is being computed."""
        return self._run_now is not None and self._run_now.kind != "load"

    @property
    def is_loading(self) -> bool:
        """A model is being loaded."""
        return self._run_now is not None and self._run_now.kind == "load"

    @property
    def unsent(self) -> str:
        """What was written and is in no session: what waits, what runs and has no turn yet, and what is in the box."""
        waiting = self._queued[2] if self._queued is not None else self._asked
        parts = [part.strip() for part in (waiting, self.prompt.text)]
        return "\n".join(dict.fromkeys(part for part in parts if part))

    @property
    def prompt(self) -> Prompt:
        """The box one writes in."""
        return self.query_one(Prompt)

    @property
    def status(self) -> Status:
        """The line under it."""
        return self.query_one(Status)

    @property
    def transcript(self) -> Transcript:
        """The conversation."""
        return self.query_one(Transcript)

    def complain(self, error: BaseException, doing: str = "") -> None:
        """Show an error in a corner; kvembed's own say what to do, others get their kind in front."""
        text = str(error) if isinstance(error, KVEmbedError | ContextFull) else f"{type(error).__name__}: {error}"
        self.notify(text or type(error).__name__, title=doing, severity="error", timeout=8, markup=False)

    def go(self, work: Callable[[], Coroutine[Any, Any, object]], group: str, *, exclusive: bool = False) -> None:
        """Run a coroutine beside the message handlers, so that they stay free for keys."""
        self.run_worker(partial(self._guarded, work), group=group, exclusive=exclusive, exit_on_error=False)

    async def _guarded(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        try:
            await work()
        except Exception as error:
            self.complain(error)

    def _start(self, kind: str) -> Run:
        self._run_now = run = Run(self, kind)
        self.busy_changed()
        return run

    def _end(self, run: Run) -> None:
        run.ended = True
        if self._run_now is run:
            self._run_now = None
        self.status.rest()
        self.busy_changed()
        self.ask_preview()

    def busy_changed(self) -> None:
        """Keys that only make sense while something runs come and go."""
        self.refresh_bindings()

    async def on_run_happened(self, message: Run.Happened) -> None:
        """Show what a run does."""
        run, event = message.run, message.event
        if run.ended:
            return
        if isinstance(event, Progress):
            self.status.progress(event)
        elif isinstance(event, Piece) and run.view is not None:
            self.status.say("Writing… esc stops")
            await run.view.feed(event.text)

    # --- sending ---------------------------------------------------------------------------------------

    def on_prompt_sent(self, message: Prompt.Sent) -> None:
        """Send what is written, or keep it until it can be sent."""
        kind = "send" if self.editing is None else "edit"
        ask = Ask(kind, message.text, self.editing, sent_at=time.perf_counter())
        self.send(ask, message.files, message.raw)

    def send(self, ask: Ask, files: list[Path], raw: str) -> None:
        """Send something now; while a model is loading, as soon as it is there."""
        if self.is_busy:
            self.notify("Wait for the reply, or stop it with esc.", severity="warning")
            return
        if self.is_loading:
            self._queued = (ask, files, raw)
            self.prompt.take()
            self.status.note("will be sent when the model is ready; esc takes it back")
            return
        if self.engine.model is None:
            self.action_models()
            return
        self.prompt.take()
        self._asked = raw
        self.editing = None
        self.mode_changed()
        # Noted now and not when the worker begins: another key may be handled before.
        run = self._start("reply" if ask.kind == "regenerate" or ask.text else "attach")
        self.go(partial(self._converse, run, ask, files, raw), "talk")

    async def _converse(self, run: Run, ask: Ask, files: list[Path], raw: str) -> None:
        try:
            name = await self._session(ask.text or (files[0].name if files else "Chat"))
            for path in files:
                await in_thread(partial(self.engine.attach, name, path, run.emit, run.stop))
                self.notify(f"{path.name} is attached: ask about it.", markup=False)
            if ask.kind == "regenerate" or ask.text:
                await self._reply(run, name, ask)
            self._asked = ""
        except Stopped:
            self.prompt.give_back(raw)
        except Exception as error:
            self.prompt.give_back(raw)
            self.complain(error, "No reply")
        finally:
            await self._settle()
            self._end(run)

    async def _reply(self, run: Run, name: str, ask: Ask) -> None:
        assert self.conversation is not None
        turns, pending = self.conversation.turns, self.conversation.pending
        if ask.kind == "regenerate":
            begun, keep = Exchange(turns[-1].user, documents=turns[-1].documents), len(turns) - 1
        elif ask.kind == "edit" and ask.turn is not None:
            begun, keep = Exchange(ask.text, documents=turns[ask.turn].documents), ask.turn
        else:
            begun, keep = Exchange(ask.text, documents=pending), len(turns)
        run.view = await self.transcript.begin(begun, keep)
        self.status.say("Thinking… esc stops")
        while True:
            try:
                whole = await in_thread(partial(self.engine.reply, name, ask, run.emit, run.stop))
                break
            except ContextFull as full:
                question, choices = context_question(full)
                chosen = await self.app.push_screen_wait(Choice("The context is full", question, choices))
                if chosen != "drop":
                    raise Stopped from None
                ask = Ask(ask.kind, ask.text, ask.turn, drop_oldest=True, sent_at=time.perf_counter())
        run.ended = True
        await run.view.finish(whole)
        self.transcript.end(keep, whole)

    async def _session(self, first_words: str) -> str:
        """Return the name of the open session, which is made now if it is new."""
        if self.current is None:
            items = await in_thread(self.engine.sessions)
            self.current = free_name(name_from(first_words), {item.name for item in items})
            await in_thread(partial(self.engine.create, self.current, self.draft_system, self.draft_settings))
            self.session_changed()
        if self.conversation is None:
            self.conversation = await in_thread(partial(self.engine.open, self.current))
        return self.current

    async def _settle(self) -> None:
        """Read the session again: what is shown is what is kept."""
        if self.current is None:
            return
        try:
            kept = await in_thread(partial(self.engine.open, self.current))
        except Exception as error:
            self.complain(error)
            return
        self.conversation = kept
        shown = [(view.exchange.user, view.exchange.reply) for view in self.transcript.views]
        if shown != [(turn.user, turn.reply) for turn in kept.turns][-len(shown) :] or len(shown) > len(kept.turns):
            await self.transcript.show(kept)
        self.session_changed()

    # --- stopping --------------------------------------------------------------------------------------

    def stop_run(self) -> bool:
        """Stop what runs, or take back what waits; False when there is nothing."""
        if self._queued is not None:
            self.prompt.give_back(self._queued[2])
            self._queued = None
            self.status.note("")
            return True
        if self._run_now is None or self._run_now.kind == "load":
            return False
        self._run_now.stop.set()
        self.status.say("Stopping…")
        return True

    async def stop_and_wait(self) -> None:
        """Stop what runs, and wait until it is kept."""
        if self._run_now is not None:
            self._run_now.stop.set()
        await self.workers.wait_for_complete([worker for worker in self.workers if worker.group == "talk"])

    # --- the next turn ---------------------------------------------------------------------------------

    def ask_preview(self) -> None:
        """Find out soon what sending this would cost."""
        self.go(self._preview, "preview", exclusive=True)

    async def _preview(self) -> None:
        import asyncio

        await asyncio.sleep(_PREVIEW_AFTER_S)
        if self._run_now is not None or self.engine.model is None:
            return
        kind = "send" if self.editing is None else "edit"
        ask = Ask(kind, self.prompt.text, self.editing)
        try:
            found = await in_thread(partial(self.engine.preview, self.current, ask))
        except Exception:  # it is only a hint
            found = None
        if self._run_now is None:
            self.status.preview(found, editing=self.editing is not None)

    # --- models ----------------------------------------------------------------------------------------

    def load(self, name: str) -> None:
        """Load a model."""
        if self._run_now is not None:
            self.notify("Wait until this is done, or stop it with esc.", severity="warning")
            return
        self.go(partial(self._load, self._start("load"), name), "talk")

    async def _load(self, run: Run, name: str) -> None:
        self.status.progress(Progress("load", what=name))
        try:
            await in_thread(partial(self.engine.load, name, run.emit))
        except Exception as error:
            self.complain(error, f"{name} cannot be loaded")
            if self._queued is not None:
                self.stop_run()
        finally:
            self._end(run)
        self.model_changed()
        if self._queued is not None:
            queued, self._queued = self._queued, None
            self.status.note("")
            self.send(*queued)

    # --- for the other half ----------------------------------------------------------------------------

    def mode_changed(self) -> None:
        """Editing began or ended."""

    def session_changed(self) -> None:
        """The open session, or the list, changed."""

    def model_changed(self) -> None:
        """Another model answers."""

    def action_models(self) -> None:
        """Choose a model."""
