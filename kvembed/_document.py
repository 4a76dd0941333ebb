"""Documents: a text that is prefilled once and asked many questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvembed._errors import ConfigError, PromptError
from kvembed._html import mimebundle, panel, text_html
from kvembed._keys import as_token_ids, block_key, chain_keys, snapshot_key
from kvembed._prompt import as_prompt, check_prompt, context_length, decoder, split_chat, tokenize
from kvembed._prompt_view import prompt_view
from kvembed._stream import stream_text
from kvembed._units import format_bytes, format_count
from kvembed._usage import Usage, reply_bundle

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterator

    from kvembed._forget import ForgetReport
    from kvembed._keys import TokenIds
    from kvembed._model import CachedModel
    from kvembed._prompt_view import PromptView

__all__ = ["Answer", "digits_of", "Document", "keys_of", "read_document", "view_of"]


@dataclass(frozen=True, repr=False)
class Answer:
    """The answer to one question.

    Args:
        text: The reply, without special tokens.
        question: What was asked.
        usage: What it cost.
        prompt_ids: Ids of the whole prompt, int32: what plain transformers would be given.
        token_ids: Ids of the reply, int32.
        prompt: Where each part of the prompt came from, with its text; None where nobody knows.
    """

    text: str
    question: str
    usage: Usage
    prompt_ids: TokenIds
    token_ids: TokenIds
    prompt: PromptView | None = None

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<Answer {self.text!r}>"

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        return reply_bundle(self.question, self.text, self.usage, self.prompt, include, exclude)


class Document:
    """A text in a model's context, its KV kept. Made by `CachedModel.document`.

    Attributes:
        name: What it is called.
        prefix_ids: Ids of everything before a question, int32: the same for every question.
        usage: What preparing it cost.
    """

    def __init__(self, model: CachedModel, name: str, prefix_ids: TokenIds, after: str, usage: Usage) -> None:
        self._model = model
        self._after = after
        self.name = name
        self.prefix_ids = prefix_ids
        self.usage = usage

    @classmethod
    def prepare(
        cls,
        model: CachedModel,
        source: str | os.PathLike[str],
        *,
        name: str | None,
        system: str | None,
        pin: bool,
        prefill: bool,
        progress: Any,
    ) -> Document:
        """Read, tokenise and prefill; see `CachedModel.document`."""
        if pin and not prefill:
            raise ConfigError("pin=True needs prefill=True: there is nothing to pin before the document is computed")
        text, found_name = read_document(source)
        if not text.strip():
            raise PromptError("the document is empty")
        before, after, has_special = split_chat(model.tokenizer, text, system)
        ids = tokenize(model.tokenizer, before, special=not has_special)
        limit = context_length(model.hf_model)
        if limit is not None and len(ids) >= limit:
            raise PromptError(
                f"the document has {len(ids):,} tokens, but the model's context is {limit:,}: split it, or use a model "
                "with a longer context"
            )
        check_prompt(model.hf_model, ids)
        if not prefill or model.support is not None:
            usage = Usage(prompt_tokens=len(ids), bypass_reason=model.support)  # nothing was computed
        else:
            usage = model.prefill(ids, progress=progress)
        document = cls(model, name or found_name or digits_of(model, ids), ids, after, usage)
        if pin:
            document.pin()
        return document

    @property
    def tokens(self) -> int:
        """Tokens before the question."""
        return len(self.prefix_ids)

    def prompt_ids(self, question: str) -> TokenIds:
        """Return the ids of the whole prompt for one question, int32.

        The question is tokenised apart from the document, so that its first characters cannot change the
        document's last token.
        """
        if not question.strip():
            raise PromptError("the question is empty")
        suffix = tokenize(self._model.tokenizer, question + self._after, special=False)
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
        prompt_view = view_of(self._model, ids, usage)
        return Answer(text, question, usage, ids, reply, prompt_view)

    def stream(self, question: str, *, max_new_tokens: int = 256, **kwargs: Any) -> Iterator[str]:
        """Answer one question piece by piece; arguments as for `ask`. ``model.usage`` is set at the end."""
        ids = self.prompt_ids(question)
        check_prompt(self._model.hf_model, ids, max_new_tokens)
        return stream_text(self._model, ids, max_new_tokens, {"do_sample": False, **kwargs})

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
        """Erase the document and what was asked about it from the store; see `CachedModel.forget`."""
        return self._model.forget(self)

    def __repr__(self) -> str:
        size = format_bytes(self.tokens * self._model.kv_bytes_per_token)
        return f"<Document {self.name!r}: {format_count(self.tokens)} tokens, {size} of KV>"

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        usage = self.usage._repr_mimebundle_()["text/html"]
        markup = panel(repr(self)[1:-1], text_html("What preparing it cost:", "opacity:.8"), usage)
        return mimebundle(repr(self), markup, include, exclude)


def view_of(model: CachedModel, ids: TokenIds, usage: Usage) -> PromptView | None:
    """Return where each part of a prompt came from, with its text."""
    return prompt_view(ids, usage.spans, decoder(model.tokenizer))


def keys_of(model: CachedModel, ids: TokenIds) -> list[bytes]:
    """Return the keys of all blocks of a text that is stored, and of the one that holds its last tokens."""
    engine = model._engine
    size = engine.block_size
    keys = chain_keys(engine.root, ids, size)
    parent, rest = keys[-1] if keys else engine.root, ids[len(keys) * size :]
    name = block_key(parent, np.ascontiguousarray(rest)) if len(rest) else parent
    if engine.spec.has_state:
        return [*keys, name, snapshot_key(name)] if len(rest) else [*keys, snapshot_key(name)]
    # The last tokens may be the start of a longer block, of a conversation that went on from here.
    tail = model.store.find_tail(parent, rest)
    if tail is not None and tail[1] == len(rest):
        keys.append(tail[0].info.key)
    elif len(rest):
        keys.append(name)  # still on its way to the disk
    return keys


def _is_file(text: str) -> bool:
    """True when a string is the name of an existing file, rather than the text itself."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # longer than a name can be, or with a character no name has
        return False


def digits_of(model: CachedModel, ids: TokenIds) -> str:
    """Return a name for a text that says nothing of it: a pinned name is written to the catalog."""
    return f"text-{chain_keys(model._engine.root, ids, len(ids))[0].hex()[:12]}"


def read_document(source: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the text and a name for it."""
    if isinstance(source, str) and not _is_file(source):
        return source, ""
    path = Path(source)
    try:
        return path.read_text(encoding="utf-8"), path.name
    except FileNotFoundError as error:
        raise ConfigError(
            f"no file {str(path)!r}: pass the text itself, or the path of an existing text file"
        ) from error
    except UnicodeDecodeError:
        # Not `from error`: it holds the whole text, and would take it into logs.
        raise ConfigError(f"{path.name!r} is not UTF-8 text: convert it to text first") from None
    except OSError as error:
        raise ConfigError(f"{path.name!r} cannot be read: {error.strerror or error}") from error
