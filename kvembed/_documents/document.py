"""`Document`: a text that is prefilled once and asked many questions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvembed._documents.answer import Answer
from kvembed._documents.asking import ask_many
from kvembed._documents.fitting import refuse_too_long, tokens_of
from kvembed._documents.reading import read_document
from kvembed._documents.stored import digits_of, keys_of, view_of
from kvembed._errors import ConfigError, PromptError
from kvembed._html import mimebundle, panel, text_html
from kvembed._keys import as_token_ids
from kvembed._paths import is_disabled
from kvembed._prompt import as_prompt, check_prompt, context_length, split_chat, tokenize
from kvembed._stream import stream_text
from kvembed._units import format_bytes, format_count
from kvembed._usage import Usage

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from kvembed._documents.reading import Content, Source
    from kvembed._forget import ForgetReport
    from kvembed._keys import TokenIds
    from kvembed._model import CachedModel
    from kvembed._progress import Progress
    from kvembed._store_admin import StoreAdmin

__all__ = ["Document"]


class Document:
    """A text in a model's context, its KV kept. Made by `CachedModel.document`, or by `Library.open`.

    Attributes:
        name: What it is called.
        prefix_ids: Ids of everything before a question, int32: the same for every question.
        around: What stands before and after a question, as the chat template has it.
        source: The file it was read from, or empty.
        usage: What preparing it cost, or what adding to it did.
    """

    def __init__(
        self,
        model: CachedModel,
        name: str,
        prefix_ids: TokenIds,
        around: tuple[str, str],
        usage: Usage,
        source: str = "",
    ) -> None:
        self._model = model
        self.around = around
        self.name = name
        self.prefix_ids = prefix_ids
        self.usage = usage
        self.source = source
        self._named = False

    @classmethod
    def of(
        cls,
        model: CachedModel,
        content: Content,
        *,
        name: str | None,
        system: str | None,
        pin: bool,
        prefill: bool,
        progress: Progress | None,
    ) -> Document:
        """Tokenise and prefill what was read; see `CachedModel.document`."""
        if pin and not prefill:
            raise ConfigError("pin=True needs prefill=True: there is nothing to pin before the document is computed")
        before, after, has_special = split_chat(model.tokenizer, content.text, system)
        limit = context_length(model.hf_model)
        ids = tokens_of(model.tokenizer, before, limit, special=not has_special)
        refuse_too_long(len(ids), limit)
        check_prompt(model.hf_model, ids)
        lead = "" if getattr(model.tokenizer, "chat_template", None) else "Question: "
        document = cls(model, "", ids, (lead, after), Usage(), content.source)
        document._named = bool(name)
        document.name = name or content.name or digits_of(model, ids)
        document._begin(prefill=prefill, progress=progress)
        if pin:
            document.pin()
        return document

    @classmethod
    def restored(
        cls,
        model: CachedModel,
        name: str,
        prefix_ids: TokenIds,
        around: tuple[str, str],
        source: str,
        *,
        prefill: bool,
        progress: Progress | None,
    ) -> Document:
        """Make a document of what a library knows of it."""
        refuse_too_long(len(prefix_ids), context_length(model.hf_model))
        document = cls(model, name, prefix_ids, around, Usage(), source)
        document._named = True
        document._begin(prefill=prefill, progress=progress)
        return document

    def _begin(self, *, prefill: bool, progress: Progress | None) -> None:
        """Write the document down, then compute it: should that be interrupted, it goes on from the library."""
        model = self._model
        self._record()
        if not prefill or is_disabled() or model.support is not None:
            reason = "KVEMBED_DISABLE is set" if is_disabled() else model.support
            self.usage = Usage(prompt_tokens=self.tokens, bypass_reason=reason)  # nothing was computed
        else:
            self.usage = model.prefill(self.prefix_ids, progress=progress)

    def _record(self) -> None:
        if self._named:
            self._model.library.record(self)

    # --- its size ------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Tokens before the question."""
        return len(self.prefix_ids)

    @property
    def context(self) -> int | None:
        """Tokens the model was made for; None when its config does not say."""
        return context_length(self._model.hf_model)

    @property
    def room(self) -> int | None:
        """Tokens that are left for a question and its answer; None where the context is not known."""
        return None if self.context is None else self.context - self.tokens

    # --- asking --------------------------------------------------------------------------------------------

    def prompt_ids(self, question: str) -> TokenIds:
        """Return the ids of the whole prompt for one question, int32.

        The question is tokenised apart from the document, so that its first characters cannot change the
        document's last token.
        """
        if not question.strip():
            raise PromptError("the question is empty")
        suffix = tokenize(self._model.tokenizer, question.join(self.around), special=False)
        return as_token_ids(np.concatenate([self.prefix_ids, suffix]))

    def ask(self, question: str, *, max_new_tokens: int = 256, **kwargs: Any) -> Answer:
        """Answer one question.

        Args:
            question: The question.
            max_new_tokens: Most tokens of the answer.
            **kwargs: Further arguments of ``generate()``; greedy unless ``do_sample=True``.

        Raises:
            PromptError: The question is empty, or does not fit the context with the document.
        """
        ids = self.prompt_ids(question)
        check_prompt(self._model.hf_model, ids, max_new_tokens)
        prompt = as_prompt(self._model.hf_model, ids)
        arguments = {
            "attention_mask": torch.ones_like(prompt),
            "do_sample": False,
            "max_new_tokens": max_new_tokens,
            **kwargs,
        }
        with self._model._lock:
            result = self._model.generate(prompt, **arguments)
            usage = self._model.usage
        reply = as_token_ids(getattr(result, "sequences", result)[0, len(ids) :].cpu().numpy())
        text = self._model.tokenizer.decode(reply, skip_special_tokens=True)
        return Answer(text, question, usage, ids, reply, view_of(self._model, ids, usage), self.name)

    def ask_many(
        self,
        questions: Sequence[str],
        *,
        max_new_tokens: int = 256,
        together: bool | None = None,
        progress: Progress | None = None,
        **kwargs: Any,
    ) -> list[Answer]:
        """Answer many questions, each by itself, on one prefill; the texts are those that `ask` gives.

        Where that is sure to give the same texts, up to 16 questions are computed together, which is several times as
        fast: greedy decoding in float32 on the CPU, with full attention. An answer in which two tokens were so close
        that rounding could have turned them is asked again by itself. What is answered together leaves no KV.

        Args:
            questions: The questions.
            max_new_tokens: Most tokens of each answer.
            together: True computes them together in bfloat16 too, where rounding is coarse and texts may differ from
                those of `ask`; False never does.
            progress: See `CachedModel`; counts questions.
            **kwargs: Further arguments of ``generate()``; greedy unless ``do_sample=True``.

        Returns:
            The answers, in the order of the questions.

        Raises:
            PromptError: A question is empty, or does not fit the context with the document; nothing was computed.
        """
        return ask_many(self._model, self, questions, max_new_tokens, progress, kwargs, together)

    def stream(self, question: str, *, max_new_tokens: int = 256, **kwargs: Any) -> Iterator[str]:
        """Answer one question piece by piece; arguments as for `ask`. ``model.usage`` is set at the end."""
        ids = self.prompt_ids(question)
        check_prompt(self._model.hf_model, ids, max_new_tokens)
        return stream_text(self._model, ids, max_new_tokens, {"do_sample": False, **kwargs})

    # --- changing ------------------------------------------------------------------------------------------

    def add(self, source: Source, *, progress: Progress | None = None) -> Usage:
        """Append a text, and compute only that.

        It is tokenised by itself and put behind the document, as a question would be; a pinned document is pinned with
        it. Answers given before stay what they were.

        Args:
            source: A text, the path of a file, or a list of these.
            progress: See `CachedModel`.

        Returns:
            What it cost.

        Raises:
            PromptError: It is empty, or the document would not fit the context any more. Then nothing has changed.
        """
        model = self._model
        limit = self.context
        # The document ends with the blank line that stands before a question; so does what is added.
        new = tokens_of(model.tokenizer, f"{read_document(source).text}\n\n", limit, special=False)
        ids = as_token_ids(np.concatenate([self.prefix_ids, new]))
        refuse_too_long(len(ids), limit)
        pinned = self.name in model.store.pins()
        self.prefix_ids = ids
        self._begin(prefill=True, progress=progress)
        if pinned:
            self.pin()
        return self.usage

    def fork(self, name: str) -> Document:
        """Return another document with the same text so far, to add something else to; it costs nothing.

        Args:
            name: What to call it.

        Raises:
            ConfigError: This document, or another one in the library, has that name.
        """
        if not name.strip():
            raise ConfigError("a document needs a name")
        if name == self.name or name in self._model.library:
            raise ConfigError(f"there is a document {name!r} already")
        usage = Usage(prompt_tokens=self.tokens)
        fork = Document(self._model, name, self.prefix_ids, self.around, usage, self.source)
        fork._named = True
        fork._record()
        return fork

    # --- keeping -------------------------------------------------------------------------------------------

    def _keys(self) -> list[bytes]:
        return keys_of(self._model, self.prefix_ids)

    def pin(self) -> None:
        """Keep the document's blocks when others are evicted, under its name."""
        if self._model.support is not None:
            raise ConfigError(f"nothing to pin: {self._model.support}")
        self._model.store.pin(self._keys(), self.name)

    def unpin(self) -> None:
        """Let the document's blocks be evicted like any others."""
        self._model.store.unpin(self.name)

    def forget(self) -> ForgetReport:
        """Erase the document and what was asked about it from store and library; see `CachedModel.forget`."""
        return self._model.forget(self)

    def forget_in(self, store: StoreAdmin) -> ForgetReport:
        """Erase it as `forget` does; ``KVStore.forget`` calls this.

        Raises:
            ConfigError: It is a document of another store.
        """
        if self._model.store is not store:
            raise ConfigError(f"document {self.name!r} is kept in another store: call its own forget()")
        return self.forget()

    def __repr__(self) -> str:
        context = f" of {format_count(self.context)}" if self.context is not None else ""
        size = format_bytes(self.tokens * self._model.kv_bytes_per_token)
        return f"<Document {self.name!r}: {format_count(self.tokens)}{context} tokens, {size} of KV>"

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        usage = self.usage._repr_mimebundle_()["text/html"]
        markup = panel(repr(self)[1:-1], text_html("What preparing it cost:", "opacity:.8"), usage)
        return mimebundle(repr(self), markup, include, exclude)
