"""`Session`: one conversation with a model, whose every turn computes only what is new."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvembed._document import digits_of, keys_of, read_document
from kvembed._errors import ConfigError, PromptError
from kvembed._keys import as_token_ids
from kvembed._prompt import MARK, as_prompt, context_length, split_at_mark
from kvembed._sessions.db import Message, SessionDB
from kvembed._sessions.history import History, Prompt, messages_of
from kvembed._stream import stream_text
from kvembed._units import format_count
from kvembed._usage import Usage, reply_bundle

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterator, Sequence

    from kvembed._forget import ForgetReport
    from kvembed._keys import TokenIds
    from kvembed._match import Explanation, PrefixMatch
    from kvembed._model import CachedModel

__all__ = ["Reply", "Session", "Turn"]


@dataclass(frozen=True, repr=False)
class Reply:
    """The model's answer in a conversation.

    Args:
        text: Without special tokens.
        usage: What it cost.
        prompt_ids: Ids of the whole prompt, int32: what plain transformers would be given.
        token_ids: Ids of the reply, int32.
        finished: False when it was stopped, or ran to the most tokens allowed.
        dropped_turns: Oldest turns that were left out of the prompt because the context is full.
    """

    text: str
    usage: Usage
    prompt_ids: TokenIds
    token_ids: TokenIds
    finished: bool
    dropped_turns: int = 0

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<Reply {self.text!r}>"

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        return reply_bundle("reply", self.text, self.usage, include, exclude)


@dataclass(frozen=True)
class Turn:
    """One exchange.

    Args:
        user: What the user said.
        reply: What the model said; None when it was stopped before its first token.
        meta: What is kept of the reply's cost: the fields of `Usage`.
    """

    user: str
    reply: str | None
    meta: dict[str, Any]


class Session:
    """A conversation, kept by name. Made by `CachedModel.session`.

    Its messages are stored as they come, with the token ids that were computed, so that the next turn, also in another
    process, finds the KV of everything before it.

    Args:
        model: Who answers.
        name: What it is called.
        system: System message; None for that of an existing session, or none.
        db: Where sessions are kept.
        when_full: What to do when the conversation does not fit the context: ``"refuse"``, or ``"drop"`` the oldest
            turns (all that is left then has to be computed anew, once).
        template_kwargs: Further arguments of the chat template, such as ``enable_thinking``.
        settings: Arguments of ``generate()`` for every reply of a new session; greedy unless they say otherwise.

    Attributes:
        name: What it is called.
        system: Its system message, or None.
        last: The latest reply of this object, or None.
    """

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
        self._lock = threading.RLock()
        self.when_full = when_full
        self._template_kwargs = dict(template_kwargs or {})
        info = self._db.open(name, system, settings)
        self.name, self.system, self.settings = info.name, info.system, info.settings
        self.last: Reply | None = None
        self._load()

    def _load(self) -> None:
        """Read the current branch; another process may have gone on with it."""
        self._head = self._db.info(self.name).head
        self._branch = self._db.branch(self._head)

    # --- talking ---------------------------------------------------------------------------------------

    def send(self, text: str, *, max_new_tokens: int = 512, **kwargs: Any) -> Reply:
        """Say something and return the answer.

        Args:
            text: What to say.
            max_new_tokens: Most tokens of the answer.
            **kwargs: Arguments of ``generate()``, over the session's settings.

        Raises:
            PromptError: The text is empty, or does not fit the context (see ``when_full``).
        """
        return self._answer(self._said(text), max_new_tokens, kwargs)

    def stream(self, text: str, *, max_new_tokens: int = 512, **kwargs: Any) -> Iterator[str]:
        """Say something and yield the answer piece by piece; ``last`` is the whole reply then.

        Closing the iterator stops the model after the current token; what it has said is kept, and so is its KV.
        Arguments and errors as for `send`.
        """
        return self._stream(self._said(text), max_new_tokens, kwargs)

    def regenerate(self, *, max_new_tokens: int = 512, **kwargs: Any) -> Reply:
        """Answer the last thing the user said once more; `undo` brings the earlier answer back."""
        return self._answer(self._before_reply(), max_new_tokens, kwargs)

    def stream_regenerated(self, *, max_new_tokens: int = 512, **kwargs: Any) -> Iterator[str]:
        """Like `regenerate`, piece by piece."""
        return self._stream(self._before_reply(), max_new_tokens, kwargs)

    def edit(self, turn: int, text: str, *, max_new_tokens: int = 512, **kwargs: Any) -> Reply:
        """Say something else in an earlier turn, and go on from there; `undo` brings the old branch back.

        Args:
            turn: Its number, from 0; negative numbers count from the end.
            text: What to say instead.
            max_new_tokens: Most tokens of the answer.
            **kwargs: Arguments of ``generate()``.
        """
        return self._answer(self._edited(turn, text), max_new_tokens, kwargs)

    def stream_edited(self, turn: int, text: str, *, max_new_tokens: int = 512, **kwargs: Any) -> Iterator[str]:
        """Like `edit`, piece by piece."""
        return self._stream(self._edited(turn, text), max_new_tokens, kwargs)

    def _said(self, text: str) -> list[Message]:
        if not text.strip():
            raise PromptError("there is nothing to send: the text is empty")
        with self._lock:
            self._load()
            return [*self._branch, _message("user", text)]

    def _before_reply(self) -> list[Message]:
        with self._lock:
            self._load()
            end = len(self._branch)
            while end and self._branch[end - 1].role != "user":
                end -= 1
            if not end:
                raise PromptError("there is nothing to answer yet: send something first")
            return self._branch[:end]

    def _edited(self, turn: int, text: str) -> list[Message]:
        if not text.strip():
            raise PromptError("there is nothing to send: the text is empty")
        with self._lock:
            self._load()
            return [*self._branch[: self._start_of(turn)], _message("user", text)]

    def _start_of(self, turn: int) -> int:
        starts = [i for i, message in enumerate(self._branch) if message.role == "user"]
        try:
            return starts[turn]
        except IndexError:
            raise ConfigError(f"session {self.name!r} has no turn {turn}: it has {len(starts)}") from None

    def _answer(self, branch: list[Message], max_new_tokens: int, kwargs: dict[str, Any]) -> Reply:
        with self._lock, self._model._lock:
            history, prompt, dropped = self._prepare(branch, max_new_tokens)
            ids = as_prompt(self._model.hf_model, prompt.ids)
            arguments = {**self._options(kwargs), "max_new_tokens": max_new_tokens}
            result = self._model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
            return self._keep(branch, history, prompt, result, self._model.usage, dropped)

    def _stream(self, branch: list[Message], max_new_tokens: int, kwargs: dict[str, Any]) -> Iterator[str]:
        with self._lock:
            history, prompt, dropped = self._prepare(branch, max_new_tokens)

        def keep(result: Any, usage: Usage) -> None:
            with self._lock:
                self._keep(branch, history, prompt, result, usage, dropped)

        return stream_text(self._model, prompt.ids, max_new_tokens, self._options(kwargs), keep)

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"do_sample": False, **self.settings, **kwargs}

    def _prepare(self, branch: Sequence[Message], max_new_tokens: int) -> tuple[History, Prompt, int]:
        history = History(self._model.tokenizer, branch)
        limit = context_length(self._model.hf_model)
        turns = sum(message.role == "user" for message in branch)
        for dropped in range(turns):
            prompt = history.prompt(self._render(messages_of(branch, self.system, skip_turns=dropped)))
            if limit is None or len(prompt.ids) + max_new_tokens <= limit:
                return history, prompt, dropped
            if self.when_full == "refuse":
                raise PromptError(
                    f"the conversation has {len(prompt.ids):,} tokens and {max_new_tokens:,} more are to be generated, "
                    f'but the context is {limit:,}: allow fewer tokens, delete turns, or open it with when_full="drop" '
                    "to leave out the oldest turns (what is left is then computed anew, once)"
                )
        raise PromptError(f"this turn alone does not fit the context of {limit:,} tokens: shorten it")

    def _render(self, messages: list[dict[str, str]], *, to_answer: bool = True) -> str:
        return self._model.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=to_answer, **self._template_kwargs
        )

    def _keep(
        self, branch: list[Message], history: History, prompt: Prompt, result: Any, usage: Usage, dropped: int
    ) -> Reply:
        """Store a reply, whole or stopped, and move the session there."""
        tokenizer = self._model.tokenizer
        ids = as_token_ids(getattr(result, "sequences", result)[0, len(prompt.ids) :].cpu().numpy())
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        finished = len(ids) > 0 and int(ids[-1]) in set(tokenizer.all_special_ids)
        meta = {**usage.to_dict(), "finished": finished}
        reply = history.remember(Message(0, None, "assistant", text, meta, time.time()), prompt, ids)
        known = [message for message in branch if message.id]
        parent = known[-1].id if known else None
        new = [message for message in branch if not message.id]
        self._db.add(self.name, [*new, reply] if len(ids) else new, parent)
        self._load()
        self.last = Reply(text, usage, prompt.ids, ids, finished, dropped)
        return self.last

    # --- looking ---------------------------------------------------------------------------------------

    @property
    def turns(self) -> list[Turn]:
        """The exchanges of the current branch, oldest first."""
        with self._lock:
            self._load()
            found: list[Turn] = []
            for message in self._branch:
                if message.role == "user":
                    found.append(Turn(message.content, None, {}))
                elif message.role == "assistant" and found:
                    found[-1] = Turn(found[-1].user, message.content, message.meta)
            return found

    @property
    def documents(self) -> list[str]:
        """Names of the documents attached on the current branch."""
        with self._lock:
            self._load()
            return [message.meta.get("name", "") for message in self._branch if message.role == "document"]

    def prompt_ids(self, text: str) -> TokenIds:
        """Return the ids, int32, that `send` would compute for this text."""
        return self._prepare(self._said(text), 0)[1].ids

    def preview(self, text: str, *, turn: int | None = None) -> PrefixMatch:
        """Say how much would be reused if this were sent, or sent in place of an earlier turn; computes nothing."""
        branch = self._said(text) if turn is None else self._edited(turn, text)
        return self._model.lookup(self._prepare(branch, 0)[1].ids)

    def explain(self, text: str) -> Explanation:
        """Say why no more would be reused if this were sent; see `CachedModel.explain`."""
        return self._model.explain(self.prompt_ids(text))

    # --- changing --------------------------------------------------------------------------------------

    def attach(
        self, text: str | os.PathLike[str], *, name: str | None = None, pin: bool = True, progress: Any = None
    ) -> Usage:
        """Put a document in front of what the user says next, and compute its KV now.

        In a new session the prompt up to the document's end is that of ``model.document(text, system=...)``, and of
        every other session with this system message: they share its blocks.

        Args:
            text: The document, or a path to a text file.
            name: What to call it; by default the file's name, or "text".
            pin: Keep its blocks when others are evicted.
            progress: See `CachedModel`.

        Returns:
            What computing it cost.

        Raises:
            PromptError: It is empty, or does not fit the context.
        """
        content, found_name = read_document(text)
        if not content.strip():
            raise PromptError("the document is empty")
        document = _message("document", content, {"name": name or found_name or "text"})
        with self._lock:
            self._load()
            branch = [*self._branch, document]
            before, _ = split_at_mark(self._render(messages_of([*branch, _message("user", MARK)], self.system)))
            history = History(self._model.tokenizer, self._branch)
            prompt = history.prompt(before)
            limit = context_length(self._model.hf_model)
            if limit is not None and len(prompt.ids) >= limit:
                raise PromptError(
                    f"the conversation and the document have {len(prompt.ids):,} tokens, but the context is {limit:,}: "
                    "attach a shorter one, or begin a new session"
                )
            usage = Usage(prompt_tokens=len(prompt.ids), bypass_reason=self._model.support)
            if self._model.support is None:
                usage = self._model.prefill(prompt.ids, progress=progress)
                if pin:
                    self._model.store.pin(
                        keys_of(self._model, prompt.ids), name or found_name or digits_of(self._model, prompt.ids)
                    )
            remembered = history.remember(document, prompt, as_token_ids([]))
            self._db.add(self.name, [remembered], self._head)
            self._load()
        return usage

    def delete(self, turn: int) -> None:
        """Leave a turn out of the conversation; what comes after it is computed anew. `undo` brings it back."""
        with self._lock:
            self._load()
            start = self._start_of(turn)
            end = start + 1
            while end < len(self._branch) and self._branch[end].role == "assistant":
                end += 1
            kept, after = self._branch[:start], self._branch[end:]
            parent = kept[-1].id if kept else None
            if not after:
                self._db.move(self.name, parent)
            else:
                # What was computed after the deleted turn was computed with it: no anchors are left there.
                plain = [Message(0, None, m.role, m.content, m.meta, m.created) for m in after]
                self._db.add(self.name, plain, parent)
            self._load()

    def undo(self) -> bool:
        """Take back the last send, regenerate, edit, attach or delete; False when nothing is left to take back."""
        with self._lock:
            done = self._db.undo(self.name)
            self._load()
            return done

    def fork(self, name: str) -> Session:
        """Return a new session that goes on from here; both share all blocks up to this point."""
        with self._lock:
            self._db.fork(self.name, name)
            return Session(
                self._model,
                name,
                db=self._db,
                when_full=self.when_full,
                template_kwargs=self._template_kwargs,
            )

    def rename(self, name: str) -> None:
        """Call it something else."""
        with self._lock:
            self._db.rename(self.name, name)
            self.name = name

    def configure(self, **settings: Any) -> None:
        """Keep arguments of ``generate()`` for every further reply; None takes one away."""
        with self._lock:
            kept = {name: value for name, value in {**self.settings, **settings}.items() if value is not None}
            try:
                json.dumps(kept)
            except TypeError as error:
                raise ConfigError(f"settings are numbers, words and lists of them: {error}") from None
            self._db.set_settings(self.name, kept)
            self.settings = kept

    def export(self, kind: str = "md") -> str:
        """Return the current branch as text.

        Args:
            kind: ``"md"`` or ``"json"`` (messages with roles, as chat templates take them, and their costs).
        """
        with self._lock:
            self._load()
            if kind == "json":
                messages = [
                    {"role": m.role, "content": m.content, **({"meta": m.meta} if m.meta else {})} for m in self._branch
                ]
                found = {"name": self.name, "system": self.system, "settings": self.settings, "messages": messages}
                return json.dumps(found, ensure_ascii=False, indent=2)
            if kind != "md":
                raise ConfigError(f'export as "md" or "json", not {kind!r}')
            parts = [f"# {self.name}\n"]
            if self.system is not None:
                parts.append(f"> {self.system}\n")
            for message in self._branch:
                if message.role == "document":
                    parts.append(f"*Attached: {message.meta.get('name', 'a document')}*\n")
                else:
                    parts.append(f"**{'You' if message.role == 'user' else 'Model'}**\n\n{message.content}\n")
            return "\n".join(parts)

    def streams(self) -> list[TokenIds]:
        """Return the token ids of every conversation that was had here: of all branches, up to each reply."""
        with self._lock:
            branches = [self._db.branch(head) for head in self._db.heads(self.name)]
        found = [ids for branch in branches for ids in History(self._model.tokenizer, branch).streams]
        unique = {ids.tobytes(): ids for ids in found if len(ids)}
        return sorted(unique.values(), key=len, reverse=True)

    def forget(self) -> ForgetReport:
        """Erase the KV of this conversation from the store; its words stay until the session is removed.

        See `CachedModel.forget`.
        """
        return self._model.forget(self)

    def close(self) -> None:
        """Close the file of sessions, if this session opened it."""
        if self._owns_db:
            self._db.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        turns = len(self.turns)
        tokens = History(self._model.tokenizer, self._branch).tokens
        return f"<Session {self.name!r}: {turns} turns, {format_count(tokens)} tokens>"


def _message(role: str, content: str, meta: dict[str, Any] | None = None) -> Message:
    return Message(0, None, role, content, meta or {}, time.time())
