"""`Marks`: the special tokens of a tokenizer, at which a text can be cut without changing any token of it.

Tokenizers first cut a text at its special tokens, and then tokenise each piece by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from kvembed._keys import TokenIds

__all__ = ["Marks"]

_WINDOW = 4096
"""Characters in which the last mark is looked for: templates have some around every message."""


class Marks:
    """Special tokens that stand in a text as they are.

    Args:
        tokenizer: The model's tokenizer.

    Attributes:
        special_ids: Ids of all special tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
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
