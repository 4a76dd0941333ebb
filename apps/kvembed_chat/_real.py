"""The engine over `CachedModel` and its sessions. torch and transformers are imported when a model is loaded."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from dataclasses import fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvembed import ConfigError, ContextFullError, KVEmbedWarning, KVStore, SessionDB, Usage
from kvembed._paths import is_disabled
from kvembed._sessions.replies import exported
from kvembed_chat._engine import (
    ContextFull,
    Conversation,
    Exchange,
    ModelInfo,
    Piece,
    Preview,
    Progress,
    SessionItem,
    Stopped,
)
from kvembed_chat._local_models import local_models
from kvembed_chat._prefixes import StorePrefixes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from kvembed import CachedModel, Session
    from kvembed._sessions.messages import Message
    from kvembed_chat._engine import Ask, Event, ModelItem

__all__ = ["RealEngine"]

_USAGE_FIELDS = {entry.name for entry in fields(Usage)}


class RealEngine:
    """Answers with a real model.

    Args:
        store: Folder of the KV; None for the user's cache folder.
    """

    def __init__(self, store: str | None = None) -> None:
        self._store_path = store
        self.on_warning: Callable[[str], object] | None = None
        self._lock = threading.RLock()
        self._opened: KVStore | None = None
        self._model: CachedModel | None = None
        self._info: ModelInfo | None = None
        self._sessions: dict[str, Session] = {}
        self._deleted: list[str] = []

    @cached_property
    def _db(self) -> SessionDB:
        return SessionDB()

    @property
    def _store(self) -> KVStore:
        with self._lock:  # the gauges may be first, or a model that is loaded
            if self._opened is None:
                self._opened = KVStore(self._store_path) if self._store_path is not None else KVStore()
            return self._opened

    @property
    def prefixes(self) -> StorePrefixes:
        """What is cached."""
        return StorePrefixes(lambda: self._store, lambda: self._model, lambda: self._db)

    # --- models ----------------------------------------------------------------------------------------

    @property
    def model(self) -> ModelInfo | None:
        """The model that is loaded."""
        return self._info

    def models(self) -> list[ModelItem]:
        """Return aliases and the models on this machine."""
        return local_models()

    def load(self, name: str, emit: Callable[[Event], None]) -> ModelInfo:
        """Load and try a model."""
        emit(Progress("load", what=name))
        from kvembed import CachedModel
        from kvembed._loading import load
        from kvembed._sessions.marks import marks_of

        def on_progress(stage: str, done: int, total: int) -> None:
            emit(Progress(stage, done, total, name))

        with self._warnings():
            hf_model, tokenizer, resolved = load(name, on_progress=on_progress)
            if not getattr(tokenizer, "chat_template", None):
                raise ConfigError(
                    f"{name} has no chat template: it continues text, and was not made for chats. Choose another model."
                )
            emit(Progress("load", what=f"{name}: trying it out"))
            model = CachedModel(hf_model, tokenizer, store=self._store, progress=False)
            # Sessions need it; made now, because it holds up every thread (0.2 s with Gemma's) and one types later.
            _ = marks_of(model).digest
        with self._lock:
            old, self._model = self._model, model
            self._sessions.clear()
        if old is not None:
            old.drop_live()
        from kvembed._prompt import context_length

        detail = f"{str(hf_model.dtype).removeprefix('torch.')} · {hf_model.device}"
        title = resolved.name.rstrip("/").rsplit("/", 1)[-1]
        self._info = ModelInfo(name, title, context_length(hf_model), detail, model.support)
        return self._info

    @contextlib.contextmanager
    def _warnings(self) -> Iterator[None]:
        """Hand kvembed's warnings to the interface, and keep all others off the screen."""
        with warnings.catch_warnings():

            def show(message: Warning | str, category: type[Warning], *_args: Any, **_kwargs: Any) -> None:
                if issubclass(category, KVEmbedWarning) and self.on_warning is not None:
                    self.on_warning(str(message))

            warnings.simplefilter("always", KVEmbedWarning)
            warnings.showwarning = show
            yield

    # --- sessions --------------------------------------------------------------------------------------

    def sessions(self, words: str = "") -> list[SessionItem]:
        """Return sessions, the latest first."""
        if words.strip():
            return [SessionItem(name, excerpt) for name, excerpt in self._db.search(words)]
        return [SessionItem(info.name) for info in self._db.sessions()]

    def open(self, name: str) -> Conversation:
        """Return a session as it is now; no model is needed."""
        info = self._db.info(name)
        turns, pending = _turns(self._db.branch(info.head))
        return Conversation(info.name, info.system, info.settings, turns, pending)

    def create(self, name: str, system: str | None, settings: dict[str, Any]) -> None:
        """Make a session; one that exists is left as it is."""
        if all(info.name != name for info in self._db.sessions()):
            self._db.open(name, system, settings)

    def rename(self, name: str, new: str) -> None:
        """Call a session something else."""
        with self._lock:
            self._db.rename(name, new)
            self._sessions.pop(name, None)

    def fork(self, name: str, new: str) -> None:
        """Make a session that goes on from where another one is."""
        self._db.fork(name, new)

    def delete(self, name: str) -> None:
        """Hide a session until `close`, which erases it."""
        self._db.hide(name)
        with self._lock:
            self._deleted.append(name)
            self._sessions.pop(name, None)

    def undelete(self, name: str) -> str:
        """Bring a deleted session back; return its name, another one where its own was taken meanwhile."""
        found = self._db.unhide(name).name
        with self._lock:
            self._deleted.remove(name)
        return found

    def set_system(self, name: str, system: str | None) -> None:
        """Give a session another system message."""
        self._db.set_beginning(name, system=system, date=self._db.info(name).date)

    def set_settings(self, name: str, settings: dict[str, Any]) -> None:
        """Give a session other arguments of ``generate()``."""
        self._db.set_settings(name, settings)

    def _session(self, name: str) -> Session:
        with self._lock:
            if self._model is None:
                raise ConfigError("no model is loaded: choose one with ctrl+o")
            if name not in self._sessions:
                self._sessions[name] = self._model.session(name, db=self._db)
            return self._sessions[name]

    def delete_turn(self, name: str, turn: int) -> None:
        """Leave a turn out of a conversation."""
        self._session(name).delete(turn)

    def undo(self, name: str) -> bool:
        """Take back the last change of a conversation."""
        return self._db.undo(name)

    def export(self, name: str, kind: str) -> str:
        """Return a conversation as text."""
        info = self._db.info(name)
        return exported(info, self._db.branch(info.head), kind)

    # --- talking ---------------------------------------------------------------------------------------

    def attach(self, name: str, path: Path, emit: Callable[[Event], None], stop: threading.Event) -> Usage:
        """Compute a document and pin it."""

        def progress(done: int, total: int) -> None:
            if stop.is_set():
                raise Stopped  # what is finished is kept all the same
            emit(Progress("prefill", done, total, path.name))

        emit(Progress("prefill", what=path.name))
        with self._warnings():
            return self._session(name).attach(path, progress=progress)

    def reply(self, name: str, ask: Ask, emit: Callable[[Event], None], stop: threading.Event) -> Exchange:
        """Answer, piece by piece."""
        session, model = self._session(name), self._model
        assert model is not None
        head = self._db.info(name).head
        session.when_full = "drop" if ask.drop_oldest else "refuse"
        with self._warnings():
            try:
                stream = _stream(session, ask)
            except ContextFullError as full:
                raise ContextFull(
                    full.tokens,
                    full.new_tokens,
                    full.limit,
                    full.dropped_turns,
                    full.again_tokens,
                    self._seconds(name, full.again_tokens),
                ) from full

            def progress(done: int, total: int) -> None:
                if stop.is_set():
                    session.stop()
                emit(Progress("prefill", done, total))

            waited = time.perf_counter() - ask.sent_at if ask.sent_at else 0.0
            model.progress = progress
            try:
                for piece in stream:
                    emit(Piece(piece))
                    if stop.is_set():
                        session.stop()
            finally:
                model.progress = False
        if self._db.info(name).head == head:
            raise Stopped  # while the prompt was computed: what was computed is kept, and no turn is added
        turn = self.open(name).turns[-1]
        if turn.usage is None:
            return turn
        # The time to the first token starts when the user sent it, not when the model was called.
        usage = replace(turn.usage, ttft_s=turn.usage.ttft_s + waited, total_s=turn.usage.total_s + waited)
        return replace(turn, usage=usage)

    def _seconds(self, name: str, tokens: int) -> float | None:
        """Return how long computing so many tokens took lately, or None when nothing long was computed here."""
        usages = [turn.usage for turn in self.open(name).turns if turn.usage is not None]
        rates = [usage.prefill_tokens_per_second for usage in usages if usage.prefill_tokens_per_second]
        return tokens / rates[-1] if rates else None

    def preview(self, name: str | None, ask: Ask) -> Preview | None:
        """Say what sending something would cost."""
        model = self._model
        if model is None or name is None or is_disabled():
            return None
        found = self._session(name).preview(ask.text, turn=ask.turn, wait=False)
        return None if found is None else Preview(found.prompt_tokens, found.num_tokens, dict(found.tokens_by_tier))

    def close(self) -> None:
        """Erase what was deleted, write what is pending."""
        for name in self._deleted:
            self._db.purge(name)
        if self._model is not None:
            self._model.close()
        if self._opened is not None:
            self._opened.close()
        if "_db" in self.__dict__:
            self._db.close()


def _stream(session: Session, ask: Ask) -> Iterator[str]:
    if ask.kind == "regenerate":
        return session.stream_regenerated()
    if ask.kind == "edit" and ask.turn is not None:
        return session.stream_edited(ask.turn, ask.text)
    return session.stream(ask.text)


def _turns(branch: Sequence[Message]) -> tuple[tuple[Exchange, ...], tuple[str, ...]]:
    """Return the exchanges of a branch, and the documents that wait for the next one."""
    turns: list[Exchange] = []
    pending: tuple[str, ...] = ()
    for message in branch:
        if message.role == "document":
            pending = (*pending, str(message.meta.get("name", "a document")))
        elif message.role == "user":
            turns.append(Exchange(message.content, finished=False, documents=pending))
            pending = ()
        elif turns:
            known = {name: value for name, value in message.meta.items() if name in _USAGE_FIELDS}
            turns[-1] = replace(
                turns[-1],
                reply=message.content,
                usage=Usage(**known) if known else None,
                finished=bool(message.meta.get("finished", True)),
                dropped_turns=int(message.meta.get("dropped_turns", 0)),
            )
    return tuple(turns), pending
