"""The pipelines of transformers: the same texts and nothing more said, and the second call hits."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from transformers import pipeline

from tests.model._lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvembed import CachedModel

TEXT = "A lighthouse stands at the end of the pier, and its keeper counts the ships. "
CHAT = [{"role": "user", "content": TEXT + "How many?"}]
GREEDY = {"max_new_tokens": 8, "do_sample": False}


class _Ear(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What transformers logs as warnings: it does not hand its records on to the root logger."""
    ear, logger = _Ear(), logging.getLogger("transformers")
    logger.addHandler(ear)
    yield ear.messages
    logger.removeHandler(ear)


@pytest.mark.parametrize("how", ["attached", "wrapped"])
def test_text_and_chat(
    lab: Lab, cached: CachedModel, tiny_llama: Any, tiny_tokenizer: Any, heard: list[str], how: str
) -> None:
    model: Any = cached.hf_model
    if how == "wrapped":
        model = cached = lab.wrap(tiny_llama(), lab.store("other"))
    plain = pipeline("text-generation", model=tiny_llama(), tokenizer=tiny_tokenizer)
    expected = [plain(prompt, **GREEDY) for prompt in (TEXT, CHAT)]
    said = set(heard)
    heard.clear()

    ours = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer)
    if how == "wrapped":
        # A wrapper is of no class that pipelines know. It works all the same; `attach` is for those who mind.
        assert "'CachedModel' is not supported for text-generation" in heard.pop()
    for prompt, text in zip((TEXT, CHAT), expected, strict=True):
        assert ours(prompt, **GREEDY) == text
        assert ours(prompt, **GREEDY) == text
        assert cached.usage.bypass_reason is None
        assert cached.usage.cached_tokens == cached.usage.prompt_tokens - 1
    assert set(heard) <= said

    # The next turn of the chat reuses the last one, its reply but for the last token included.
    held = cached.usage.prompt_tokens + 7
    turns = [*ours(CHAT, **GREEDY)[0]["generated_text"], {"role": "user", "content": "And then?"}]
    assert ours(turns, **GREEDY) == plain(turns, **GREEDY)
    assert cached.usage.cached_tokens > held - 16
    # Lists of prompts, one by one and as a batch.
    texts = ["No ships.", TEXT + "They come at night.", TEXT]
    for size in (1, 3):
        assert ours(texts, batch_size=size, **GREEDY) == plain(texts, batch_size=size, **GREEDY)
        assert cached.usage.bypass_reason is None
        assert cached.usage.cached_tokens >= len(TEXT) - 1
