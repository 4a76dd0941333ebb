"""`Answer`: what a model said to one question about a document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvembed._usage import Usage, reply_bundle

if TYPE_CHECKING:
    from collections.abc import Collection

    from kvembed._keys import TokenIds
    from kvembed._prompt_view import PromptView

__all__ = ["Answer"]


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
        document: Name of the document that was asked.
    """

    text: str
    question: str
    usage: Usage
    prompt_ids: TokenIds
    token_ids: TokenIds
    prompt: PromptView | None = None
    document: str = ""

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<Answer {self.text!r}>"

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        return reply_bundle(self.question, self.text, self.usage, self.prompt, include, exclude)
