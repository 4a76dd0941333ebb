"""A stored prefix is loaded only where that is faster than computing it, and from both ends where that is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed._blockfile import BlockFileSource
from kvembed._plan import Speeds

from ._lab import BLOCK, assert_close, assert_equal_bits, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from kvembed import CachedModel

    from ._lab import Lab

PROMPT = random_ids(20 * BLOCK + 11)


@pytest.fixture(autouse=True)
def _small_reads_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tiny models' blocks are a few KiB.
    monkeypatch.setattr("kvembed._plan._LEAST_BYTES", 1)
    monkeypatch.setattr("kvembed._plan._WORTH_SPLITTING_S", 0.0)


def on_disk(lab: Lab, cached: CachedModel) -> None:
    """Store the prompt, and leave it on disk only."""
    run(cached, PROMPT)
    lab.leave_only(cached, "disk")


def set_speeds(cached: CachedModel, *, rate: float, loaded: float) -> None:
    """Pretend that so many tokens a second are computed, and loaded from disk."""
    wrapped = cached._engine.wrapped
    assert wrapped.fingerprint is not None
    cached.store.set_note(wrapped.fingerprint.digest, "prefill_tokens_per_second", rate)
    cached.store.set_note(
        bytes(32), "speed/disk", {"bytes_per_second": loaded * cached.kv_bytes_per_token, "at": time.time()}
    )


def test_a_disk_that_is_slower_than_computing(lab: Lab, model: Any) -> None:
    cached = lab.wrap(model)
    on_disk(lab, cached)
    plain = run_full(model, PROMPT)
    set_speeds(cached, rate=100_000.0, loaded=10.0)
    found = run_full(cached, PROMPT)
    assert_close(found, plain)
    assert cached.usage.cached_tokens == 0
    assert cached.usage.miss_reason == "recomputed: faster than loading"


def test_explain_says_that_computing_is_faster(lab: Lab, model: Any) -> None:
    cached = lab.wrap(model)
    on_disk(lab, cached)
    set_speeds(cached, rate=100_000.0, loaded=10.0)
    told = cached.explain(PROMPT)
    assert (told.kind, told.position, told.cached_tokens) == ("recomputed", 0, 0)
    assert told.nearest_tokens == cached.lookup(PROMPT).num_tokens
    assert "faster" in str(told)
    set_speeds(cached, rate=100.0, loaded=100_000.0)
    assert cached.explain(PROMPT).kind == "hit"


def test_a_fast_disk_is_read(lab: Lab, model: Any) -> None:
    cached = lab.wrap(model)
    on_disk(lab, cached)
    set_speeds(cached, rate=100.0, loaded=100_000.0)
    assert tokens(run(cached, PROMPT)) == tokens(run(model, PROMPT))
    assert cached.usage.cached_tokens_by_tier == {"disk": PROMPT.shape[1] - 1}
    assert cached.usage.miss_reason is None


def test_memory_is_always_read(lab: Lab, llama: Any) -> None:
    cached = lab.wrap(llama)
    run(cached, PROMPT)
    lab.leave_only(cached, "cpu")
    set_speeds(cached, rate=1e9, loaded=1.0)
    run(cached, PROMPT)
    assert set(cached.usage.cached_tokens_by_tier) == {"cpu"}


@pytest.mark.parametrize("deterministic", [False, True])
def test_from_both_ends(lab: Lab, llama: Any, deterministic: bool) -> None:
    cached = lab.wrap(llama, deterministic=deterministic)
    cold = run_full(cached, PROMPT)
    cached.store.flush()
    lab.leave_only(cached, "disk")
    set_speeds(cached, rate=1000.0, loaded=1000.0)
    found = run_full(cached, PROMPT)
    by_tier = cached.usage.cached_tokens_by_tier
    assert set(by_tier) == {"disk"}
    assert 8 * BLOCK <= by_tier["disk"] <= 12 * BLOCK  # the other half was computed
    assert "while the rest was loading" in (cached.usage.miss_reason or "")
    if deterministic:
        assert_equal_bits(found, cold)
    else:
        assert_close(found, cold)
    # What is kept of it is right, and whole.
    longer = torch.cat([found.sequences, random_ids(9, seed=4)], dim=1)
    assert tokens(run(cached, longer)) == tokens(run(llama, longer))


def test_a_bad_block_behind_a_computation(lab: Lab, llama: Any) -> None:
    lab.expect_sound = False
    cached = lab.wrap(llama)
    on_disk(lab, cached)
    set_speeds(cached, rate=1000.0, loaded=1000.0)
    assert cached.store.path is not None
    files = sorted(cached.store.path.glob("blocks/*/*.safetensors"))
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.warns(match="checksum"):
        found = run(cached, PROMPT)
    assert tokens(found) == tokens(run(llama, PROMPT))


def test_an_interrupt_while_both_go_on(lab: Lab, llama: Any) -> None:
    cached = lab.wrap(llama)
    on_disk(lab, cached)
    set_speeds(cached, rate=1000.0, loaded=1000.0)
    steps: list[int] = []

    def stop(done: int, _: int) -> None:
        steps.append(done)
        if len(steps) == 3:
            raise KeyboardInterrupt

    cached.progress = stop
    with pytest.raises(KeyboardInterrupt):
        run(cached, PROMPT)
    cached.progress = False
    assert tokens(run(cached, PROMPT)) == tokens(run(llama, PROMPT))


def test_speeds_are_measured_and_go_stale(lab: Lab, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = lab.wrap(llama)
    on_disk(lab, cached)
    speeds = Speeds(cached.store)
    assert speeds.of("disk") is None
    read = BlockFileSource.read_into

    def slow(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.002)
        read(*args, **kwargs)

    monkeypatch.setattr(BlockFileSource, "read_into", slow)
    run(cached, PROMPT)
    measured = speeds.of("disk")
    assert measured is not None
    # 40 reads of 2 ms at the least, by two threads.
    assert measured <= PROMPT.shape[1] * cached.kv_bytes_per_token / (20 * 0.002)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 700)
    assert speeds.of("disk") is None
    monkeypatch.setattr(time, "time", lambda: now - 700)  # a clock set back
    assert speeds.of("disk") is None
