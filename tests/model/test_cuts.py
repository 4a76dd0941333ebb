"""Prompts cut anywhere, blocks and windows of awkward sizes: always the tokens of a run that never cached."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ._lab import BLOCK, Lab, assert_close, cat, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = 30  # for each model and block size


@pytest.mark.parametrize("block_size", [8, 16])
def test_random_cuts(lab: Lab, model: Any, plain: Callable[..., Any], block_size: int) -> None:
    rng = random.Random(block_size)
    base = random_ids(180, seed=7)
    cached = lab.wrap(model, block_size=block_size, max_live=2)
    reused = 0
    for case in range(CASES):
        cut, added = rng.randint(1, 170), rng.randint(0, 30)
        prompt = cat(base[:, :cut], random_ids(added, seed=case)) if added else base[:, :cut]
        new = rng.randint(1, 10)
        expected = plain(model, prompt, new)
        if case % 3 == 0:
            assert_close(run_full(cached, prompt, new), expected)
        else:
            assert tokens(run(cached, prompt, new)) == tokens(expected), f"case {case}: {prompt.shape[1]} tokens"
        usage = cached.usage
        assert usage.bypass_reason is None
        assert usage.cached_tokens < usage.prompt_tokens == prompt.shape[1]
        reused += usage.cached_tokens
        match rng.randrange(4):
            case 0:
                lab.leave_only(cached, "cpu")
            case 1:
                lab.leave_only(cached, "disk")
            case 2:
                cached.deterministic = not cached.deterministic
            case _:
                pass
    assert reused > 20 * CASES  # or nothing was tried


@pytest.mark.parametrize(("window", "block_size"), [(8, 16), (16, 16), (24, 8), (5, 8), (100, 16)])
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windows_and_blocks(
    lab: Lab,
    makers: dict[str, Callable[..., Any]],
    plain: Callable[..., Any],
    family: str,
    window: int,
    block_size: int,
) -> None:
    model = makers[family](sliding_window=window)
    cached = lab.wrap(model, block_size=block_size, max_live=1)
    first = random_ids(70, seed=3)
    for tier in ("live", "cpu", "disk"):
        reply = run(cached, first, 12)
        assert tokens(reply) == tokens(plain(model, first, 12))
        lab.leave_only(cached, tier)
        turn = cat(reply, random_ids(10, seed=4))
        assert_close(run_full(cached, turn, 12), plain(model, turn, 12))
        # All but the reply's last token, which was never fed, and (from blocks) a piece too short to be stored.
        assert cached.usage.cached_tokens >= first.shape[1] + 12 - 1 - 8
        # A cut in the middle of what is kept: before the window of its end.
        assert_close(run_full(cached, turn[:, :41], 12), plain(model, turn[:, :41], 12))
        cached.store.clear()
        cached.drop_live()


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_reply_much_longer_than_the_window(
    lab: Lab, models: dict[str, Any], plain: Callable[..., Any], family: str
) -> None:
    model = models[family]
    cached = lab.wrap(model)
    prompt = random_ids(21)
    assert_close(run_full(cached, prompt, 100), plain(model, prompt, 100))
    for tier in ("live", "cpu", "disk"):
        cached.drop_live()
        cached.store.clear()
        turn = cat(run(cached, prompt, 100), random_ids(11, seed=5))
        lab.leave_only(cached, tier)
        # The reply's own blocks were captured whole although the window had passed over their start.
        assert_close(run_full(cached, turn, 20), plain(model, turn, 20))
        assert cached.usage.cached_tokens_by_tier == {tier: 120}


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15])
def test_prompts_shorter_than_a_block(lab: Lab, model: Any, plain: Callable[..., Any], n: int) -> None:
    prompt = random_ids(n, seed=n)
    cached = lab.wrap(model)
    for tier in ("live", "cpu", "disk"):
        assert_close(run_full(cached, prompt, 5), plain(model, prompt, 5))
        run(cached, prompt, 5)
        lab.leave_only(cached, tier)
    run(cached, prompt, 5)
    # What is kept is the prompt with its reply: 8 tokens at least, or it is not worth a file.
    assert cached.usage.cached_tokens == (n - 1 if n > 8 else 0)


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("tier", ["live", "cpu", "disk"])
def test_a_prompt_that_is_cached_whole(lab: Lab, model: Any, plain: Callable[..., Any], extra: int, tier: str) -> None:
    # transformers feeds the whole prompt a second time when the cache is as long as the prompt.
    prompt = random_ids(4 * BLOCK + extra)
    for deterministic in (False, True):
        cached = lab.wrap(model, deterministic=deterministic)
        cached.store.clear()
        cached.prefill(prompt)
        lab.leave_only(cached, tier)
        assert_close(run_full(cached, prompt), plain(model, prompt))
        whole = prompt.shape[1] - 1
        assert cached.usage.cached_tokens == (whole // BLOCK * BLOCK if deterministic else whole)
        assert cached.usage.computed_tokens >= 1


def test_prefill_alone_computes_everything_once(lab: Lab, model: Any, plain: Callable[..., Any]) -> None:
    prompt = random_ids(4 * BLOCK + 5)
    cached = lab.wrap(model)
    usage = cached.prefill(prompt)
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (prompt.shape[1], 0, 0)
    again = cached.prefill(prompt)
    assert again.computed_tokens == 0
    assert_close(run_full(cached, prompt), plain(model, prompt))


def test_one_token_at_a_time(lab: Lab, model: Any, plain: Callable[..., Any]) -> None:
    # The worst case for bookkeeping: every call goes on from the last and adds a single token.
    cached = lab.wrap(model, block_size=8)
    ids = random_ids(30)
    for _ in range(12):
        ids = run(cached, ids, 1)
    assert tokens(ids) == tokens(plain(model, random_ids(30), 12))
    assert cached.usage.cached_tokens == ids.shape[1] - 2


def test_ids_of_another_integer_type(lab: Lab, model: Any, plain: Callable[..., Any]) -> None:
    prompt = random_ids(40)
    cached = lab.wrap(model)
    run(cached, prompt)
    found = run(cached, prompt.to(torch.int32))
    assert found.dtype == run(model, prompt.to(torch.int32)).dtype
    assert tokens(found) == tokens(plain(model, prompt))
    assert cached.usage.cached_tokens == 39
