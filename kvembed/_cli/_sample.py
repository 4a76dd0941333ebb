"""A long real text that every Python has, questions about it, and plain transformers to compare with."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._model import CachedModel

__all__ = ["QUESTIONS", "Plain", "plain_generate", "reference_text", "trim_to_tokens"]

# The statements the questions are about come first, so that a short document answers them too.
_FIRST = ("assert", "pass", "lambda", "while", "with", "for", "try", "break", "continue", "global", "return")

QUESTIONS = (
    "What does the assert statement do?",
    "What is the pass statement useful for?",
    "What is a lambda expression?",
    "How does the while statement work?",
    "What is the with statement used for?",
    "What does the for statement iterate over?",
)


class Plain(NamedTuple):
    """What transformers alone made of a prompt: new ids, seconds to the first, and from there to the last."""

    token_ids: list[int]
    ttft_s: float
    decode_s: float


def reference_text() -> str:
    """Return the language reference that ``help()`` shows: about 470,000 characters of English and grammar."""
    from pydoc_data.topics import topics

    first = [name for name in _FIRST if name in topics]
    return "\n\n".join(topics[name].strip() for name in [*first, *(name for name in topics if name not in first)])


def trim_to_tokens(tokenizer: Any, text: str, tokens: int) -> str:
    """Return the start of a text that has at most ``tokens`` tokens, cut at a line end where one is near."""
    # Nine characters a token is more than English has; a whole reference would take a second to tokenise.
    text = text[: tokens * 9]
    # verbose: "longer than the model can take" is not meant for text that is about to be cut.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) <= tokens:
        return text
    cut = tokenizer.decode(ids[:tokens])
    # Decoding need not give the same characters back, so only the length is used.
    cut = text[: len(cut)]
    line = cut.rfind("\n")
    return cut[:line] if line > max(0, len(cut) - 400) else cut


def plain_generate(model: CachedModel, prompt_ids: Sequence[int], max_new_tokens: int) -> Plain:
    """Generate with transformers alone, greedily, on the very same weights.

    Returns:
        The new ids, and how long they took.
    """
    import torch

    from kvembed._call import Watch, with_watch

    hf_model: Any = model.hf_model
    prompt = torch.tensor([[int(t) for t in prompt_ids]], device=hf_model.device)
    watch = Watch()
    began = time.perf_counter()
    result = hf_model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        stopping_criteria=with_watch(None, watch),
    )
    ended = time.perf_counter()
    first = watch.first_token_at if watch.first_token_at is not None else ended
    return Plain(result[0, prompt.shape[1] :].tolist(), first - began, ended - first)
