"""LlamaIndex's model of transformers on an attached model: the same texts, and the second call hits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kvembed import CachedModel

llamaindex = pytest.importorskip("llama_index.llms.huggingface")

TEXT = "A lighthouse stands at the end of the pier, and its keeper counts the ships. "


@pytest.fixture
def pair(cached: CachedModel, tiny_llama: Any, tiny_tokenizer: Any) -> list[Any]:
    """LlamaIndex's model without a cache, and with one."""
    return [
        llamaindex.HuggingFaceLLM(
            model=model,
            tokenizer=tiny_tokenizer,
            context_window=2048,
            max_new_tokens=8,
            generate_kwargs={"do_sample": False},
        )
        for model in (tiny_llama(), cached.hf_model)
    ]


def test_completions_and_streams(pair: list[Any], cached: CachedModel) -> None:
    plain, ours = pair
    for i in range(2):
        assert ours.complete(TEXT).text == plain.complete(TEXT).text != ""
        assert cached.usage.cached_tokens == i * (cached.usage.prompt_tokens - 1)
    for question in ("How many?", "And at night?"):
        assert ours.complete(TEXT + question).text == plain.complete(TEXT + question).text
        assert cached.usage.cached_tokens >= len(TEXT)
    texts = ["".join(piece.delta for piece in model.stream_complete(TEXT + "Where?")) for model in pair]
    assert texts[0] == texts[1] != ""


def test_chat(pair: list[Any], cached: CachedModel) -> None:
    core = pytest.importorskip("llama_index.core.llms")

    def ask(model: Any, question: str) -> str:
        system = core.ChatMessage(role=core.MessageRole.SYSTEM, content=TEXT)
        return model.chat([system, core.ChatMessage(role=core.MessageRole.USER, content=question)]).message.content

    for question in ("How many?", "And at night?"):
        assert ask(pair[1], question) == ask(pair[0], question) != ""
    assert cached.usage.cached_tokens >= len(TEXT)
    assert cached.usage.bypass_reason is None
