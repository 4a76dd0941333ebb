"""How long a text may be, found out before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from kvembed._errors import PromptError
from kvembed._prompt import tokenize

if TYPE_CHECKING:
    from kvembed._keys import TokenIds

__all__ = ["refuse_too_long", "tokens_of"]

_SAMPLE = 100_000
_CHARS_PER_TOKEN = 100
"""No text has so many; only then is its length guessed rather than counted."""


def tokens_of(tokenizer: Any, text: str, limit: int | None, *, special: bool) -> TokenIds:
    """Return the ids of a document's text.

    Raises:
        PromptError: It is so long that tokenising it would take minutes for nothing.
    """
    if limit is not None and len(text) > _SAMPLE and len(text) > _CHARS_PER_TOKEN * limit:
        sample = len(tokenize(tokenizer, text[:_SAMPLE], special=False))
        _refuse(f"about {sample * len(text) // _SAMPLE:,}", limit)
    return tokenize(tokenizer, text, special=special)


def refuse_too_long(tokens: int, limit: int | None) -> None:
    """Raise `PromptError` for a document that leaves no room in the context."""
    if limit is not None and tokens >= limit:
        _refuse(f"{tokens:,}", limit)


def _refuse(tokens: str, limit: int) -> NoReturn:
    raise PromptError(
        f"the document has {tokens} tokens, but the model's context is {limit:,}: split it into parts that fit with "
        "model.documents(...) (overlap= makes windows of them), pass only the chapters you need, or use a model with a "
        "longer context"
    )
