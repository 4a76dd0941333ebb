"""Scoring continuations: the log-probabilities of one plain forward each, from one prefix that is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvembed import PromptError, StoreWarning
from tests.families.zoo import build

from ._lab import BLOCK, Lab, cat, random_ids, run, tokens

if TYPE_CHECKING:
    from kvembed import Score

PROMPT = random_ids(3 * BLOCK + 9, seed=4)
PARTS = [random_ids(n, seed=20 + n)[0].tolist() for n in (1, 3, 1, 30, 2)]


def plain_scores(model: Any, prompt: torch.Tensor, part: list[int]) -> list[float]:
    """One forward over prompt and continuation, without any cache."""
    whole = cat(prompt, torch.tensor([part]))
    with torch.no_grad():
        logits = model(whole, use_cache=False).logits[0, prompt.shape[1] - 1 : -1].float()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(part)[:, None])[:, 0].tolist()


def check(scores: list[Score], model: Any, prompt: torch.Tensor) -> None:
    for score, part in zip(scores, PARTS, strict=True):
        expected = plain_scores(model, prompt, part)
        assert list(score.token_ids) == part
        np.testing.assert_allclose(score.token_logprobs, expected, atol=2e-4)
        assert score.logprob == pytest.approx(sum(expected), abs=2e-3)
        assert not score.is_greedy or len(part) == 1


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "qwen3_next", "mamba2", "jamba", "gpt2"])
def test_scores_are_those_of_plain_forwards(lab: Lab, name: str) -> None:
    model = build(name)
    cached = lab.wrap(model)
    for tier in ("cold", "live", "cpu", "disk"):
        if tier != "cold":
            lab.leave_only(cached, tier)
        check(cached.score(PROMPT, PARTS), model, PROMPT)
        assert cached.usage.bypass_reason is None
        assert tier == "cold" or set(cached.usage.cached_tokens_by_tier) == {tier}
    # What is kept afterwards is the prompt, not the last continuation.
    longer = cat(PROMPT, random_ids(7, seed=1))
    assert tokens(run(cached, longer, 6)) == tokens(run(model, longer, 6))
    assert cached.usage.cached_tokens >= PROMPT.shape[1] - 1


def test_the_greedy_continuation_is_known_as_such(lab: Lab, model: Any) -> None:
    cached = lab.wrap(model)
    greedy = tokens(run(model, PROMPT, 5))[-5:]
    other = [*greedy[:4], (greedy[4] + 1) % 250]
    first, second = cached.score(PROMPT, [greedy, other])
    assert first.is_greedy
    assert not second.is_greedy
    assert first.logprob > second.logprob


def test_text_is_tokenised_like_text_that_goes_on(lab: Lab, model: Any, tiny_tokenizer: Any) -> None:
    cached = lab.wrap(model, tokenizer=tiny_tokenizer)
    (score,) = cached.score("The sky is", [" blue"])
    assert bytes(score.token_ids) != b""
    ids = torch.tensor([tiny_tokenizer("The sky is")["input_ids"]])
    np.testing.assert_allclose(score.token_logprobs, plain_scores(model, ids, list(score.token_ids)), atol=2e-4)
    assert cached.score("The sky is", []) == []


def test_bad_input(lab: Lab, makers: Any, tiny_tokenizer: Any) -> None:
    cached = lab.wrap(makers["llama"](max_position_embeddings=64), tokenizer=tiny_tokenizer)
    with pytest.raises(PromptError, match="empty"):
        cached.score("", ["x"])
    with pytest.raises(PromptError, match="empty"):
        cached.score("x", [""])
    with pytest.raises(PromptError, match="64"):
        cached.score("x" * 40, ["y" * 40])


def test_a_model_that_is_not_served(lab: Lab) -> None:
    model = build("llama-dynamic")
    cached = lab.wrap(model)
    prompt = PROMPT[:, :12]
    (score,) = cached.score(prompt, [PARTS[1]])
    assert cached.usage.bypass_reason is not None
    np.testing.assert_allclose(score.token_logprobs, plain_scores(build("llama-dynamic"), prompt, PARTS[1]), atol=2e-4)


def test_a_damaged_block_is_computed_again(lab: Lab, makers: Any) -> None:
    lab.expect_sound = False
    model = makers["llama"]()
    cached = lab.wrap(model)
    cached.score(PROMPT, PARTS)
    lab.leave_only(cached, "disk")
    for path in lab.folder.glob("store/blocks/*/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
    with pytest.warns(StoreWarning):
        check(cached.score(PROMPT, PARTS), model, PROMPT)
