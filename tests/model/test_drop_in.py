"""``generate()`` takes and returns exactly what transformers' own does, and leaves everything as it was."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ._lab import BLOCK, Lab, assert_close, cat, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerFast

PROMPT = random_ids(5 * BLOCK + 3)


@pytest.fixture
def warm(lab: Lab, llama: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> Any:
    """A cached llama that has seen `PROMPT`."""
    cached = lab.wrap(llama, tokenizer=tiny_tokenizer)
    run(cached, PROMPT, 2)
    return cached


def both(cached: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Return the results of the same call, plain and cached (which must have been served)."""
    expected = cached.hf_model.generate(*args, **kwargs)
    found = cached.generate(*args, **kwargs)
    assert cached.usage.bypass_reason is None
    assert cached.usage.cached_tokens >= 4 * BLOCK
    return expected, found


def test_every_way_to_pass_the_prompt(warm: Any) -> None:
    mask = torch.ones_like(PROMPT)
    ways: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((PROMPT,), {"max_new_tokens": 6}),
        ((), {"inputs": PROMPT, "max_new_tokens": 6}),
        ((), {"input_ids": PROMPT, "max_new_tokens": 6}),
        ((), {"input_ids": PROMPT, "attention_mask": mask, "max_new_tokens": 6}),
        ((PROMPT, GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=256)), {}),
        ((), {"input_ids": PROMPT, "generation_config": GenerationConfig(max_new_tokens=6, pad_token_id=256)}),
        ((), {"input_ids": PROMPT, "token_type_ids": None, "max_new_tokens": 6}),
        ((PROMPT,), {"max_length": PROMPT.shape[1] + 6}),
        ((PROMPT,), {"max_new_tokens": 1}),
    ]
    for args, kwargs in ways:
        expected, found = both(warm, *args, **kwargs)
        assert type(found) is torch.Tensor
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_the_output_object_has_the_same_type_and_fields(warm: Any) -> None:
    expected, found = run_full(warm.hf_model, PROMPT), run_full(warm, PROMPT)
    assert type(found) is type(expected)
    assert list(found.keys()) == list(expected.keys())
    assert len(found.scores) == len(expected.scores) == 12
    for a, b in zip(found.scores, expected.scores, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-4)


def test_the_returned_cache_is_stock_and_stays_as_it_is(lab: Lab, model: Any, plain: Callable[..., Any]) -> None:
    cached = lab.wrap(model)
    for _ in range(2):  # cold, then restored
        result = run_full(cached, PROMPT)
        cache = result.past_key_values
        assert type(cache) is DynamicCache
        layers: list[Any] = cache.layers
        assert {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
        before = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
        run(cached, cat(result.sequences, random_ids(5, seed=1)), 20)
        run(cached, PROMPT, 20)
        for (keys, values), layer in zip(before, layers, strict=True):
            assert torch.equal(keys, layer.keys)
            assert torch.equal(values, layer.values)
        # A caller goes on with it in plain transformers.
        turn = cat(result.sequences, random_ids(4, seed=2))
        onward = run(model, turn, 8, past_key_values=cache)
        assert tokens(onward) == tokens(plain(model, turn, 8))
        # Which does not reach what is kept here.
        assert_close(run_full(cached, PROMPT), plain(model, PROMPT))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8},
        {"temperature": 1.5, "top_k": 20},
        {"top_p": 0.9, "typical_p": 0.95},
        {"min_p": 0.05, "repetition_penalty": 1.3},
    ],
)
def test_sampling_with_a_seed(warm: Any, options: dict[str, Any]) -> None:
    results = []
    for target in (warm.hf_model, warm):
        torch.manual_seed(42)
        results.append(run(target, PROMPT, 20, **{**options, "do_sample": True}))
        results.append(torch.rand(3))  # as many numbers were drawn
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert warm.usage.cached_tokens == PROMPT.shape[1] - 1


def test_nothing_else_draws_random_numbers(lab: Lab, llama: Any) -> None:
    torch.manual_seed(1)
    expected = torch.get_rng_state()
    cached = lab.wrap(llama)
    run(cached, PROMPT, 4)
    cached.lookup(PROMPT)
    cached.prefill(random_ids(40, seed=3))
    assert torch.equal(torch.get_rng_state(), expected)


class ListStreamer(TextStreamer):
    def __init__(self, tokenizer: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)
        self.pieces: list[tuple[str, bool]] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append((text, stream_end))


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_a_streamer_gets_the_same_pieces(warm: Any, skip_prompt: bool) -> None:
    expected, found = (ListStreamer(warm.tokenizer, skip_prompt=skip_prompt) for _ in range(2))
    run(warm.hf_model, PROMPT, 30, streamer=expected)
    run(warm, PROMPT, 30, streamer=found)
    assert found.pieces == expected.pieces
    assert found.pieces


