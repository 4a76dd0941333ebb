"""Recent sequences kept live: chats, forks, take-overs, what is live joined with what is stored."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from ._lab import BLOCK, Lab, assert_close, cat, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("tier", ["live", "cpu", "disk"])
def test_a_chat_computes_only_what_is_new(lab: Lab, model: Any, plain: Callable[..., Any], tier: str) -> None:
    cached = lab.wrap(model)
    history = random_ids(50)
    known = 0  # tokens whose KV exists: all that were fed, that is all but the last one generated
    for turn in range(6):
        expected = plain(model, history, 11)
        found = run(cached, history, 11)
        assert tokens(found) == tokens(expected), f"turn {turn}"
        assert cached.usage.completion_tokens == 11
        if tier == "live":
            assert cached.usage.cached_tokens == known
        else:
            # A last piece of fewer than 8 tokens is not stored.
            assert known - 7 <= cached.usage.cached_tokens <= known
            assert set(cached.usage.cached_tokens_by_tier) <= {tier}
        known = history.shape[1] + 11 - 1
        history = cat(found, random_ids(6, seed=turn))
        lab.leave_only(cached, tier)
    assert_close(run_full(cached, history, 11), plain(model, history, 11))


def test_a_chat_that_is_edited_and_regenerated(lab: Lab, model: Any, plain: Callable[..., Any]) -> None:
    cached = lab.wrap(model)
    first = random_ids(60)
    reply = run(cached, first, 30)
    for _ in range(2):  # regenerate: the same prompt again
        assert tokens(run(cached, first, 30)) == tokens(plain(model, first, 30))
        assert cached.usage.cached_tokens == 59
    edited = cat(first[:, :45], random_ids(20, seed=9))
    assert_close(run_full(cached, edited, 30), plain(model, edited, 30))
    assert cached.usage.cached_tokens >= 45 - 8
    turn = cat(reply, random_ids(5, seed=10))  # and back to the first branch
    assert_close(run_full(cached, turn, 30), plain(model, turn, 30))
    assert cached.usage.cached_tokens >= 80


def test_a_fork_leaves_the_longer_sequence_live(lab: Lab, llama: Any, plain: Callable[..., Any]) -> None:
    cached = lab.wrap(llama)
    long = random_ids(100)
    run(cached, long, 10)
    fork = cat(long[:, :30], random_ids(12, seed=1))
    assert tokens(run(cached, fork, 10)) == tokens(plain(llama, fork, 10))
    assert cached.usage.cached_tokens_by_tier == {"live": 30}
    assert len(cached._engine.live) == 2
    cached.store.clear()
    turn = cat(plain(llama, long, 10).sequences, random_ids(3, seed=2))
    assert_close(run_full(cached, turn, 10), plain(llama, turn, 10))
    assert cached.usage.cached_tokens_by_tier == {"live": 109}


def test_taking_a_sequence_over_does_not_hurt_its_blocks(lab: Lab, model: Any, plain: Callable[..., Any]) -> None:
    cached = lab.wrap(model)
    long = random_ids(100)
    reply = run(cached, long, 10)
    branch = cat(long[:, :74], random_ids(40, seed=1))  # more than half of it: the cache itself is cut and goes on
    assert tokens(run(cached, branch, 10)) == tokens(plain(model, branch, 10))
    # A window that was passed over is gone, so there the branch was made from blocks, beside the live sequence.
    full_attention = model.config.model_type == "llama"
    assert len(cached._engine.live) == (1 if full_attention else 2)
    assert cached.usage.cached_tokens_by_tier == {"live" if full_attention else "cpu": 74}
    for tier in ("live", "cpu", "disk"):
        lab.leave_only(cached, tier)
        assert_close(run_full(cached, reply, 10), plain(model, reply, 10))
        assert cached.usage.cached_tokens >= 96


def test_live_tokens_and_stored_blocks_are_joined(lab: Lab, llama: Any, plain: Callable[..., Any]) -> None:
    cached = lab.wrap(llama, max_live=1)
    long = random_ids(9 * BLOCK + 12)
    run(cached, long, 10)
    cached.drop_live()
    short = cat(long[:, :70], random_ids(4, seed=1))
    run(cached, short, 4)
    prompt = cat(long, random_ids(5, seed=2))
    assert_close(run_full(cached, prompt, 10), plain(llama, prompt, 10))
    assert cached.usage.cached_tokens_by_tier == {"live": 4 * BLOCK, "cpu": 5 * BLOCK + 12}


def test_live_and_stored_parts_have_the_bits_of_a_cold_call(lab: Lab, llama: Any) -> None:
    long = random_ids(150)
    expected = run_full(lab.wrap(llama, lab.store("cold")), long)
    cached = lab.wrap(llama, max_live=1, deterministic=True)
    run(cached, long, 10)
    cached.drop_live()
    run(cached, cat(long[:, :70], random_ids(4, seed=1)), 4)
    found = run_full(cached, long)
    assert cached.usage.cached_tokens_by_tier == {"live": 4 * BLOCK, "cpu": 5 * BLOCK}
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("max_live", [0, 1, 2, 3])
def test_interleaved_sequences(lab: Lab, model: Any, plain: Callable[..., Any], max_live: int) -> None:
    rng = random.Random(max_live)
    cached = lab.wrap(model, max_live=max_live)
    start = random_ids(20)  # shared by all of them
    histories = [cat(start, random_ids(25, seed=s)) for s in range(4)]
    for step in range(14):
        which = rng.randrange(len(histories))
        found = run(cached, histories[which], 6)
        assert tokens(found) == tokens(plain(model, histories[which], 6)), f"step {step}, sequence {which}"
        histories[which] = cat(found, random_ids(3, seed=step))
        assert len(cached._engine.live) <= max_live
        if max_live == 0:
            assert "live" not in cached.usage.cached_tokens_by_tier


def test_live_caches_keep_the_memory_budget(lab: Lab, llama: Any, plain: Callable[..., Any]) -> None:
    store = lab.store(max_cpu_bytes=256 << 10)
    cached = lab.wrap(llama, store, max_live=50)
    for seed in range(12):
        prompt = random_ids(60, seed=seed)
        assert tokens(run(cached, prompt, 5)) == tokens(plain(llama, prompt, 5))
        assert cached._engine.live.nbytes <= 128 << 10
        cpu = store.stats().tiers[0]
        assert cpu.nbytes <= cpu.max_bytes
    assert len(cached._engine.live) >= 1
    cached.drop_live()
    assert store._cpu is not None
    assert store._cpu.reserved == 0


def test_salts_share_nothing(lab: Lab, llama: Any, plain: Callable[..., Any]) -> None:
    store = lab.store()
    prompt = random_ids(60)
    first, second = lab.wrap(llama, store, cache_salt="a"), lab.wrap(llama, store, cache_salt="b")
    run(first, prompt)
    assert tokens(run(second, prompt)) == tokens(plain(llama, prompt))
    assert second.usage.cached_tokens == 0
    assert second.explain(random_ids(60, seed=1)).kind == "never_seen"
    third = lab.wrap(llama, store, cache_salt="a")
    run(third, prompt)
    assert third.usage.cached_tokens == 59
