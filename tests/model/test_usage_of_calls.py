"""``usage`` after real calls: counts that add up, times in order, and reasons in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ._lab import BLOCK, Lab, cat, random_ids, run, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = random_ids(10 * BLOCK + 9)


def check_sums(usage: Any, prompt: int, new: int) -> None:
    """Fail unless all figures of a call agree with each other."""
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, new)
    assert usage.cached_tokens == sum(usage.cached_tokens_by_tier.values())
    assert usage.cached_tokens + usage.computed_tokens == prompt
    assert all(n > 0 for n in usage.cached_tokens_by_tier.values())
    assert 0 <= usage.lookup_s <= usage.ttft_s <= usage.total_s
    assert 0 <= usage.restore_s <= usage.ttft_s
    assert 0 <= usage.prefill_s <= usage.ttft_s
    assert usage.ttft_s + usage.decode_s == pytest.approx(usage.total_s, abs=0.05)
    assert usage.to_openai() == {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    assert usage.to_dict()["cached_tokens"] == usage.cached_tokens


def test_counts_and_times(lab: Lab, model: Any) -> None:
    cached = lab.wrap(model)
    n = PROMPT.shape[1]
    run(cached, PROMPT, 5)
    check_sums(cached.usage, n, 5)
    # The prompt's blocks, and its tail with the reply: all but the last token.
    assert cached.usage.stored_tokens == n + 4
    for tier in ("live", "cpu", "disk"):
        lab.leave_only(cached, tier)
        run(cached, PROMPT, 5)
        check_sums(cached.usage, n, 5)
        assert cached.usage.cached_tokens_by_tier == {tier: n - 1}
        assert cached.usage.stored_tokens == 0
        assert (cached.usage.restore_s > 0) == (tier != "live")
    assert cached.usage.decode_tokens_per_second is not None


def test_a_reply_that_ends_early_is_counted(lab: Lab, llama: Any, plain: Callable[..., Any]) -> None:
    cached = lab.wrap(llama)
    reply = tokens(plain(llama, PROMPT, 12))[PROMPT.shape[1] :]
    run(cached, PROMPT, 12, eos_token_id=reply[4])
    assert cached.usage.completion_tokens == reply.index(reply[4]) + 1


def test_saved_time_is_not_guessed(lab: Lab, llama: Any) -> None:
    cached = lab.wrap(llama)
    short = random_ids(2 * BLOCK, seed=9)
    for _ in range(2):
        run(cached, short, 2)
        assert cached.usage.saved_s is None  # too few tokens to believe a speed
    assert cached.usage.cached_tokens > 0
    run(cached, PROMPT, 2)
    assert cached.usage.saved_s is None  # nothing was reused
    assert cached.usage.prefill_tokens_per_second is not None
    run(cached, PROMPT, 2)
    assert cached.usage.saved_s is not None
    assert cached.usage.prefill_tokens_per_second is None  # next to nothing was computed
    # The measure is kept with the store, for the next process.
    cached.close()
    cached.store.close()
    again = lab.wrap(llama, lab.store())
    run(again, PROMPT, 2)
    assert again.usage.saved_s is not None


def test_reasons(lab: Lab, llama: Any, makers: dict[str, Callable[..., Any]]) -> None:
    store = lab.store()
    cached = lab.wrap(llama, store)
    run(cached, PROMPT, 2)
    assert cached.usage.miss_reason == "new prefix"
    run(cached, PROMPT, 2)
    assert cached.usage.miss_reason is None
    run(cached, cat(PROMPT[:, :100], random_ids(90, seed=1)), 2)
    assert cached.usage.miss_reason == f"new text from token {cached.usage.cached_tokens} on"
    cached.drop_live()
    store.clear()
    run(cached, PROMPT, 2)
    assert cached.usage.miss_reason == "removed from token 0 on"
    other = lab.wrap(makers["llama"](seed=3), store)
    run(other, PROMPT, 2)
    assert str(other.usage.miss_reason).startswith("model changed (weights: ")
    assert "not reused: model changed" in str(other.usage)


def test_evicted_is_said(lab: Lab, llama: Any) -> None:
    store = lab.store(max_cpu_bytes=None, max_disk_bytes=300 << 10)
    cached = lab.wrap(llama, store, max_live=0)
    for seed in range(4):
        run(cached, random_ids(200, seed=seed), 2)
        store.flush()
    run(cached, random_ids(200, seed=0), 2)
    assert cached.usage.miss_reason == f"evicted from token {cached.usage.cached_tokens} on"


def test_the_usage_of_a_bypassed_call(lab: Lab, llama: Any) -> None:
    cached = lab.wrap(llama)
    with pytest.warns(UserWarning, match="use_cache=False"):
        run(cached, PROMPT, 5, use_cache=False)
    check_sums(cached.usage, PROMPT.shape[1], 5)
    assert cached.usage.bypass_reason == "use_cache=False"
    assert cached.usage.miss_reason is None
    assert "bypassed: use_cache=False" in str(cached.usage)


def test_usage_before_any_call(lab: Lab, llama: Any) -> None:
    usage = lab.wrap(llama).usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.total_s) == (0, 0, 0.0)


def test_lookup_agrees_with_the_call(lab: Lab, model: Any) -> None:
    cached = lab.wrap(model)
    run(cached, PROMPT, 5)
    for tier in ("live", "cpu", "disk"):
        lab.leave_only(cached, tier)
        for cut in (3, 8, 9, 40, 100, PROMPT.shape[1]):
            prompt = cat(PROMPT[:, :cut], random_ids(12, seed=cut))
            match = cached.lookup(prompt)
            assert match.prompt_tokens == prompt.shape[1]
            assert match.exact_tokens <= match.num_tokens < match.prompt_tokens
            assert sum(match.tokens_by_tier.values()) == match.num_tokens
            assert match.num_tokens <= cut + 12 - 1
            if cut > BLOCK:
                assert match.num_tokens >= cut // BLOCK * BLOCK
                assert set(match.tokens_by_tier) == {tier} if model.config.model_type == "llama" else True
    prompt = cat(PROMPT, random_ids(12, seed=77))
    match = cached.lookup(prompt)
    run(cached, prompt, 2)
    assert cached.usage.cached_tokens_by_tier == match.tokens_by_tier
