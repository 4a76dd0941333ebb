"""`Parts`: a text that is longer than the context, as several documents that each fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from kvembed._documents.document import Document
from kvembed._documents.reading import Content, read_document
from kvembed._errors import ConfigError
from kvembed._prompt import context_length, split_chat, tokenize
from kvembed._units import format_bytes, format_count

if TYPE_CHECKING:
    from kvembed._documents.answer import Answer
    from kvembed._documents.reading import Source
    from kvembed._model import CachedModel
    from kvembed._progress import Progress

__all__ = ["Parts", "prepare_parts", "Split", "split_text"]

_MOST_ROOM = 1024
_CHARS_PER_TOKEN = 6
_BORDERS = (r"\n(?=#{1,6} |\[Document \d)", r"\n\s*\n", r"\n", r"(?<=[.!?])\s", r"\s")
"""Where a text is cut, the best first: before headings, between paragraphs, lines, sentences, words."""


class Split(NamedTuple):
    """How to cut: most tokens of a part, and how many of them the next part has too."""

    max_tokens: int | None
    overlap: int


class Parts(Sequence[Document]):
    """The parts of one text, in order; each is a `Document`. Made by `CachedModel.documents`.

    Attributes:
        name: What the whole is called.
    """

    def __init__(self, name: str, documents: Sequence[Document]) -> None:
        self.name = name
        self._documents = list(documents)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        """Return a part."""
        return self._documents[index]

    def __len__(self) -> int:
        return len(self._documents)

    @property
    def tokens(self) -> int:
        """Tokens of all parts; what lies in two of them counts twice."""
        return sum(document.tokens for document in self)

    def ask(self, question: str, *, max_new_tokens: int = 256, **kwargs: Any) -> list[Answer]:
        """Put one question to every part, each by itself; ``answer.document`` says which one answered.

        No part knows of the others. To make one answer of these, ask about them: they are a text like any other.

        Args:
            question: The question.
            max_new_tokens: Most tokens of each answer.
            **kwargs: Further arguments of ``generate()``; greedy unless ``do_sample=True``.
        """
        return [document.ask(question, max_new_tokens=max_new_tokens, **kwargs) for document in self]

    def ask_many(self, questions: Sequence[str], *, max_new_tokens: int = 256, **kwargs: Any) -> list[list[Answer]]:
        """Put many questions to every part, as `Document.ask_many` does; return the answers of all parts to each.

        Arguments as for `Document.ask_many`.
        """
        questions = [questions] if isinstance(questions, str) else list(questions)
        by_part = [document.ask_many(questions, max_new_tokens=max_new_tokens, **kwargs) for document in self]
        return [[answers[i] for answers in by_part] for i in range(len(questions))]

    def __repr__(self) -> str:
        nbytes = sum(document.tokens * document._model.kv_bytes_per_token for document in self)
        tokens = format_count(self.tokens)
        return f"<Parts {self.name!r}: {len(self)} documents, {tokens} tokens, {format_bytes(nbytes)} of KV>"


def prepare_parts(
    model: CachedModel,
    source: Source,
    split: Split,
    *,
    name: str | None,
    system: str | None,
    pin: bool,
    prefill: bool,
    progress: Progress | None,
) -> Parts:
    """Read, split, tokenise and prefill; see `CachedModel.documents`."""
    content = read_document(source)
    max_tokens, overlap = split.max_tokens, split.overlap
    before, after, has_special = split_chat(model.tokenizer, "", system)
    frame = len(tokenize(model.tokenizer, before, special=not has_special)) + len(
        tokenize(model.tokenizer, after, special=False)
    )
    limit = context_length(model.hf_model)
    if max_tokens is None:
        if limit is None:
            raise ConfigError("the model's config does not say how long its context is: give max_tokens=")
        max_tokens = limit - min(_MOST_ROOM, limit // 4)
    budget = max_tokens - frame
    if budget < 16 or (limit is not None and max_tokens > limit):
        raise ConfigError(f"max_tokens must be between {frame + 16} and the model's context, not {max_tokens:,}")
    if not 0 <= overlap <= budget // 2:
        raise ConfigError(f"overlap must be between 0 and half of a part, {budget // 2:,} tokens, not {overlap:,}")
    texts = split_text(model.tokenizer, content.text, budget, overlap)
    whole = name or content.name
    documents: list[Document] = []
    for i, text in enumerate(texts, 1):
        part = f"{whole} ({i} of {len(texts)})" if len(texts) > 1 and whole else whole
        documents.append(
            Document.of(
                model,
                Content(text, "" if name else part, content.source),
                name=part if name else None,
                system=system,
                pin=pin,
                prefill=prefill,
                progress=progress,
            )
        )
    return Parts(whole or documents[0].name, documents)


def split_text(tokenizer: Any, text: str, budget: int, overlap: int = 0) -> list[str]:
    """Cut a text into parts of at most ``budget`` tokens, each as long as its borders allow.

    Args:
        tokenizer: The model's tokenizer.
        text: The text.
        budget: Most tokens of a part.
        overlap: About so many tokens of a part stand at the beginning of the next one too.
    """
    parts: list[str] = []
    start = 0
    while start < len(text):
        end = start + _longest(tokenizer, text, start, budget)
        if end < len(text):
            end = start + _border(text[start:end])
        part = text[start:end]
        if part.strip():
            parts.append(part.strip("\n"))
        if end >= len(text):
            break
        back = _last(tokenizer, part, overlap) if overlap else 0
        start = max(start + 1, end - back)
    return parts


def _longest(tokenizer: Any, text: str, start: int, budget: int) -> int:
    """Return how many characters from ``start`` on make at most ``budget`` tokens."""
    size = budget * _CHARS_PER_TOKEN
    tokens = _count(tokenizer, text[start : start + size])
    while tokens <= budget:
        if start + size >= len(text):
            return len(text) - start
        size *= 2
        tokens = _count(tokenizer, text[start : start + size])
    size = min(size, len(text) - start)
    low, high = 1, size  # a single character is taken whatever it costs
    # Text is much the same all over, so a guess in proportion is near.
    guess = max(1, size * budget // tokens)
    while high - low > max(8, size // 200):
        if _count(tokenizer, text[start : start + guess]) <= budget:
            low = guess
        else:
            high = guess
        guess = (low + high) // 2
    return low


def _count(tokenizer: Any, text: str) -> int:
    # The blank line that a question stands behind belongs to the document.
    return len(tokenize(tokenizer, f"{text}\n\n", special=False))


def _border(text: str) -> int:
    """Return where to cut a text, in its second half if it has a border there."""
    half = len(text) // 2
    for border in _BORDERS:
        found = [match.end() for match in re.finditer(border, text[half:])]
        if found and half + found[-1] > 0:
            return half + found[-1]
    return len(text)


def _last(tokenizer: Any, text: str, tokens: int) -> int:
    """Return how many last characters of a text make about so many tokens, from the beginning of a line or word on."""
    size = max(1, len(text) * tokens // max(1, _count(tokenizer, text)))
    part = text[-size:]
    found = re.search(r"\n|\s", part)
    return len(part) - found.end() if found is not None and found.end() < len(part) else len(part)
