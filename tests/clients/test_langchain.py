"""LangChain's pipeline and chat model on an attached model: the same texts, and the second call hits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from transformers import pipeline

if TYPE_CHECKING:
    from kvembed import CachedModel

langchain = pytest.importorskip("langchain_huggingface")

TEXT = "A lighthouse stands at the end of the pier, and its keeper counts the ships. "
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture
def pair(cached: CachedModel, tiny_llama: Any, tiny_tokenizer: Any) -> list[Any]:
    """LangChain's model without a cache, and with one."""
    models: list[Any] = [tiny_llama(), cached.hf_model]
    return [
        langchain.HuggingFacePipeline(
            pipeline=pipeline(
                "text-generation", model=model, tokenizer=tiny_tokenizer, return_full_text=False, **GREEDY
            )
        )
        for model in models
    ]


def test_texts_batches_and_streams(pair: list[Any], cached: CachedModel) -> None:
    plain, ours = pair
    for i in range(2):
        assert ours.invoke(TEXT) == plain.invoke(TEXT)
        assert cached.usage.cached_tokens == i * (cached.usage.prompt_tokens - 1)
    questions = [TEXT + question for question in ("How many?", "And at night?", "Why?")]
    assert ours.batch(questions) == plain.batch(questions)
    assert cached.usage.cached_tokens >= len(TEXT)
    assert cached.usage.bypass_reason is None
    # A pipeline of LangChain's own kind, with a prompt before and a parser behind.
    template = pytest.importorskip("langchain_core.prompts").PromptTemplate.from_template(TEXT + "{question}")
    assert [(template | model).invoke({"question": "Who?"}) for model in pair] == [plain.invoke(TEXT + "Who?")] * 2
    assert cached.usage.cached_tokens >= len(TEXT)
    assert "".join(ours.stream(TEXT + "Where?")) == "".join(plain.stream(TEXT + "Where?")) != ""
    assert cached.usage.cached_tokens >= len(TEXT)


def test_chat(pair: list[Any], cached: CachedModel, tiny_tokenizer: Any) -> None:
    plain, ours = (langchain.ChatHuggingFace(llm=llm, tokenizer=tiny_tokenizer, model_id="tiny") for llm in pair)
    turns = [("system", "You count ships."), ("human", TEXT)]
    first = ours.invoke(turns).content
    assert first == plain.invoke(turns).content
    held = cached.usage.prompt_tokens
    turns += [("ai", first), ("human", "And then?")]
    assert ours.invoke(turns).content == plain.invoke(turns).content
    assert cached.usage.cached_tokens >= held
    assert cached.usage.bypass_reason is None
