"""`SessionView`: what can be asked of a conversation without changing it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from kvembed._errors import ConfigError, PromptError
from kvembed._html import mimebundle
from kvembed._sessions.db import SessionDB
from kvembed._sessions.losses import explained, loss_of
from kvembed._sessions.marks import marks_of
from kvembed._sessions.messages import Message, message_now
from kvembed._sessions.rendering import Beginning, Prepared, Renderer
from kvembed._sessions.replies import Reply, Turn, exported, talk_html, turns_of
from kvembed._units import format_count

if TYPE_CHECKING:
    from collections.abc import Collection

    from kvembed._keys import TokenIds
    from kvembed._match import Explanation, PrefixMatch
    from kvembed._model import CachedModel
    from kvembed._sessions.messages import SessionInfo

__all__ = ["SessionView"]


class SessionView:
    """A conversation that is only looked at; `Session` is the whole of it, and has the arguments."""

    def __init__(
        self,
        model: CachedModel,
        name: str,
        *,
        system: str | None = None,
        db: SessionDB | None = None,
        when_full: str = "refuse",
        template_kwargs: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        if not getattr(model.tokenizer, "chat_template", None):
            raise ConfigError("a session needs a tokenizer with a chat template: set tokenizer.chat_template")
        if when_full not in ("refuse", "drop"):
            raise ConfigError(f'when_full is "refuse" or "drop", not {when_full!r}')
        self._model = model
        self._db = db if db is not None else SessionDB()
        self._owns_db = db is None
        self._lock = threading.RLock()  # short: of what is below
        self._talking = threading.RLock()  # as long as a reply: one after another
        self._cancel = threading.Event()  # of the reply that is under way
        self.when_full = when_full
        self._renderer = Renderer(model.hf_model, marks_of(model))
        self._info: SessionInfo = self._db.open(name, system, settings, template_kwargs)
        self._branch: list[Message] = []
        self.last: Reply | None = None
        self._load()

    def _load(self) -> None:
        """Read the current branch; another process may have gone on with it."""
        self._info = self._db.info(self._info.name)
        if (self._branch[-1].id if self._branch else None) != self._info.head:
            self._branch = self._db.branch(self._info.head)  # messages never change

    @property
    def name(self) -> str:
        """What it is called."""
        return self._info.name

    @property
    def system(self) -> str | None:
        """Its system message; see `set_system`."""
        return self._info.system

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of ``generate()`` for every reply; see `set_settings`."""
        return dict(self._info.settings)

    @property
    def date(self) -> str | None:
        """The time the chat template is told that it is, ``"2026-11-24T20:38:07"``; see `refresh_date`."""
        return self._info.date

    def _said(self, text: str) -> list[Message]:
        if not text.strip():
            raise PromptError("there is nothing to send: the text is empty")
        return self._with(text, None)

    def _edited(self, turn: int, text: str) -> list[Message]:
        if not text.strip():
            raise PromptError("there is nothing to send: the text is empty")
        return self._with(text, turn)

    def _before_reply(self) -> list[Message]:
        with self._lock:
            self._load()
            end = len(self._branch)
            while end and self._branch[end - 1].role != "user":
                end -= 1
            if not end:
                raise PromptError("there is nothing to answer yet: send something first")
            return self._branch[:end]

    def _with(self, text: str, turn: int | None) -> list[Message]:
        """Return the branch with new words at its end, or in place of a turn and all after it."""
        with self._lock:
            self._load()
            kept = self._branch if turn is None else self._branch[: self._start_of(turn)]
            return [*kept, message_now("user", text)]

    def _start_of(self, turn: int) -> int:
        starts = [i for i, message in enumerate(self._branch) if message.role == "user"]
        try:
            return starts[turn]
        except IndexError:
            raise ConfigError(f"session {self.name!r} has no turn {turn}: it has {len(starts)}") from None

    def _prepare(self, branch: list[Message], max_new_tokens: int) -> Prepared:
        with self._lock:
            beginning = Beginning.of(self._info)
            return self._renderer.prepare(branch, beginning, max_new_tokens, may_drop=self.when_full == "drop")

    @property
    def turns(self) -> list[Turn]:
        """The exchanges of the current branch, oldest first."""
        with self._lock:
            self._load()
            return turns_of(self._branch)

    @property
    def documents(self) -> list[str]:
        """Names of the documents attached on the current branch."""
        with self._lock:
            self._load()
            return [message.meta.get("name", "") for message in self._branch if message.role == "document"]

    def prompt_ids(self, text: str) -> TokenIds:
        """Return the ids, int32, that `send` would compute for this text."""
        return self._prepare(self._with(text, None), 0).prompt.ids

    @overload
    def preview(self, text: str, *, turn: int | None = None, wait: Literal[True] = True) -> PrefixMatch: ...
    @overload
    def preview(self, text: str, *, turn: int | None = None, wait: bool) -> PrefixMatch | None: ...
    def preview(self, text: str, *, turn: int | None = None, wait: bool = True) -> PrefixMatch | None:
        """Say how much would be reused if this were sent, or sent in place of an earlier turn; computes nothing.

        Cheap enough for every key that is typed: only what is new is tokenised.

        Args:
            text: What might be sent; it may still be empty.
            turn: Number of the turn it would replace.
            wait: While the model answers, in another thread, wait for it; False returns None then.

        Raises:
            PromptError: It would not fit the context (see ``when_full``).
        """
        if not self._lock.acquire(blocking=wait):
            return None
        try:
            ids = self._prepare(self._with(text, turn), 0).prompt.ids
        finally:
            self._lock.release()
        if not self._model._lock.acquire(blocking=wait):
            return None
        try:
            return self._model.lookup(ids)
        finally:
            self._model._lock.release()

    def explain(self, text: str) -> Explanation:
        """Say why no more would be reused if this were sent, and what of the conversation changed if something did.

        See `CachedModel.explain`; here the hint names what the chat template did to earlier turns.
        """
        prepared = self._prepare(self._with(text, None), 0)
        return explained(self._model.explain(prepared.prompt.ids), loss_of(prepared))

    def export(self, kind: str = "md") -> str:
        """Return the current branch as text.

        Args:
            kind: ``"md"`` or ``"json"`` (messages with roles, as chat templates take them, and their costs).
        """
        with self._lock:
            self._load()
            return exported(self._info, self._branch, kind)

    def streams(self) -> list[TokenIds]:
        """Return the token ids of every conversation that was had here: of all branches, up to each reply."""
        with self._lock:
            branches = [self._db.branch(head) for head in self._db.heads(self.name)]
        found = [ids for branch in branches for ids in self._renderer.history(branch).streams]
        unique = {ids.tobytes(): ids for ids in found if len(ids)}
        return sorted(unique.values(), key=len, reverse=True)

    def close(self) -> None:
        """Close the file of sessions, if this session opened it."""
        if self._owns_db:
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        turns = len(self.turns)
        tokens = len(self._renderer.history(self._branch).stream)
        return f"<Session {self.name!r}: {turns} turns, {format_count(tokens)} tokens>"

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        markup = talk_html(repr(self)[1:-1], self.system, self.documents, self.turns)
        return mimebundle(repr(self), markup, include, exclude)
