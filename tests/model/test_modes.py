"""Every way of generating that is served: the same result as plain transformers, with most of the prompt reused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, NoRepeatNGramLogitsProcessor

from ._lab import BLOCK, Lab, cat, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = random_ids(4 * BLOCK + 5, seed=3)
FAMILIES = ("llama", "gemma3")


class _Allowed:
    """A constraint: only even ids."""

    def __call__(self, batch: int, ids: torch.Tensor) -> list[int]:
        return list(range(0, 250, 2))


class _Seen:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.reshape(-1).tolist()

    def end(self) -> None: ...


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95},
    "beams": {"num_beams": 3},
    "beams, all returned": {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several samples": {"num_return_sequences": 3, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prompt lookup, sampled": {"prompt_lookup_num_tokens": 3, "do_sample": True},
    "guidance": {"guidance_scale": 1.5},
    "guidance with a negative prompt": {"guidance_scale": 2.0, "negative_prompt_ids": random_ids(7, seed=9)},
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "a processor": {"logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])},
    "a constraint": {"prefix_allowed_tokens_fn": _Allowed()},
    "a bad word": {"bad_words_ids": [[5], [7, 8]]},
    "min and max": {"min_new_tokens": 3, "eos_token_id": [4, 9, 44]},
    "max_length": {"max_new_tokens": None, "max_length": PROMPT.shape[1] + 6},
    "a time limit": {"max_time": 60.0},
    "chunked prefill": {"prefill_chunk_size": 16},
    "a generation config": {"generation_config": GenerationConfig(max_new_tokens=7, do_sample=True, pad_token_id=256)},
    "no mask": {"attention_mask": None},
    "synced_gpus off": {"synced_gpus": False},
}


def generate(model: Any, seed: int, ids: torch.Tensor = PROMPT, **options: Any) -> Any:
    """Generate with a fixed seed."""
    torch.manual_seed(seed)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, **options}
    if "generation_config" in options:
        del arguments["max_new_tokens"], arguments["do_sample"]
    return model.generate(ids, **{k: v for k, v in arguments.items() if v is not None})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_the_same_result_as_plain_transformers(
    lab: Lab, makers: dict[str, Callable[..., Any]], family: str, mode: str
) -> None:
    model = makers[family]()
    cached = lab.wrap(model)
    options = MODES[mode]
    plain = generate(model, 1, **options)
    for tier in ("cold", "live", "cpu", "disk"):
        if tier != "cold":
            lab.leave_only(cached, tier)
        found = generate(cached, 1, **options)
        assert torch.equal(found, plain), tier
        assert cached.usage.bypass_reason is None
        if tier != "cold":
            # The last blocks may be gone with a cache that was given to beams, never the rest.
            assert cached.usage.cached_tokens >= 4 * BLOCK
    assert vars(model).get("prepare_inputs_for_generation") is None


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_logits_have_the_usual_shape(lab: Lab, makers: dict[str, Callable[..., Any]], family: str) -> None:
    model = makers[family]()
    cached = lab.wrap(model)
    run(cached, PROMPT, 4)
    for options in ({}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        torch.manual_seed(2)
        plain = run_full(model, PROMPT, 5, **options)
        torch.manual_seed(2)
        found = run_full(cached, PROMPT, 5, **options)
        assert cached.usage.cached_tokens >= 4 * BLOCK
        assert type(found) is type(plain)
        assert torch.equal(found.sequences, plain.sequences)
        for a, b in zip(found.scores, plain.scores, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        assert found.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_assistant(lab: Lab, makers: dict[str, Callable[..., Any]], family: str) -> None:
    model = makers[family]()
    # The model itself drafts well, another one badly: accepted and rejected drafts both happen.
    for assistant in (makers[family](), makers[family](seed=1)):
        cached = lab.wrap(model, lab.store(f"{family} {id(assistant)}"))
        plain = tokens(run(model, PROMPT, 12))
        for _ in range(2):
            assert tokens(run(cached, PROMPT, 12, assistant_model=assistant)) == plain
            assert cached.usage.bypass_reason is None
        assert cached.usage.cached_tokens >= 4 * BLOCK
        # What is kept afterwards is right too.
        longer = cat(torch.tensor([plain]), random_ids(6, seed=8))
        assert tokens(run(cached, longer, 6)) == tokens(run(model, longer, 6))


def test_modes_in_turns_share_what_is_stored(lab: Lab, makers: dict[str, Callable[..., Any]]) -> None:
    model = makers["llama"]()
    cached = lab.wrap(model)
    modes = ["beams", "greedy", "prompt lookup", "several samples", "guidance", "greedy", "beam sampling"]
    for seed, mode in enumerate(modes):
        prompt = cat(PROMPT, random_ids(seed, seed=seed))
        expected = generate(model, seed, prompt, **MODES[mode])
        assert torch.equal(generate(cached, seed, prompt, **MODES[mode]), expected), mode
        assert seed == 0 or cached.usage.cached_tokens >= 4 * BLOCK


def test_a_streamer_sees_everything(lab: Lab, model: Any) -> None:
    cached = lab.wrap(model)
    for options in ({}, {"prompt_lookup_num_tokens": 2}):
        for _ in range(2):
            plain, ours = _Seen(), _Seen()
            run(model, PROMPT, 8, streamer=plain, **options)
            run(cached, PROMPT, 8, streamer=ours, **options)
            assert ours.ids == plain.ids
