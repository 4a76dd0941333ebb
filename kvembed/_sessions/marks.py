"""`Marks`: the special tokens of a tokenizer, at which a text can be cut without changing any token of it.

Tokenizers first cut a text at its special tokens, and then tokenise each piece by itself. `tokenizer_digest` tells
tokenizers apart: the ids of one mean nothing to another.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

if TYPE_CHECKING:
    from kvembed._keys import TokenIds
    from kvembed._model import CachedModel

__all__ = ["Marks", "marks_of", "tokenizer_digest"]

_WINDOW = 4096
"""Characters in which the last mark is looked for: templates have some around every message."""


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a hex digest of all that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = backend.to_str()
        # Truncation and padding, which stand before this, are those of the last call. Taken out of the text, because
        # reading it as JSON costs seconds with a large vocabulary.
        content = content[max(0, content.find('"added_tokens"')) :]
    else:
        content = json.dumps({"class": type(tokenizer).__qualname__, "vocab": tokenizer.get_vocab()}, sort_keys=True)
    return blake3(content.encode()).hexdigest(16)


class Marks:
    """Special tokens that stand in a text as they are.

    Args:
        tokenizer: The model's tokenizer.

    Attributes:
        tokenizer: It.
        special_ids: Ids of all special tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special_ids = frozenset(tokenizer.all_special_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        plain = {
            token.content: number
            for number, token in added.items()
            if token.special and token.content and not (token.normalized or token.single_word)
        }
        # One that is part of another could be found in the middle of that other.
        self._ids = {
            text: number
            for text, number in plain.items()
            if not any(text != other.content and text in other.content for other in added.values())
        }

    @cached_property
    def digest(self) -> str:
        """The tokenizer's `tokenizer_digest`."""
        return tokenizer_digest(self.tokenizer)

    def last_before(self, text: str, end: int) -> int:
        """Return where the last mark before a character begins; 0 when there is none nearby."""
        window = text[max(0, end - _WINDOW) : end]
        found = max((window.rfind(mark) for mark in self._ids), default=-1)
        return end - len(window) + found if found >= 0 else 0

    def cut(self, text: str, ids: TokenIds, end: int) -> tuple[int, TokenIds]:
        """Cut a text and its ids right after the last mark that ends before a character.

        Returns:
            Characters and ids that are left; nothing where no mark is nearby.
        """
        start = max(0, end - _WINDOW)
        window = text[start:end]
        ends = [(window.rfind(mark) + len(mark), mark) for mark in self._ids if mark in window]
        after, mark = max(ends, default=(0, ""))
        if not mark:
            return 0, ids[:0]
        # Counted from the end: a reply further up may have special tokens that its text does not show.
        places = np.flatnonzero(ids == self._ids[mark])
        behind = text.count(mark, start + after)
        if behind >= len(places):
            return 0, ids[:0]
        return start + after, ids[: int(places[len(places) - 1 - behind]) + 1]


def marks_of(model: CachedModel) -> Marks:
    """Return the marks of a model's tokenizer, which all its sessions share: a digest costs 0.2 s with Gemma's."""
    if model._marks is None or model._marks.tokenizer is not model.tokenizer:
        model._marks = Marks(model.tokenizer)
    return model._marks
