"""Prompts, options and models that cannot work: ``generate()`` behaves like transformers, explicit verbs explain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed import CachedModel, ConfigError, PromptError

from ._lab import Lab, random_ids, run, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerFast

PROMPT = random_ids(40)


@pytest.fixture
def cached(lab: Lab, llama: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> CachedModel:
    return lab.wrap(llama, tokenizer=tiny_tokenizer)


def outcome(call: Callable[[], Any]) -> tuple[str, Any]:
    """Return what a call gave, or the type of what it raised."""
    try:
        return "returned", tokens(call())
    except Exception as error:
        return "raised", type(error)


@pytest.mark.filterwarnings("ignore::kvembed.CacheBypassWarning")
@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(1, 0, dtype=torch.long),
        torch.zeros(0, 5, dtype=torch.long),
        torch.zeros(5, dtype=torch.long),
        torch.zeros(1, 5),
        torch.tensor([[1, 2, 100_000]]),
        torch.tensor([[1, 2, -5]]),
    ],
    ids=["empty", "no rows", "one dimension", "floats", "too large an id", "negative"],
)
def test_generate_does_with_odd_prompts_what_transformers_does(cached: CachedModel, llama: Any, ids: Any) -> None:
    expected = outcome(lambda: llama.generate(ids, max_new_tokens=3, do_sample=False))
    assert outcome(lambda: cached.generate(ids, max_new_tokens=3, do_sample=False)) == expected
    assert tokens(run(cached, PROMPT)) == tokens(run(llama, PROMPT))  # and all is well afterwards


@pytest.mark.parametrize(
    "kwargs",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"max_new_tokens": 3, "no_such_argument": 1},
        {"max_new_tokens": 3, "temperature": -1.0, "do_sample": True},
        {"max_new_tokens": 3, "streamer": object()},
        {"max_new_tokens": 3, "stopping_criteria": 7},
        {"max_length": 5},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_generate_refuses_what_transformers_refuses(cached: CachedModel, llama: Any, kwargs: dict[str, Any]) -> None:
    expected = outcome(lambda: llama.generate(PROMPT, **kwargs))
    assert expected[0] == "raised"
    assert outcome(lambda: cached.generate(PROMPT, **kwargs)) == expected
    assert tokens(run(cached, PROMPT)) == tokens(run(llama, PROMPT))


def test_a_prompt_longer_than_the_context(lab: Lab, makers: dict[str, Callable[..., Any]], tiny_tokenizer: Any) -> None:
    model = makers["llama"](max_position_embeddings=64)
    cached = lab.wrap(model, tokenizer=tiny_tokenizer)
    long = random_ids(80)
    # transformers goes on past the context; so does generate().
    assert tokens(run(cached, long)) == tokens(run(model, long))
    for verb in (cached.prefill, cached.stream):
        with pytest.raises(PromptError, match=r"context is 64 tokens"):
            verb(long)
    with pytest.raises(PromptError, match="context is 64"):
        cached.stream("x" * 40, max_new_tokens=30)
    with pytest.raises(PromptError, match=r"the document has \d+ tokens, but the model's context is 64"):
        cached.document("word " * 40)
    document = cached.document("twenty bytes of text")
    with pytest.raises(PromptError, match="256 more are to be generated"):
        document.ask("?")
    with pytest.raises(PromptError, match="context is 64"):
        document.stream("?" * 60)


@pytest.mark.parametrize("verb", ["lookup", "explain", "prefill", "stream"])
@pytest.mark.parametrize("prompt", ["", [], torch.zeros(1, 0, dtype=torch.long)], ids=["text", "list", "tensor"])
def test_verbs_refuse_an_empty_prompt(cached: CachedModel, verb: str, prompt: Any) -> None:
    with pytest.raises(PromptError, match="prompt is empty"):
        getattr(cached, verb)(prompt)


@pytest.mark.parametrize("verb", ["lookup", "explain", "prefill", "stream"])
@pytest.mark.parametrize("prompt", [torch.zeros(2, 3, dtype=torch.long), [0.5], {"a", "b"}, 3.5, None])
def test_verbs_refuse_what_is_no_prompt(cached: CachedModel, verb: str, prompt: Any) -> None:
    with pytest.raises(PromptError, match="a prompt is text, a list of messages"):
        getattr(cached, verb)(prompt)


def test_verbs_take_every_kind_of_prompt(cached: CachedModel) -> None:
    text = "some text that is long enough to be kept"
    ids = cached.tokenizer(text)["input_ids"]
    cached.prefill(text)
    for prompt in (text, ids, tuple(ids), torch.tensor(ids), torch.tensor([ids]), {"input_ids": [ids]}):
        assert cached.lookup(prompt).num_tokens == len(ids) - 1
    messages = [{"role": "user", "content": "hello there"}]
    usage = cached.prefill(messages)
    assert usage.prompt_tokens > len("hello there")
    assert cached.lookup(messages).num_tokens == usage.prompt_tokens - 1


def test_text_needs_a_tokenizer(lab: Lab, llama: Any) -> None:
    cached = lab.wrap(llama)
    for call in (cached.lookup, cached.prefill, cached.explain, cached.stream, cached.document):
        with pytest.raises(ConfigError, match="needs a tokenizer"):
            call("text")
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        cached.prefill([{"role": "user", "content": "hi"}])
    # Ids do without.
    cached.prefill(PROMPT)
    assert cached.explain(PROMPT).kind == "hit"


def test_messages_need_a_chat_template(lab: Lab, llama: Any, tiny_tokenizer: Any) -> None:
    class Bare:
        chat_template = None

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return tiny_tokenizer(*args, **kwargs)

        decode = tiny_tokenizer.decode

    cached = lab.wrap(llama, tokenizer=Bare())
    with pytest.raises(ConfigError, match="no chat template"):
        cached.prefill([{"role": "user", "content": "hi"}])
    # A document does without: a plain question and answer frame.
    document = cached.document("Some text.")
    answer = document.ask("What is it?", max_new_tokens=4)
    assert tiny_tokenizer.decode(answer.prompt_ids.tolist()) == "Some text.\n\nQuestion: What is it?\nAnswer:"


def test_documents(cached: CachedModel, llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    with pytest.raises(ConfigError, match="no file .*: pass the text itself"):
        cached.document(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        cached.document(tmp_path)
    path.write_bytes(b"caf\xe9 \0\1")
    with pytest.raises(ConfigError, match=r"'report.txt' is not text"):
        cached.document(path)
    for nothing in ("", "  \n\t "):
        with pytest.raises(PromptError, match="document is empty"):
            cached.document(nothing)
    path.write_bytes(b"")
    with pytest.raises(PromptError, match="document is empty"):
        cached.document(path)
    path.write_text("Line one, café.\nLine two.\n", encoding="utf-8")
    for source in (path, str(path)):
        document = cached.document(source)
        assert document.name == "report.txt"
        assert "Line one, café.\nLine two." in cached.tokenizer.decode(document.prefix_ids.tolist())
    with pytest.raises(PromptError, match="question is empty"):
        document.ask("  ")
    answer = document.ask("What?", max_new_tokens=6)
    expected = tokens(run(llama, torch.from_numpy(answer.prompt_ids).long()[None], 6))
    assert answer.token_ids.tolist() == expected[-6:]
    assert answer.usage.cached_tokens >= document.tokens - 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 7}, "block_size must be between 8 and 4096 tokens, not 7"),
        ({"block_size": 4097}, "block_size"),
        ({"max_live": -1}, "max_live must be 0 or more"),
    ],
)
def test_options_out_of_range(lab: Lab, llama: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lab.wrap(llama, **options)


@pytest.mark.parametrize("thing", ["smollm2", None, {"a": 1}])
def test_only_models_are_wrapped(lab: Lab, thing: Any) -> None:
    with pytest.raises(ConfigError, match=r"use CachedModel\.from_pretrained"):
        CachedModel(thing, store=lab.store())


def test_modules_that_are_no_language_models(lab: Lab, llama: Any) -> None:
    for module in (torch.nn.Linear(2, 2), llama.model):
        with pytest.raises(ConfigError, match="causal language model"):
            CachedModel(module, store=lab.store())