class Forbid(LogitsProcessor):
    """Takes the most likely token away, and notes how long the prompt was that it saw."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.lengths.append(input_ids.shape[1])
        return scores.scatter(1, scores.argmax(-1, keepdim=True), float("-inf"))


class StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.calls += 1
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_processors_and_criteria_are_called_alike_and_left_alone(warm: Any) -> None:
    results = []
    for target in (warm.hf_model, warm):
        forbid, stop = Forbid(), StopAt(PROMPT.shape[1] + 7)
        processors = LogitsProcessorList([forbid])
        criteria = StoppingCriteriaList([stop, MaxLengthCriteria(8000)])
        result = run(target, PROMPT, 30, logits_processor=processors, stopping_criteria=criteria)
        assert list(processors) == [forbid]
        assert len(criteria) == 2
        assert criteria[0] is stop
        results.append((tokens(result), forbid.lengths, stop.calls))
    assert results[0] == results[1]
    assert len(results[0][0]) == PROMPT.shape[1] + 7
    plain_list = [StopAt(PROMPT.shape[1] + 2)]
    assert run(warm, PROMPT, 30, stopping_criteria=plain_list).shape[1] == PROMPT.shape[1] + 2
    assert len(plain_list) == 1


def test_other_arguments_of_generate(warm: Any) -> None:
    free = tokens(run(warm.hf_model, PROMPT, 20))[PROMPT.shape[1] :]
    text = warm.tokenizer.decode(free[5:7])
    calls: list[dict[str, Any]] = [
        {"eos_token_id": free[6]},
        {"eos_token_id": [free[9], free[4]]},
        {"eos_token_id": free[2], "min_new_tokens": 9},
        {"stop_strings": text, "tokenizer": warm.tokenizer},
        {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(100))},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[free[0]]]},
        {"suppress_tokens": free[:4]},
        {"renormalize_logits": True},
        {"return_dict_in_generate": True},
        {"num_beams": 1, "num_return_sequences": 1},
        {"use_cache": True},
        {"max_time": 60.0},
    ]
    lengths = set()
    for kwargs in calls:
        expected, found = run(warm.hf_model, PROMPT, 20, **kwargs), run(warm, PROMPT, 20, **kwargs)
        assert tokens(found) == tokens(expected), kwargs
        assert warm.usage.bypass_reason is None, kwargs
        assert warm.usage.cached_tokens >= 5 * BLOCK
        lengths.add(len(tokens(found)))
    assert len(lengths) > 3  # or the stops stopped nothing


def test_the_model_is_left_as_it_was(lab: Lab, makers: dict[str, Callable[..., Any]]) -> None:
    model, other = makers["llama"](), makers["llama"]()
    given = GenerationConfig(max_new_tokens=5, pad_token_id=256)
    before = [copy.deepcopy(x.to_dict()) for x in (model.config, model.generation_config, given)]
    attributes = set(vars(model))
    cached = lab.wrap(model)
    seen: list[str] = []
    handle = other.model.layers[0].self_attn.register_forward_hook(
        lambda *args: seen.append(other.config._attn_implementation)
    )

    class Probe(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            other(input_ids=PROMPT[:, :4])
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    cached.generate(PROMPT, given, stopping_criteria=[Probe()])
    handle.remove()
    assert set(seen) == {"sdpa"}
    assert [x.to_dict() for x in (model.config, model.generation_config, given)] == before
    assert model.config._attn_implementation == "sdpa"
    assert set(vars(model)) == attributes
    assert type(model).generate is type(other).generate


def test_an_error_in_the_model_leaves_it_as_it_was(warm: Any) -> None:
    def fail(*args: Any) -> torch.Tensor:
        raise ZeroDivisionError("from the caller's own code")

    with pytest.raises(ZeroDivisionError, match="own code"):
        run(warm, PROMPT, logits_processor=[fail])
    assert warm.hf_model.config._attn_implementation == "sdpa"
    assert tokens(run(warm, PROMPT)) == tokens(run(warm.hf_model, PROMPT))


def test_everything_else_is_the_models_own(warm: Any) -> None:
    model = warm.hf_model
    assert warm.config is model.config
    assert warm.device == model.device
    assert warm.dtype == model.dtype
    assert warm.generation_config is model.generation_config
    assert warm.get_input_embeddings() is model.get_input_embeddings()
    assert torch.equal(warm(input_ids=PROMPT).logits, model(input_ids=PROMPT).logits)
    with pytest.raises(AttributeError, match="no_such_name"):
        warm.no_such_name  # noqa: B018
    assert "CachedModel LlamaForCausalLM" in repr(warm)
    for name in ("__deepcopy__", "__getstate__x", "_modules"):  # the model's, not ours
        assert not hasattr(warm, name)
