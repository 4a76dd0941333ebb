"""`Session`: one conversation with a model, whose every turn computes only what is new."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kvembed._documents.reading import read_document
from kvembed._documents.stored import digits_of, keys_of, view_of
from kvembed._errors import ConfigError, PromptError
from kvembed._forget import ForgetReport
from kvembed._keys import as_token_ids
from kvembed._paths import is_disabled
from kvembed._progress import StoppedEarly
from kvembed._prompt import as_prompt, context_length
from kvembed._sessions import clock
from kvembed._sessions.losses import loss_of
from kvembed._sessions.messages import Message, message_now
from kvembed._sessions.rendering import Beginning, Prepared, dropped_of
from kvembed._sessions.replies import Reply
from kvembed._sessions.view import SessionView
from kvembed._stream import stream_text
from kvembed._usage import Usage

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from kvembed._match import PrefixMatch
    from kvembed._store_admin import StoreAdmin

__all__ = ["Session"]

_NEW_TOKENS = 512


class Session(SessionView):
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
        template_kwargs: Further arguments of the chat template, such as ``enable_thinking``; None for those of an
            existing session.
        settings: Arguments of ``generate()`` for every reply of a new session; greedy unless they say otherwise.

    Attributes:
        last: The latest reply of this object, or None.
        when_full: As given.
    """

    # --- talking ---------------------------------------------------------------------------------------

    def send(self, text: str, *, max_new_tokens: int | None = None, **kwargs: Any) -> Reply:
        """Say something and return the answer.

        Args:
            text: What to say.
            max_new_tokens: Most tokens of the answer; by default as in the session's settings, else 512.
            **kwargs: Arguments of ``generate()``, over the session's settings.

        Raises:
            PromptError: The text is empty, or does not fit the context (see ``when_full``).
        """
        return self._answer(self._said(text), max_new_tokens, kwargs)

    def stream(self, text: str, *, max_new_tokens: int | None = None, **kwargs: Any) -> Iterator[str]:
        """Say something and yield the answer piece by piece; ``last`` is the whole reply then.

        Closing the iterator stops the model after the current token, as `stop` does from another thread.
        Arguments and errors as for `send`.
        """
        return self._stream(self._said(text), max_new_tokens, kwargs)

    def regenerate(self, *, max_new_tokens: int | None = None, **kwargs: Any) -> Reply:
        """Answer the last thing the user said once more; `undo` brings the earlier answer back."""
        return self._answer(self._before_reply(), max_new_tokens, kwargs)

    def stream_regenerated(self, *, max_new_tokens: int | None = None, **kwargs: Any) -> Iterator[str]:
        """Like `regenerate`, piece by piece."""
        return self._stream(self._before_reply(), max_new_tokens, kwargs)

    def edit(self, turn: int, text: str, *, max_new_tokens: int | None = None, **kwargs: Any) -> Reply:
        """Say something else in an earlier turn, and go on from there; `undo` brings the old branch back.

        Args:
            turn: Its number, from 0; negative numbers count from the end.
            text: What to say instead.
            max_new_tokens: Most tokens of the answer.
            **kwargs: Arguments of ``generate()``.
        """
        return self._answer(self._edited(turn, text), max_new_tokens, kwargs)

    def stream_edited(self, turn: int, text: str, *, max_new_tokens: int | None = None, **kwargs: Any) -> Iterator[str]:
        """Like `edit`, piece by piece."""
        return self._stream(self._edited(turn, text), max_new_tokens, kwargs)

    def _answer(self, branch: list[Message], max_new_tokens: int | None, kwargs: dict[str, Any]) -> Reply:
        with self._talking:
            options = self._options(max_new_tokens, kwargs)
            prepared = self._prepare(branch, options["max_new_tokens"])
            ids = as_prompt(self._model.hf_model, prepared.prompt.ids)
            options["attention_mask"] = torch.ones_like(ids)
            cancel = self._cancel = threading.Event()
            try:
                with self._model._lock:
                    result = self._model._generate(ids, None, options, cancel, self._surviving(prepared))
                    usage = self._model.usage
            except StoppedEarly:
                tokens = prepared.prompt.ids
                return Reply("", Usage(prompt_tokens=len(tokens)), tokens, as_token_ids([]), False, prepared.dropped)
            return self._keep(prepared, result, usage)

    def _stream(self, branch: list[Message], max_new_tokens: int | None, kwargs: dict[str, Any]) -> Iterator[str]:
        options = self._options(max_new_tokens, kwargs)
        new = options.pop("max_new_tokens")
        prepared = self._prepare(branch, new)

        def keep(result: Any, usage: Usage) -> None:
            self._keep(prepared, result, usage)

        cancel, state_at = threading.Event(), self._surviving(prepared)

        def pieces() -> Iterator[str]:
            self._cancel = cancel
            yield from stream_text(self._model, prepared.prompt.ids, new, options, keep, state_at, cancel)

        return pieces()

    def stop(self) -> None:
        """Stop the reply that is under way, from any thread.

        The model stops after the current token, and what it has said is kept, with its KV. While it still reads the
        prompt it stops at the next step: then no turn is added, `send` returns a reply without tokens, `stream` ends,
        and what was read need not be read again. Does nothing when no reply is under way.
        """
        self._cancel.set()

    def _surviving(self, prepared: Prepared) -> int | None:
        """Return where the next turn will need a recurrent state, if the end of this prompt will not do."""
        if not self._model._engine.has_state:
            return None
        return self._renderer.surviving(prepared)

    def _options(self, max_new_tokens: int | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        found = {"do_sample": False, "max_new_tokens": _NEW_TOKENS, **self.settings, **kwargs}
        return found if max_new_tokens is None else {**found, "max_new_tokens": max_new_tokens}

    def _keep(self, prepared: Prepared, result: Any, usage: Usage) -> Reply:
        """Store a reply, whole or stopped, and move the session there."""
        tokenizer, prompt = self._model.tokenizer, prepared.prompt
        ids = as_token_ids(getattr(result, "sequences", result)[0, len(prompt.ids) :].cpu().numpy())
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        finished = len(ids) > 0 and int(ids[-1]) in prepared.history.special_ids
        meta = {**usage.to_dict(), "finished": finished}
        if prepared.dropped:
            meta["dropped_turns"] = prepared.dropped
        loss = loss_of(prepared)
        if loss is not None:
            meta["loss"] = str(loss)
        reply = prepared.history.remember(Message(0, None, "assistant", text, meta, time.time()), prompt, ids)
        known = [message for message in prepared.branch if message.id]
        parent = known[-1].id if known else None
        new = [message for message in prepared.branch if not message.id]
        with self._lock:
            self._db.add(self.name, [*new, reply] if len(ids) else new, parent, prepared.beginning.date)
            self._load()
            view = view_of(self._model, prompt.ids, usage)
            self.last = Reply(text, usage, prompt.ids, ids, finished, prepared.dropped, meta.get("loss"), view)
            return self.last

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
        found = read_document(text)
        document = message_now("document", found.text, {"name": name or found.name or "text"})
        with self._talking:
            with self._lock:
                self._load()
                parent, beginning = self._info.head, Beginning.of(self._info)
                before = self._renderer.before_words([*self._branch, document], beginning)
                history = self._renderer.history(self._branch)
            prompt = history.prompt(before)
            limit = context_length(self._model.hf_model)
            if limit is not None and len(prompt.ids) >= limit:
                raise PromptError(
                    f"the conversation and the document have {len(prompt.ids):,} tokens, but the context is {limit:,}: "
                    "attach a shorter one, or begin a new session"
                )
            refusal = "KVEMBED_DISABLE is set" if is_disabled() else self._model.support
            usage = Usage(prompt_tokens=len(prompt.ids), bypass_reason=refusal)
            if refusal is None:
                usage = self._model.prefill(prompt.ids, progress=progress)
                if pin:
                    self._model.store.pin(
                        keys_of(self._model, prompt.ids), name or found.name or digits_of(self._model, prompt.ids)
                    )
            remembered = history.remember(document, prompt, as_token_ids([]))
            with self._lock:
                self._db.add(self.name, [remembered], parent, beginning.date)
                self._load()
        return usage

    def prepare(self, *, progress: Any = None) -> Usage:
        """Compute what the next turn will begin with now, so that it pays for the new words only.

        It pays where the chat template shows earlier replies otherwise than they were generated, as those do that
        remove thinking: the next prompt then goes on from before the last reply. Elsewhere nothing is left to compute.
        Call it while nobody waits; what it cost is not part of any reply's cost.

        Args:
            progress: See `CachedModel`.

        Returns:
            What computing it cost.
        """
        with self._talking:
            with self._lock:
                self._load()
                history, beginning = self._renderer.history(self._branch), Beginning.of(self._info)
                prompt = history.prompt(
                    self._renderer.before_words(self._branch, beginning, skip_turns=dropped_of(self._branch))
                )
            if self._model.support is not None or not len(prompt.ids):
                return Usage(prompt_tokens=len(prompt.ids), bypass_reason=self._model.support)
            return self._model.prefill(prompt.ids, progress=progress)

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
                plain = [_without_computation(message) for message in after]
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
            return Session(self._model, name, db=self._db, when_full=self.when_full)

    def rename(self, name: str) -> None:
        """Call it something else.

        Raises:
            ConfigError: There is a session of this name already.
        """
        with self._lock:
            self._db.rename(self.name, name)
            self._info = self._db.info(name)

    def set_settings(self, **settings: Any) -> None:
        """Keep arguments of ``generate()`` for every further reply; None takes one away.

        Raises:
            ConfigError: They are not numbers, words, and lists of them.
        """
        with self._lock:
            self._load()
            kept = {name: value for name, value in {**self.settings, **settings}.items() if value is not None}
            self._db.set_settings(self.name, kept)
            self._load()

    def set_system(self, system: str | None) -> PrefixMatch:
        """Give the conversation another system message; `undo` brings the old one back, and its KV.

        All tokens after a system message depend on it. So what was said so far is computed again with the next turn,
        once, but for what some other conversation computed under this very system message.

        Args:
            system: The new one; None for none.

        Returns:
            The conversation as the next turn will have it, and how much of it is reusable.
        """
        with self._lock:
            self._load()
            if system != self.system:
                self._db.set_beginning(self.name, system=system, date=self.date)
        return self.preview("")

    def refresh_date(self) -> PrefixMatch:
        """Tell the chat template the present time from now on, and not that of the first message.

        A template that puts the date in front of a conversation makes all of it depend on the date: as for
        `set_system`, it is then computed again, once. With other templates this changes nothing.

        Returns:
            The conversation as the next turn will have it, and how much of it is reusable.
        """
        with self._lock:
            self._load()
            self._db.set_beginning(self.name, system=self.system, date=clock.now())
        return self.preview("")

    def forget(self, *, words: bool = True) -> ForgetReport:
        """Erase this conversation for good: its KV, its words on all branches, and the session itself.

        Messages that forks of it have too stay with these, and the report says so; what of their KV went is computed
        again with their next turn. A pinned document's KV stays: ``store.forget()`` takes its name. The store's
        folder, and the file of sessions with its log, are scanned afterwards for what was erased. Waits for a reply
        that is under way in `send`.

        Args:
            words: False erases the KV only, and the conversation can go on.

        Returns:
            What was erased, and what the scan found.

        Raises:
            ConfigError: The session is gone already.
            StoreReadOnlyError: The store was opened read-only.
        """
        with self._talking:
            cached = self._model.support is None
            report = self._model.forget(self, words=False) if cached or not words else ForgetReport()
            if not words:
                return report
            with self._lock:
                gone = self._db.forget(self.name)
                self._branch = []
                self._renderer.forget()
                self.last = None
        return replace(
            report,
            messages=gone.messages,
            messages_kept=gone.kept,
            sharers=gone.sharers,
            scanned=report.scanned + gone.scanned,
            traces=report.traces + gone.traces,
        )

    def forget_in(self, store: StoreAdmin) -> ForgetReport:
        """Erase it as `forget` does; ``KVStore.forget`` calls this.

        Raises:
            ConfigError: It is a session of another store.
        """
        if self._model.store is not store:
            raise ConfigError(f"session {self.name!r} is kept in another store: call its own forget()")
        return self.forget()


def _without_computation(message: Message) -> Message:
    meta = {name: value for name, value in message.meta.items() if name != "dropped_turns"}
    return Message(0, None, message.role, message.content, meta, message.created)
