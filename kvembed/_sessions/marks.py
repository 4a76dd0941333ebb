"""`Marks`: the special tokens of a tokenizer, at which a text can be cut without changing any token of it.

Tokenizers first cut a text at its special tokens, and then tokenise each piece by itself.
"""

from __future__ import annotations

from typing import Any

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
