"""What is handed to transformers untouched: the result is plain, the reason is given, one warning is issued."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from kvembed import CacheBypassWarning, PromptError, UnsupportedModelError

from ._lab import BLOCK, Lab, random_ids, run, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = random_ids(3 * BLOCK + 3)
MASK = torch.ones_like(PROMPT)
HALF_MASK = torch.cat([torch.zeros(1, 5, dtype=torch.long), MASK[:, 5:]], dim=1)


def warned(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return the result of a call and its bypass warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CacheBypassWarning)
        result = call()
    return result, [str(w.message) for w in caught if issubclass(w.category, CacheBypassWarning)]


def check_bypass(cached: Any, reason: str, *args: Any, **kwargs: Any) -> None:
    """Fail unless the call is passed through: plain result, a reason, a warning the first time only."""
    results = []
    for target in (cached.hf_model, cached):
        torch.manual_seed(5)
        results.append(warned(lambda t=target: t.generate(*args, **kwargs)))
    (expected, _), (found, messages) = results
    assert type(found) is type(expected)
    assert torch.equal(getattr(found, "sequences", found), getattr(expected, "sequences", expected))
    assert cached.usage.bypass_reason is not None
    assert reason in cached.usage.bypass_reason
    assert cached.usage.cached_tokens == 0
    assert messages == [f"not cached: {cached.usage.bypass_reason}"]
    assert warned(lambda: cached.generate(*args, **kwargs))[1] == []


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "no cache": ("use_cache=False", {"use_cache": False}),
    "static cache": ("cache_implementation='static'", {"cache_implementation": "static", "disable_compile": True}),
    "mask": ("attention_mask hides tokens", {"attention_mask": HALF_MASK}),
    "attentions": ("output_attentions", {"output_attentions": True, "return_dict_in_generate": True}),
    "hidden states": ("output_hidden_states", {"output_hidden_states": True, "return_dict_in_generate": True}),
    "position ids": ("argument 'position_ids'", {"position_ids": torch.arange(2, PROMPT.shape[1] + 2)[None]}),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(lab: Lab, makers: dict[str, Callable[..., Any]], name: str) -> None:
    reason, options = CALLS[name]
    model = makers["llama"](attn_implementation="eager") if name == "attentions" else makers["llama"]()
    cached = lab.wrap(model)
    run(cached, PROMPT)  # what would be reused is there
    kwargs = {"input_ids": PROMPT, "attention_mask": MASK, "max_new_tokens": 6, "do_sample": False, **options}
    check_bypass(cached, reason, **kwargs)
    run(cached, PROMPT)
    assert cached.usage.bypass_reason is None
    assert cached.usage.cached_tokens == PROMPT.shape[1] - 1


def test_settings_in_a_generation_config_count_too(lab: Lab, llama: Any) -> None:
    cached = lab.wrap(llama)
    config = GenerationConfig(use_cache=False, max_new_tokens=4, pad_token_id=256)
    check_bypass(cached, "use_cache=False", PROMPT, config, attention_mask=MASK)


def test_settings_of_the_models_own_config_count_too(lab: Lab, makers: dict[str, Callable[..., Any]]) -> None:
    model = makers["llama"]()
    model.generation_config.use_cache = False
    check_bypass(lab.wrap(model), "use_cache=False", PROMPT, attention_mask=MASK, max_new_tokens=4)


def test_embeddings(lab: Lab, llama: Any) -> None:
    embeddings = llama.get_input_embeddings()(PROMPT).detach()
    check_bypass(lab.wrap(llama), "inputs_embeds", inputs_embeds=embeddings, attention_mask=MASK, max_new_tokens=4)


def test_a_cache_of_the_callers(lab: Lab, llama: Any) -> None:
    cached = lab.wrap(llama)
    own = DynamicCache(config=llama.config)
    found, messages = warned(lambda: run(cached, PROMPT, past_key_values=own))
    assert tokens(found) == tokens(run(llama, PROMPT))
    assert own.get_seq_length() == PROMPT.shape[1] + 11  # it was used, as the caller wants
    assert messages == ["not cached: past_key_values: the caller brings a cache of their own"]


@pytest.mark.parametrize("mask", [None, MASK])
def test_padding_tokens_in_the_prompt(lab: Lab, llama: Any, mask: torch.Tensor | None) -> None:
    prompt = PROMPT.clone()
    prompt[0, :4] = 256
    cached = lab.wrap(llama)
    if mask is None:
        # transformers takes them for padding and hides them.
        check_bypass(cached, "the prompt contains the padding token", prompt, max_new_tokens=6, do_sample=False)
    else:
        # Here the caller says that they are text.
        assert tokens(run(cached, prompt)) == tokens(run(llama, prompt))
        assert cached.usage.bypass_reason is None
        assert tokens(run(llama, prompt)) != tokens(llama.generate(prompt, max_new_tokens=12, do_sample=False))


def test_the_environment_variable(lab: Lab, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = lab.wrap(llama)
    run(cached, PROMPT)
    monkeypatch.setenv("KVEMBED_DISABLE", "1")
    check_bypass(cached, "KVEMBED_DISABLE is set", PROMPT, attention_mask=MASK, max_new_tokens=6, do_sample=False)
    monkeypatch.setenv("KVEMBED_DISABLE", "0")
    run(cached, PROMPT)
    assert cached.usage.cached_tokens == PROMPT.shape[1] - 1


def test_a_closed_store(lab: Lab, llama: Any) -> None:
    cached = lab.wrap(llama)
    run(cached, PROMPT)
    cached.store.close()
    check_bypass(cached, "the store is closed", PROMPT, attention_mask=MASK, max_new_tokens=6, do_sample=False)


def test_a_store_closed_in_the_middle_of_a_call(lab: Lab, llama: Any) -> None:
    cached = lab.wrap(llama)

    class Close:
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            cached.store.close()
            return torch.zeros(1, dtype=torch.bool)

    found = run(cached, PROMPT, stopping_criteria=[Close()])
    assert tokens(found) == tokens(run(llama, PROMPT))


# ------------------------------------------------------------------------------------- whole models

SMALL: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 256,
    "eos_token_id": None,
    "bos_token_id": 257,
}
ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "factor": 2.0,
        "original_max_position_embeddings": 256,
    },
}


def check_unsupported(cached: Any, reason: str) -> None:
    assert cached.support is not None
    assert reason in cached.support
    check_bypass(cached, reason, PROMPT, attention_mask=MASK, max_new_tokens=6, do_sample=False)
    assert cached.lookup(PROMPT).num_tokens == 0
    explanation = cached.explain(PROMPT)
    assert (explanation.kind, explanation.hint) == ("bypassed", cached.support)
    with pytest.raises(UnsupportedModelError, match="nothing to prefill"):
        cached.prefill(PROMPT)
    with pytest.raises(PromptError):
        cached.lookup([])
    assert "passed through" in repr(cached)


@pytest.mark.parametrize("kind", ROPES)
def test_rope_that_depends_on_the_length(lab: Lab, kind: str) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=ROPES[kind])).eval()
    check_unsupported(lab.wrap(model), f"rope type {kind!r}")


def test_an_encoder_decoder(lab: Lab) -> None:
    config = T5Config(vocab_size=272, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0)
    config.decoder_start_token_id = 0
    cached = lab.wrap(T5ForConditionalGeneration(config).eval())
    check_unsupported(cached, "encoder-decoder")
    assert cached.usage.prompt_tokens == PROMPT.shape[1]
    assert cached.usage.completion_tokens == 6


def test_documents_of_a_model_that_is_not_served(lab: Lab, tiny_tokenizer: Any) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=ROPES["dynamic"])).eval()
    cached = lab.wrap(model, tokenizer=tiny_tokenizer)
    document = cached.document("Some text to ask about.")
    (answer, messages) = warned(lambda: document.ask("What?", max_new_tokens=5))
    expected = run(model, torch.from_numpy(answer.prompt_ids).long()[None], 5)
    assert answer.token_ids.tolist() == tokens(expected)[-5:]
    assert len(messages) == 1
    assert answer.usage.bypass_reason is not None
    stream, messages = warned(lambda: "".join(cached.stream("Hello", max_new_tokens=5, do_sample=False)))
    assert messages == []
    assert stream == tiny_tokenizer.decode(
        tokens(run(model, torch.tensor([tiny_tokenizer("Hello")["input_ids"]]), 5))[-5:], skip_special_tokens=True
    )
